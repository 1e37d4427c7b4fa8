"""The config of a learnable operator."""

import math
import re
from dataclasses import dataclass

from .basis import BASE_FUNCTIONS, MOTHER_WAVELETS

_CHOICES = {
    "basis": ("fourier", "bspline", "rational", *MOTHER_WAVELETS),
    "base_function": tuple(BASE_FUNCTIONS),
    "order": ("project_after", "project_before", "two_operators"),
    "projection": ("none", "simplex"),
    "residual": ("none", "softmax"),
    "init": ("scaled", "paper"),
}


@dataclass(frozen=True)
class KArAtConfig:
    """The config of a learnable operator.

    Args:
        basis: family of the one-dimensional functions: "fourier", "bspline", "rational", "mexican_hat", "morlet",
            "dog", "meyer" or "shannon"; see basis.py.
        grid_size: G, at least 1: number of frequencies of "fourier", of intervals of "bspline". The G of the paper's
            "G1B" and "G3U".
        rank: rank r of the operator, from 1 to N, the number of tokens that one attention sees. None is full rank, Φ̂
            alone with N×N functions: for small N.
        base_function: b(x), added to every function: "zero", "identity", "silu" or "gelu".
        order: "project_after", which is W Φ̂(A); "project_before", Φ̂(W A), with W r×N and N×r functions; or
            "two_operators", Φ̂₂(Φ̂₁(A)), without W.
        projection: "simplex" projects each row of σ̂(A) on the probability simplex. It forms N×N matrices. Or "none".
        residual: "none", or "softmax" for softmax(A) + W Φ̂(A), where W starts at 0: a network trained with softmax
            then starts exactly as it was. If W is not last, the last functions' amplitudes start at 0; a base function
            would stay, so only "zero" is allowed.
        num_karat_heads: number of a block's heads that are KArAt, the first ones; the rest are softmax. None is all.
        init: "scaled" has fixed factors that keep units at unit variance and σ̂ at the scale of 1/N whatever N and G:
            for Fourier and "project_after" 1/√(N·G) before Φ̂, whose coefficients are from N(0, 1), and 1/N before W,
            uniform in ±1. Neither the output nor its change by one optimiser step then grows with N. The factor of Φ̂
            applies to a base function too, but does not depend on it.
            "paper" has no fixed factors: Fourier coefficients from N(0, 1) (Table 6), and W, of which the paper says
            nothing, uniform in ±1/√m as a linear layer of m inputs.
        spline_order: k of "bspline".
        spline_range: I of "bspline", whose intervals tile [−I, I].
        triton: whether Triton kernels sum a Fourier operator over its scores on CUDA.

    Raises:
        ValueError: a field has a value that is not allowed; the message begins with the field's name.
    """

    basis: str = "fourier"
    grid_size: int = 1
    rank: int | None = 12
    base_function: str = "zero"
    order: str = "project_after"
    projection: str = "none"
    residual: str = "none"
    num_karat_heads: int | None = None
    init: str = "scaled"
    spline_order: int = 3
    spline_range: float = 3.0
    triton: bool = True

    def __post_init__(self):
        for field, choices in _CHOICES.items():
            value = getattr(self, field)
            if value not in choices:
                raise ValueError(f"{field} is {value!r}, which is unknown. Known: {', '.join(choices)}.")
        for field, none, least in (
            ("grid_size", "", 1),
            ("rank", " It may be None, for full rank.", 1),
            ("num_karat_heads", " It may be None, for all heads.", 1),
            ("spline_order", "", 0),
        ):
            value = getattr(self, field)
            if value is None and none:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{field} is {value!r}. It must be a whole number, at least {least}.{none}")
        value = self.spline_range
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise ValueError(f"spline_range is {value!r}. It must be a finite number above 0.")
        if self.rank is None and self.order != "project_after":
            raise ValueError(
                f'rank is None, but order "{self.order}" goes through r values. Set a rank, or order "project_after", '
                "which without W is Φ̂(A) with N×N functions."
            )
        ends_in_projector = self.order == "project_after" and self.rank is not None
        if self.residual == "softmax" and self.base_function != "zero" and not ends_in_projector:
            raise ValueError(
                f'base_function is "{self.base_function}", which with residual "softmax" needs a W after Φ̂ that starts '
                'at zero, so that the network starts as softmax. Set base_function "zero", or order "project_after" '
                "and a rank."
            )


def parse_shorthand(shorthand: str, **fields) -> tuple[KArAtConfig, str]:
    """Reads the paper's shorthand: "G3B" is grid size 3, blockwise; "G1U" is grid size 1, universal.

    Args:
        shorthand: "G", the grid size, and "B" or "U".
        fields: any other field of the config.

    Returns:
        The operator's config, and "blockwise" or "universal": how the blocks of a network share operators, which is no
        property of one.

    Raises:
        ValueError: the shorthand is not of that form, or a field is not allowed.
    """
    match = re.fullmatch(r"G(\d+)([BU])", shorthand)
    if not match:
        raise ValueError(
            f"{shorthand!r} is no shorthand for a KArAt config. It is G, the grid size, and B for blockwise or "
            "U for universal: for example G3B."
        )
    return KArAtConfig(grid_size=int(match[1]), **fields), "blockwise" if match[2] == "B" else "universal"
