"""Families of one-dimensional learnable functions φ(x), evaluated on attention scores.

A unit of the operator sums one function of the family over a row of M inputs, each input with its own coefficients:
Φ_p[x] = Σ_q φ_pq(x_q). Coefficients of P units are one tensor (heads, *family, M, P); `family` are the dimensions that
one function has.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Basis(ABC):
    """A family of functions φ(x; c).

    Attributes:
        family: shape of the coefficients of one function.
        linear: whether φ is linear in all of its coefficients. Mixing the units is then mixing their coefficients.
        amplitudes: index into the first dimension of `family` of the coefficients that φ is linear in.
        mean_square: mean of φ(x)² over x ~ N(0, 1) and coefficients as `reset` draws them; `init: scaled` makes it 1.
    """

    family: tuple[int, ...]
    linear = False
    amplitudes = slice(None)
    mean_square: float

    @abstractmethod
    def reset(self, coefficients: Tensor) -> None:
        """Draws coefficients (heads, *family, M, P) anew, in place."""

    @abstractmethod
    def sums(self, inputs: Tensor, coefficients: Tensor, mask: Tensor | None = None) -> Tensor:
        """Φ[x].

        Args:
            inputs: x, of shape (..., heads, rows, M).
            coefficients: of shape (heads, *family, M, P).
            mask: False where an input contributes nothing, broadcastable to the inputs.

        Returns:
            A tensor of shape (..., heads, rows, P).
        """

    def elements_per_input(self, units: int) -> int:
        """Number of elements that `sums` forms for one input."""
        return units


class LinearBasis(Basis):
    """A family φ(x) = Σ_j c_j f_j(x) of fixed features f_j, c_j ~ N(0, 1) at the start.

    Coefficients may also have the inputs' batch dimensions, as those do that are mixed with values.
    """

    linear = True

    @abstractmethod
    def features(self, inputs: Tensor) -> list[Tensor]:
        """f_j(x) for all j, each of the shape of the inputs; j counts through `family`, last dimension fastest."""

    def reset(self, coefficients: Tensor) -> None:
        nn.init.normal_(coefficients)

    def sums(self, inputs: Tensor, coefficients: Tensor, mask: Tensor | None = None) -> Tensor:
        weights = coefficients.flatten(-2 - len(self.family), -3).unbind(-3)
        total = 0.0
        for feature, weight in zip(self.features(inputs), weights, strict=True):
            total = total + (feature if mask is None else feature * mask) @ weight
        return total

    def elements_per_input(self, units: int) -> int:
        return math.prod(self.family)


class Fourier(LinearBasis):
    """φ(x) = Σ_m a_m cos(m x) + b_m sin(m x), m = 1 to G; a, b ~ N(0, 1) (section 3 and Table 6 of arXiv 2503.10632).

    Coefficients are a then b: (heads, 2, G, M, P), at index (head, a or b, m − 1, q, p).
    """

    def __init__(self, grid_size: int):
        self.family = (2, grid_size)
        self.mean_square = float(grid_size)

    def features(self, inputs: Tensor) -> list[Tensor]:
        pairs = [_CosineAndSine.apply(m * inputs if m > 1 else inputs) for m in range(1, self.family[1] + 1)]
        return [cosine for cosine, _ in pairs] + [sine for _, sine in pairs]


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


class BSpline(LinearBasis):
    """φ(x) = Σ_j c_j B_j(x) + w SiLU(x), B-splines of order k on G intervals over [−I, I], as in KAN.

    Coefficients are c then w: (heads, G + k + 1, M, P), all from N(0, 1) at the start. Outside [−I, I] φ
    fades, within k intervals, to w SiLU(x). Source: section 2.2 of KAN, arXiv 2404.19756.

    Args:
        grid_size: number of intervals G.
        order: degree k of the pieces.
        interval: I.
    """

    def __init__(self, grid_size: int, order: int, interval: float):
        self.family = (grid_size + order + 1,)
        self.order = order
        self.spacing = 2 * interval / grid_size
        self.first_knot = -interval - order * self.spacing
        self.mean_square = float(_mean_over_normal(lambda x: sum(feature**2 for feature in self.features(x))))

    def features(self, inputs: Tensor) -> list[Tensor]:
        place = (inputs - self.first_knot) / self.spacing  # in intervals from the first knot
        pieces = [((place >= j) & (place < j + 1)).to(inputs.dtype) for j in range(self.family[0] - 1 + self.order)]
        for degree in range(1, self.order + 1):  # Cox and de Boor's recursion
            pieces = [
                ((place - j) * piece + (j + degree + 1 - place) * following) / degree
                for j, (piece, following) in enumerate(pairwise(pieces))
            ]
        return [*pieces, F.silu(inputs)]


class Rational(Basis):
    """φ(x) = (a₀ + a₁x + … + a₅x⁵) / (1 + |b₁x + … + b₄x⁴|), the safe Padé unit of order (5, 4).

    Coefficients are a₀ to a₅, then b₁ to b₄: (heads, 10, M, P). Source: arXiv 1907.06732. The paper of KArAt does not
    say how they start: here a_j ~ N(0, 1) / j! and b_j ~ 0.1 · N(0, 1) / j!, so that no power dominates and the
    denominator, whose gradient is 0 at b = 0, can learn.
    """

    family = (10,)
    amplitudes = slice(0, 6)
    _deviations = [1 / math.factorial(j) for j in range(6)] + [0.1 / math.factorial(j) for j in range(1, 5)]

    def __init__(self):
        self.mean_square = float(_mean_over_normal(self._mean_square_at))

    def reset(self, coefficients: Tensor) -> None:
        for coefficient, deviation in zip(coefficients.unbind(1), self._deviations, strict=True):
            nn.init.normal_(coefficient, std=deviation)

    def _mean_square_at(self, x: Tensor) -> Tensor:
        """Mean of φ(x)² over the coefficients. For each x the polynomial below is from N(0, its deviation²)."""
        above = sum((deviation * x**j) ** 2 for j, deviation in enumerate(self._deviations[:6]))
        below = sum((deviation * x**j) ** 2 for j, deviation in enumerate(self._deviations[6:], start=1)).sqrt()
        return above * _mean_over_normal(lambda z: (1 + (below[:, None] * z).abs()) ** -2)

    def sums(self, inputs: Tensor, coefficients: Tensor, mask: Tensor | None = None) -> Tensor:
        a, b = coefficients.split((6, 4), dim=1)
        x = inputs.unsqueeze(-1)  # (..., heads, rows, M, 1)
        numerator, denominator = a[:, 5, None], b[:, 3, None]  # (heads, 1, M, P)
        for j in reversed(range(5)):
            numerator = numerator * x + a[:, j, None]
        for j in reversed(range(3)):
            denominator = denominator * x + b[:, j, None]
        return _sum_over_inputs(numerator / (1 + (denominator * x).abs()), mask)


class Wavelet(Basis):
    """φ(x) = w ψ((x − τ) / s), w ~ N(0, 1), τ = 0, s = 1 at the start.

    Coefficients are w, τ, s: (heads, 3, M, P). If |s| is below 0.01, x − τ is divided by 0.01 with the sign of s.

    Args:
        name: the mother wavelet ψ, see MOTHER_WAVELETS.
    """

    family = (3,)
    amplitudes = slice(0, 1)

    def __init__(self, name: str):
        self.mother_wavelet = MOTHER_WAVELETS[name]
        self.mean_square = float(_mean_over_normal(lambda x: self.mother_wavelet(x) ** 2))

    def reset(self, coefficients: Tensor) -> None:
        for coefficient, (mean, deviation) in zip(coefficients.unbind(1), ((0, 1), (0, 0), (1, 0)), strict=True):
            nn.init.normal_(coefficient, mean, deviation)

    def sums(self, inputs: Tensor, coefficients: Tensor, mask: Tensor | None = None) -> Tensor:
        weight, shift, width = (coefficient.unsqueeze(-3) for coefficient in coefficients.unbind(1))
        # Its gradient is that of the width in use, else a narrow function would stay as it is for ever.
        width = width + (torch.copysign(width.abs().clamp(min=0.01), width) - width).detach()
        return _sum_over_inputs(weight * self.mother_wavelet((inputs.unsqueeze(-1) - shift) / width), mask)


def mexican_hat(x: Tensor) -> Tensor:
    """2 / (π^¼ √3) · (x² − 1) exp(−x²/2)."""
    return 2 / (math.pi**0.25 * 3**0.5) * (x**2 - 1) * torch.exp(-(x**2) / 2)


def morlet(x: Tensor) -> Tensor:
    """cos(5x) exp(−x²/2)."""
    return torch.cos(5 * x) * torch.exp(-(x**2) / 2)


def dog(x: Tensor) -> Tensor:
    """Minus the derivative of a Gaussian: −d/dx exp(−x²/2) = x exp(−x²/2)."""
    return x * torch.exp(-(x**2) / 2)


def meyer(x: Tensor) -> Tensor:
    """sin(π|x|) m(ν(|x|)), ν(t) = t⁴ (35 − 84t + 70t² − 20t³), m(t) = 1 to ½ and cos(π/2 · ν(2t − 1)) from there.

    ν is 0 before and 1 after [0, 1], so that ψ is 0 for |x| ≥ 1.
    """

    def nu(t: Tensor) -> Tensor:
        t = t.clamp(0, 1)
        return t**4 * (35 + t * (-84 + t * (70 - 20 * t)))

    distance = x.abs()
    return torch.sin(math.pi * distance) * torch.cos(math.pi / 2 * nu(2 * nu(distance) - 1))


def shannon(x: Tensor) -> Tensor:
    """sinc(x/π) ω(x) = sin(x) / x · ω(x), with the Hamming window ω(x) = 0.54 + 0.46 cos x on [−π, π], 0 outside.

    The paper does not say how wide its window is: this one ends at the first zeros of the sinc.
    """
    return torch.sinc(x / math.pi) * torch.where(x.abs() <= math.pi, 0.54 + 0.46 * torch.cos(x), 0.0)


MOTHER_WAVELETS = {"mexican_hat": mexican_hat, "morlet": morlet, "dog": dog, "meyer": meyer, "shannon": shannon}


def identity(x: Tensor) -> Tensor:
    return x


# b(x), the function without coefficients that every unit adds to its own.
BASE_FUNCTIONS = {"zero": None, "identity": identity, "silu": F.silu, "gelu": F.gelu}


def _sum_over_inputs(values: Tensor, mask: Tensor | None) -> Tensor:
    """Sums (..., rows, M, P) over the M inputs that the mask leaves."""
    return (values if mask is None else values * mask.unsqueeze(-1)).sum(dim=-2)


def _mean_over_normal(function: Callable[[Tensor], Tensor]) -> Tensor:
    """Mean of function(x) over x ~ N(0, 1), by the trapezoidal rule; x is the last dimension of what it returns."""
    x = torch.linspace(-8, 8, 801, dtype=torch.float64, device="cpu")  # also where the operator is made on "meta"
    weights = torch.exp(-(x**2) / 2)
    return (function(x) * weights).sum(dim=-1) / weights.sum()
