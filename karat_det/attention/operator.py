"""The operator that stands in softmax's place: σ̂(A_k) = W Φ̂[A_k], with Φ̂_p[A_k] = Σ_q φ̂_pq(A_kq).

A = Q Kᵀ / √d are one head's attention scores, N×N, and A_k is row k. Φ̂ holds r×N learnable functions φ̂_pq, W projects
r values back to N. Equation 2 and section 4 of "Kolmogorov-Arnold attention", arXiv 2503.10632.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .basis import BASE_FUNCTIONS, fourier_sum

_CHOICES = {
    "basis": ("fourier",),
    "sharing": ("blockwise", "universal"),
    "base_function": tuple(BASE_FUNCTIONS),
    "order": ("project_after",),
    "residual": ("none", "softmax"),
    "init": ("scaled", "paper"),
}


@dataclass(frozen=True)
class KArAtConfig:
    """What the learnable operator is made of.

    Args:
        basis: family of the one-dimensional functions: "fourier".
        grid_size: number of frequencies G, at least 1.
        rank: rank r of the operator, at least 1 and at most the number of tokens.
        sharing: "blockwise" gives each block of a network its own operator, "universal" gives all the same one.
        base_function: b(x), added to every series: "zero", "identity", "silu" or "gelu".
        order: "project_after", which is W Φ̂(A).
        residual: "none", or "softmax" for softmax(A) + W Φ̂(A), where W starts at 0: a network trained with softmax
            then starts as exactly what it was.
        init: "scaled" draws coefficients of unit variance and W uniform in ±1, and multiplies Φ̂ by the fixed factor
            1/√(N·G) and W by 1/N, so that neither the output nor what one optimiser step does to it grows with N.
            "paper" has no fixed factors: coefficients from N(0, 1) (Table 6), and W, of which the paper says nothing,
            uniform in ±1/√r as a linear layer of r inputs.

    Raises:
        ValueError: a field has a value that is not allowed; the message begins with the field's name.
    """

    basis: str = "fourier"
    grid_size: int = 1
    rank: int = 12
    sharing: str = "universal"
    base_function: str = "zero"
    order: str = "project_after"
    residual: str = "none"
    init: str = "scaled"

    def __post_init__(self):
        for field, choices in _CHOICES.items():
            value = getattr(self, field)
            if value not in choices:
                raise ValueError(f"{field} is {value!r}, which is unknown. Known: {', '.join(choices)}.")
        for field in ("grid_size", "rank"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{field} is {value!r}. It must be a whole number, at least 1.")

    @classmethod
    def parse(cls, shorthand: str, **fields) -> "KArAtConfig":
        """Reads the paper's shorthand: "G3B" is grid size 3, blockwise; "G1U" is grid size 1, universal.

        Args:
            shorthand: "G", the grid size, and "B" or "U".
            fields: any other field of the config.

        Raises:
            ValueError: the shorthand is not of that form, or a field is not allowed.
        """
        match = re.fullmatch(r"G(\d+)([BU])", shorthand)
        if not match:
            raise ValueError(
                f"{shorthand!r} is no shorthand for a KArAt config. It is G, the grid size, and B for blockwise or "
                "U for universal: for example G3B."
            )
        sharing = "blockwise" if match[2] == "B" else "universal"
        return cls(grid_size=int(match[1]), sharing=sharing, **fields)

    @property
    def shorthand(self) -> str:
        """The paper's name for grid size and sharing, for example "G3B"."""
        return f"G{self.grid_size}{self.sharing[0].upper()}"


class KArAtOperator(nn.Module):
    """The learnable operators of all heads of a block, or of all blocks that share them.

    Args:
        num_heads: number of attention heads; each has an operator of its own.
        num_tokens: N, the number of tokens that attend to each other. It is fixed: each column of the scores has its
            own functions.
        config: see KArAtConfig.

    Attributes:
        coefficients: a then b of the Fourier series, of shape (heads, 2, G, N, r); index (…, m − 1, q, p) is that of
            cos(m x) or sin(m x) in φ̂_pq.
        projector: W, of shape (heads, N, r).

    Raises:
        ValueError: the rank is above the number of tokens.
    """

    def __init__(self, num_heads: int, num_tokens: int, config: KArAtConfig):
        super().__init__()
        if config.rank > num_tokens:
            raise ValueError(
                f"rank is {config.rank}, above the {num_tokens} tokens that attend to each other. "
                f"It must be from 1 to {num_tokens}."
            )
        self.num_heads = num_heads
        self.num_tokens = num_tokens
        self.config = config
        self.coefficients = nn.Parameter(torch.empty(num_heads, 2, config.grid_size, num_tokens, config.rank))
        self.projector = nn.Parameter(torch.empty(num_heads, num_tokens, config.rank))
        scaled = config.init == "scaled"
        self.series_scale = (num_tokens * config.grid_size) ** -0.5 if scaled else 1.0
        self.projector_scale = 1 / num_tokens if scaled else 1.0
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws coefficients and projector anew as `config.init` says."""
        nn.init.normal_(self.coefficients)
        if self.config.residual == "softmax":
            nn.init.zeros_(self.projector)
        else:
            bound = 1.0 if self.config.init == "scaled" else self.config.rank**-0.5
            nn.init.uniform_(self.projector, -bound, bound)

    def activate(self, scores: Tensor) -> Tensor:
        """The activated attention σ̂(A) itself, for pictures and for checks. `attend` does not form it.

        Args:
            scores: A, of shape (..., heads, N, N).

        Returns:
            σ̂(A), of the same shape; row k holds the weights of the N values for query k.
        """
        self._check_tokens(scores.shape[-1])
        with torch.autocast(scores.device.type, enabled=False):
            exact = at_least_float32(scores)
            activated = self._unit_sums(exact) @ self._scaled_projector(exact.dtype).transpose(-2, -1)
            if self.config.residual == "softmax":
                activated = activated + exact.softmax(dim=-1)
        return activated.to(scores.dtype)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        """σ̂(scale · Q Kᵀ + bias) V, in the place of torch's scaled_dot_product_attention.

        W is linear, so σ̂(A) V = Φ̂[A] (Wᵀ V): a product of (N, r) and (r, d), in which the N×N matrix σ̂(A) and its
        product with V never appear. Scores and phases are float32 under autocast, since m · A in bfloat16 is noise.

        Args:
            query, key, value: of shape (..., heads, N, d).
            bias: added to the scores, broadcastable to (..., heads, N, N). It must be finite.
            scale: of the scores; d^−½ unless given.

        Returns:
            A tensor of value's shape and dtype.
        """
        self._check_tokens(key.shape[-2])
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        with torch.autocast(query.device.type, enabled=False):
            exact = at_least_float32(value)
            scores = (at_least_float32(query) * scale) @ at_least_float32(key).transpose(-2, -1)
            if bias is not None:
                scores = scores + bias
            mixed_values = self._scaled_projector(exact.dtype).transpose(-2, -1) @ exact  # (..., heads, r, d)
            output = self._unit_sums(scores) @ mixed_values
            if self.config.residual == "softmax":
                output = output + scores.softmax(dim=-1) @ exact
        return output.to(value.dtype)

    def _unit_sums(self, scores: Tensor) -> Tensor:
        """Φ̂[A], of shape (..., heads, N, r), with its fixed factor."""
        # Scaling the coefficients, not the sums, touches the smaller tensor.
        sums = fourier_sum(scores, self.coefficients.to(scores.dtype) * self.series_scale)
        base_function = BASE_FUNCTIONS[self.config.base_function]
        if base_function is not None:
            sums = sums + base_function(scores).sum(dim=-1, keepdim=True) * self.series_scale
        return sums

    def _scaled_projector(self, dtype: torch.dtype) -> Tensor:
        return self.projector.to(dtype) * self.projector_scale

    def _check_tokens(self, num_tokens: int) -> None:
        if num_tokens != self.num_tokens:
            raise ValueError(
                f"This operator was made for N = {self.num_tokens} tokens and got {num_tokens}: it holds functions for "
                "each token, so N is fixed when it is made. Feed inputs of the size that the model was made for."
            )

    def extra_repr(self) -> str:
        return (
            f"{self.config.shorthand}, num_heads={self.num_heads}, num_tokens={self.num_tokens}, "
            f"rank={self.config.rank}, base_function={self.config.base_function}, residual={self.config.residual}, "
            f"init={self.config.init}"
        )


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in its own type if that is wider: phases m · A in a narrower one are noise."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
