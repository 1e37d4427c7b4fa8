"""Sums of Fourier series over attention scores, and the product with the values: one signature, one file a device.

`cpu` is compiled C++, for float32; `triton` is for NVIDIA's GPUs; `plain` is PyTorch alone, for all other cases. The
environment variable KARAT_BACKEND=plain forces it.
"""

import math
import os
from types import ModuleType

import torch
from torch import Tensor

from ..bias import Bias, check_broadcast
from . import cpu, plain

try:
    from . import triton
except ImportError:  # Triton comes with PyTorch's CUDA builds for Linux alone
    triton = None


def fourier_sums(
    query: Tensor,
    key: Tensor,
    coefficients: Tensor,
    scale: float,
    bias: Bias | None = None,
    mask: Tensor | None = None,
    value: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Φ̂_p[A_k] = Σ_q Σ_m a_pqm cos(m A_kq) + b_pqm sin(m A_kq), for the scores A = scale · Q Kᵀ + bias.

    The scores are not kept: memory grows with N, not with N².

    Args:
        query: of shape (..., heads, N, d).
        key: of shape (..., heads, M, d).
        coefficients: a then b, of shape (heads, 2, G, M, r), at index (head, a or b, m − 1, q, p).
        scale: of the product of query and key.
        bias: added to the scores.
        mask: boolean, broadcastable to (..., heads, N, M), False where a query does not see a key. Such a score is in
            no sum and gets no gradient.
        value: V, of shape (..., heads, M, v). With it, softmax(A) V comes from the same scores.

    Returns:
        A tensor of shape (..., heads, N, r); with a value, it and softmax(A) V, of shape (..., heads, N, v). Both are
        differentiable once.

    Raises:
        ValueError: a tensor is of another shape.

    Source: section 3 of the paper, arXiv 2503.10632.
    """
    _check_shapes(query, key, coefficients, bias or Bias(), mask, value)
    backend = choose(query, key, coefficients, bias, mask, value)
    return backend.fourier_sums(query, key, coefficients, scale, bias, mask, value)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coefficients: Tensor,
    projector: Tensor,
    factor: float,
    scale: float,
    bias: Bias | None = None,
    mask: Tensor | None = None,
    residual: bool = False,
    with_triton: bool = True,
) -> Tensor:
    """σ̂(A) V = Φ̂[A] (f Wᵀ V); with a mask (f Φ̂[A] Wᵀ ∘ mask) V; with the residual that + softmax(A) V.

    Args: those of `fourier_sums`, and
        value: V, of shape (..., heads, M, v).
        projector: W, of shape (heads, M, r).
        factor: f, of W.
        residual: whether to add softmax(A) V.
        with_triton: whether Triton may sum on CUDA.

    Returns:
        A tensor of shape (..., heads, N, v).
    """
    with_softmax = value if residual else None
    backend = choose(query, key, coefficients, bias, mask, with_softmax, with_triton)
    if backend is cpu:
        return cpu.attend(query, key, value, coefficients, projector, factor, scale, bias, mask, residual)
    units = backend.fourier_sums(query, key, coefficients, scale, bias, mask, with_softmax)
    units, softmax = units if residual else (units, None)
    output = plain.project(units, projector * factor, value, mask)
    return output + softmax if residual else output


def choose(
    query: Tensor,
    key: Tensor,
    coefficients: Tensor,
    bias: Bias | None,
    mask: Tensor | None,
    value: Tensor | None,
    with_triton: bool = True,
) -> ModuleType:
    """The back end for these inputs of `fourier_sums`; without `with_triton` it is not Triton's."""
    if not _plain_is_forced():
        if cpu.can_run(query, key, coefficients):
            return cpu
        if with_triton and triton is not None and triton.can_run(query, key, coefficients, bias, mask, value):
            return triton
    return plain


def _check_shapes(query, key, coefficients, bias: Bias, mask, value) -> None:
    """Raises ValueError for shapes that do not fit: kernels read memory by them."""
    queries, keys = tuple(query.shape[:-1]), (*query.shape[:-2], key.shape[-2])
    sides = [0 if term is None else term.shape[-1] for term in bias[1:]]
    if any(sides) and math.prod(sides) != keys[-1]:
        raise ValueError(
            f"The grid of the bias is {sides[0]} × {sides[1]}. It must have {keys[-1]} places, a key each."
        )
    for name, tensor, shape in (
        ("key", key, (*keys, query.shape[-1])),
        ("coefficients", coefficients, (queries[-2], 2, *coefficients.shape[2:3], keys[-1], coefficients.shape[-1])),
        ("value", value, None if value is None else (*keys, value.shape[-1])),
        ("vertical", bias.vertical, (*queries, sides[0])),
        ("horizontal", bias.horizontal, (*queries, sides[1])),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} has the shape {tuple(tensor.shape)}. It must be {shape}.")
    for name, tensor in (("bias", bias.full), ("mask", mask)):
        if tensor is not None:
            check_broadcast(name, tensor, (*queries, keys[-1]))


def _plain_is_forced() -> bool:
    """Whether a user forces plain PyTorch, or torch records a graph of ATen calls: for ONNX, to count multiply-adds."""
    return os.environ.get("KARAT_BACKEND") == "plain" or torch.jit.is_tracing() or torch.compiler.is_exporting()
