"""Families of one-dimensional learnable functions φ(x), evaluated on attention scores.

A unit of the operator sums one function of the family over a row of N scores, each score with its own coefficients.
"""

import torch
from torch import Tensor


def fourier_sum(scores: Tensor, coefficients: Tensor) -> Tensor:
    """Sums r Fourier series over each row of scores: Σ_q Σ_m a_pqm cos(m A_kq) + b_pqm sin(m A_kq).

    Args:
        scores: A, of shape (..., heads, N, N), in radians.
        coefficients: a then b, of shape (heads, 2, G, N, r), at index (head, a or b, m − 1, q, p).

    Returns:
        Φ̂[A] without its base function, of shape (..., heads, N, r).

    Source: section 3 of the paper, arXiv 2503.10632.
    """
    cosine_weights, sine_weights = coefficients.unbind(1)
    total = 0.0
    for index in range(coefficients.shape[2]):
        cosines, sines = _CosineAndSine.apply((index + 1) * scores if index else scores)
        total = total + cosines @ cosine_weights[:, index] + sines @ sine_weights[:, index]
    return total


class _CosineAndSine(torch.autograd.Function):
    """cos x and sin x. Each is the other's derivative, so the backward pass needs neither x nor the two again."""

    @staticmethod
    def forward(ctx, x: Tensor) -> tuple[Tensor, Tensor]:
        cosine, sine = x.cos(), x.sin()
        ctx.save_for_backward(cosine, sine)
        return cosine, sine

    @staticmethod
    def backward(ctx, cosine_gradient: Tensor, sine_gradient: Tensor) -> Tensor:
        cosine, sine = ctx.saved_tensors
        return sine_gradient * cosine - cosine_gradient * sine


def identity(scores: Tensor) -> Tensor:
    return scores


# b(x), the function that every unit adds to its series.
BASE_FUNCTIONS = {
    "zero": None,
    "identity": identity,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
}
