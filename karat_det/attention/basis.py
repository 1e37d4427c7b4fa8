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
        phase = (index + 1) * scores
        total = total + phase.cos() @ cosine_weights[:, index] + phase.sin() @ sine_weights[:, index]
    return total


def identity(scores: Tensor) -> Tensor:
    return scores


# b(x), the function that every unit adds to its series.
BASE_FUNCTIONS = {
    "zero": None,
    "identity": identity,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
}
