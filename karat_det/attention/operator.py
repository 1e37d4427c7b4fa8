"""The operator that stands in softmax's place: σ̂(A_k) = W Φ̂[A_k], with Φ̂_p[A_k] = Σ_q φ̂_pq(A_kq).

A = Q Kᵀ / √d are one head's attention scores, N×N, and A_k is row k. Φ̂ holds r×N learnable functions φ̂_pq, W projects
r values back to N. Equation 2 and section 4 of "Kolmogorov-Arnold attention", arXiv 2503.10632.

`activate` is that equation. `attend` is its product with the values, which needs no N×N matrix but the scores: W is
linear, so σ̂(A) V = Φ̂[A] (Wᵀ V), a product of (N, r) and (r, d).
"""

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .basis import BASE_FUNCTIONS, Basis, BSpline, Fourier, Rational, Wavelet
from .config import KArAtConfig
from .functional import Bias, by_rows, fourier_sums

try:
    from . import kernels
except ImportError:  # Triton comes with PyTorch's CUDA builds for Linux alone
    kernels = None


class KArAtOperator(nn.Module):
    """The learnable operators of all heads of a block, or of all blocks that share them.

    Args:
        num_heads: number of attention heads; each KArAt head has an operator of its own.
        num_tokens: N, the number of tokens that attend to each other. It is fixed: each column of the scores has its
            own functions.
        config: see KArAtConfig.

    Attributes:
        coefficients: of the functions, of shape (heads, *family, N, r), KArAt heads alone. For Fourier, family is
            (2, G): a then b, index (…, m − 1, q, p) is that of cos(m x) or sin(m x) in φ̂_pq. (…, r, N) for
            "project_before", (…, N, N) at full rank.
        projector: W, of shape (heads, N, r); None for "two_operators" and at full rank.
        outer_coefficients: of Φ̂₂ of "two_operators", of shape (heads, *family, r, N); else None.
        series_scale, projector_scale, outer_scale: the fixed factors of the three.

    Raises:
        ValueError: the rank is above the number of tokens, or there are more KArAt heads than heads.
    """

    def __init__(self, num_heads: int, num_tokens: int, config: KArAtConfig):
        super().__init__()
        if config.rank is not None and config.rank > num_tokens:
            raise ValueError(
                f"rank is {config.rank}, above the {num_tokens} tokens that attend to each other. "
                f"It must be from 1 to {num_tokens}."
            )
        if config.num_karat_heads is not None and config.num_karat_heads > num_heads:
            raise ValueError(
                f"num_karat_heads is {config.num_karat_heads}, above the number of heads, {num_heads}. "
                f"It must be from 1 to {num_heads}, or None for all."
            )
        self.num_heads = num_heads
        self.num_karat_heads = config.num_karat_heads or num_heads
        self.num_tokens = num_tokens
        self.config = config
        self.basis = make_basis(config)

        rank = config.rank or num_tokens
        inputs, units = (rank, num_tokens) if config.order == "project_before" else (num_tokens, rank)
        self.coefficients = self._parameter(*self.basis.family, inputs, units)
        has_projector = config.rank is not None and config.order != "two_operators"
        self.projector = self._parameter(num_tokens, rank) if has_projector else None
        has_outer = config.order == "two_operators"
        self.outer_coefficients = self._parameter(*self.basis.family, rank, num_tokens) if has_outer else None

        self.series_scale = self.projector_scale = self.outer_scale = 1.0
        if config.init == "scaled":
            self.series_scale = (inputs * self.basis.mean_square) ** -0.5
            if config.order == "project_before":
                self.series_scale /= num_tokens
                self.projector_scale = num_tokens**-0.5
            elif config.order == "two_operators":
                self.outer_scale = (rank * self.basis.mean_square) ** -0.5 / num_tokens
            elif config.rank is None:
                self.series_scale /= num_tokens
            else:
                self.projector_scale = 1 / num_tokens
        self.reset_parameters()

    def _parameter(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(self.num_karat_heads, *shape))

    def reset_parameters(self) -> None:
        """Draws coefficients and projector anew as `config.init` says."""
        self.basis.reset(self.coefficients)
        if self.outer_coefficients is not None:
            self.basis.reset(self.outer_coefficients)
        if self.projector is not None:
            num_inputs = self.num_tokens if self.config.order == "project_before" else self.config.rank
            bound = 1.0 if self.config.init == "scaled" else num_inputs**-0.5
            nn.init.uniform_(self.projector, -bound, bound)
        if self.config.residual == "softmax":
            if self.config.order == "project_after" and self.projector is not None:
                nn.init.zeros_(self.projector)
            else:
                last = self.coefficients if self.outer_coefficients is None else self.outer_coefficients
                with torch.no_grad():
                    last[:, self.basis.amplitudes] = 0

    def activate(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """The activated attention σ̂(A) itself.

        Args:
            scores: A, of shape (..., heads, N, N).
            mask: False where a query does not see a key, broadcastable to the scores. Such a score is in no sum, and
                its place in the result is 0. Each query must see a key.

        Returns:
            σ̂(A), of the same shape; row k holds the weights of the N values for query k.

        Raises:
            ValueError: the scores are of another number of heads or tokens than the operator.
        """
        self._check_size("scores", scores)
        self.check_tokens(scores.shape[-1])
        with torch.autocast(scores.device.type, enabled=False):
            exact = at_least_float32(scores)
            ours, rest = exact.split((self.num_karat_heads, self.num_heads - self.num_karat_heads), dim=-3)
            our_mask = _mask_of_heads(mask, slice(self.num_karat_heads))
            activated = self._activate(ours, our_mask)
            if self.config.residual == "softmax":
                activated = activated + _softmax(ours, our_mask)
            if self.config.projection == "simplex":
                activated = project_on_simplex(activated, our_mask)
            if rest.shape[-3]:
                rest = _softmax(rest, _mask_of_heads(mask, slice(self.num_karat_heads, None)))
                activated = torch.cat([activated, rest], dim=-3)
        return activated.to(scores.dtype)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | Bias | None = None,
        scale: float | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """σ̂(scale · Q Kᵀ + bias) V, in the place of torch's scaled_dot_product_attention.

        The N×N matrix σ̂(A) and its product with V do not appear, unless there is a mask or the simplex projection, and
        the scores are not kept for the backward pass. Scores and phases of KArAt heads are float32 under autocast,
        since m · A in bfloat16 is noise; what softmax does not take from these scores is computed in value's type.

        Args:
            query, key, value: of shape (..., heads, N, d).
            bias: added to the scores. A tensor is broadcastable to (..., heads, N, N); a Bias may have terms for the
                rows and columns of a grid of tokens, which never become a matrix N×N. Floats must be finite. A boolean
                tensor is a mask.
            scale: of the scores; d^−½ unless given.
            mask: False where a query does not see a key, broadcastable to (..., heads, N, N); see `activate`.

        Returns:
            A tensor of value's shape and dtype.

        Raises:
            ValueError: there are not N tokens or not the operator's number of heads in query, key and value, or not N
                tokens in the grid of a Bias.
        """
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            self._check_size(name, tensor)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        bias = bias if isinstance(bias, Bias) else Bias(bias)
        if bias.full is not None and bias.full.dtype == torch.bool:
            bias, mask = bias._replace(full=None), bias.full if mask is None else mask & bias.full
        sides = [0 if term is None else term.shape[-1] for term in (bias.vertical, bias.horizontal)]
        if any(sides) and math.prod(sides) != self.num_tokens:
            raise ValueError(
                f"The bias has vertical terms for {sides[0]} rows and horizontal ones for {sides[1]} columns. It must "
                f"have both, for a grid of rows · columns = {self.num_tokens} tokens."
            )
        with torch.autocast(query.device.type, enabled=False):
            if mask is not None or self.config.projection == "simplex":
                exact = at_least_float32(value)
                return (self.activate(_scores(query, key, bias, scale), mask) @ exact).to(value.dtype)
            if bias.full is not None:
                bias = bias._replace(full=bias.full[(None,) * (query.ndim - bias.full.ndim)])
            if bias.vertical is not None and self._has_kernel(query, query.shape[-1] + sum(sides)):
                query, key, bias, scale = _append_grid_terms(query, key, bias, scale)
            ours = slice(self.num_karat_heads)
            our_inputs = (x[..., ours, :, :] for x in (query, key, value))
            output = self._attend(*our_inputs, _of_heads(bias, ours), scale).to(value.dtype)
            if self.num_karat_heads < self.num_heads:
                rest = slice(self.num_karat_heads, None)
                softmax = (x[..., rest, :, :] for x in (query, key, value))
                output = torch.cat([output, _softmax_attend(*softmax, _of_heads(bias, rest), scale)], dim=-3)
        return output

    def _activate(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        """The learnable part of σ̂(A), for KArAt heads."""
        if self.config.order == "project_before":
            seen = scores if mask is None else scores * mask
            inputs = seen @ self._scaled(self.projector, self.projector_scale, scores)
            activated = self._sums_by_rows(inputs, self.coefficients, self.series_scale)
        else:
            activated = self._sums_by_rows(scores, self.coefficients, self.series_scale, mask)
            if self.projector is not None:
                activated = activated @ self._scaled(self.projector, self.projector_scale, scores).transpose(-2, -1)
            elif self.outer_coefficients is not None:
                activated = self._sums_by_rows(activated, self.outer_coefficients, self.outer_scale)
        return activated if mask is None else activated * mask

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Bias, scale: float) -> Tensor:
        """The product of σ̂(A) and the values for KArAt heads, reassociated so that no N×N matrix is kept."""
        exact = at_least_float32(value)
        softmax = None
        if self.config.order == "project_before":
            # W (Q Kᵀ) = Q (W K)ᵀ: the inputs of Φ̂ are scores of r mixed keys.
            projector = self._scaled(self.projector, self.projector_scale, exact)
            mixed_key = projector.transpose(-2, -1) @ at_least_float32(key)
            output = self._mixed_score_sums(query, mixed_key, _project(bias, projector), scale, exact)
        elif self.config.rank is None:
            output = self._mixed_score_sums(query, key, bias, scale, exact)
        else:
            units, softmax = self._score_sums(query, key, bias, scale, exact)
            if self.outer_coefficients is not None:
                output = self._mixed_sums_by_rows(units, self.outer_coefficients, self.outer_scale, exact)
            else:
                projector = self._scaled(self.projector, self.projector_scale, exact)
                output = units @ (projector.transpose(-2, -1) @ exact)
        if self.config.residual == "softmax":
            output = output + (_softmax_attend(query, key, value, bias, scale) if softmax is None else softmax)
        return output

    def _score_sums(
        self, query: Tensor, key: Tensor, bias: Bias, scale: float, value: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Φ̂[A], of shape (..., heads, N, r), without keeping A.

        For residual softmax also softmax(A) V, where it comes from the same scores; else None.
        """
        if self.config.basis != "fourier":
            return self._by_rows(self._series, query, key, bias, scale, self.coefficients), None
        if torch.jit.is_tracing():  # Tracers, such as those that count multiply-adds, see the plain form.
            scores = _scores(query, key, bias, scale)
            softmax = _softmax(scores, None) @ value if self.config.residual == "softmax" else None
            return self._series(scores, self.coefficients), softmax

        softmax = None
        # To a kernel the terms of a grid are channels. Where those would be too many, the terms are still there.
        if bias.vertical is None and self._has_kernel(query, query.shape[-1]):
            sums = kernels.fourier_score_sums(query, key, self.coefficients * self.series_scale, scale, bias.full)
        else:
            exact_query, exact_key = at_least_float32(query), at_least_float32(key)
            coefficients = self._scaled(self.coefficients, self.series_scale, exact_query)
            if self.config.residual == "softmax":
                sums, softmax = fourier_sums(exact_query, exact_key, coefficients, scale, bias, value)
            else:
                sums = fourier_sums(exact_query, exact_key, coefficients, scale, bias)
        if BASE_FUNCTIONS[self.config.base_function] is not None:
            base_sums = partial(self._base_sums, scale=self.series_scale)
            sums = sums + self._by_rows(base_sums, query, key, bias, scale)
        return sums, softmax

    def _has_kernel(self, query: Tensor, width: int) -> bool:
        """Whether a kernel sums the functions over scores of such a query, with so many channels."""
        config = self.config
        if kernels is None or not config.triton or config.basis != "fourier":
            return False
        if config.rank is None or config.order == "project_before":
            return False
        return kernels.can_run(query, width, config.grid_size, config.rank)

    def _series(self, scores: Tensor, coefficients: Tensor) -> Tensor:
        return self._sums(scores, None, coefficients, self.series_scale)

    def _mixed_score_sums(self, query: Tensor, key: Tensor, bias: Bias, scale: float, value: Tensor) -> Tensor:
        """Φ̂[A] V, where the units of Φ̂ are weights of the values, without keeping A."""
        coefficients = self._mixed(self.coefficients, self.series_scale, value)
        mixed_sums = partial(self._mixed_sums, scale=self.series_scale)
        return self._by_rows(mixed_sums, query, key, bias, scale, coefficients, value)

    def _by_rows(self, function, query: Tensor, key: Tensor, bias: Bias, scale: float, *shared: Tensor) -> Tensor:
        """Applies a function to chunks of rows of the scores, and to what they share."""

        def of_scores(query: Tensor, full, vertical, horizontal, key: Tensor, *shared: Tensor) -> Tensor:
            return function(_scores(query, key, Bias(full, vertical, horizontal), scale), *shared)

        if bias.full is not None:
            shape = *bias.full.shape[:-2], query.shape[-2], bias.full.shape[-1]
            bias = bias._replace(full=bias.full.expand(shape))
        scores_per_row = query[..., 0, 0].numel() * key.shape[-2]
        numbers_per_row = scores_per_row * self.basis.numbers_per_input(self.coefficients.shape[-1])
        return by_rows(of_scores, [query, *bias], [key, *shared], numbers_per_row)

    def _sums_by_rows(self, inputs: Tensor, coefficients: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
        mask = None if mask is None else mask.expand(inputs.shape)
        numbers_per_row = self._numbers_per_row(inputs, coefficients)
        return by_rows(partial(self._sums, scale=scale), [inputs, mask], [coefficients], numbers_per_row)

    def _mixed_sums_by_rows(self, inputs: Tensor, coefficients: Tensor, scale: float, value: Tensor) -> Tensor:
        shared = [self._mixed(coefficients, scale, value), value]
        numbers_per_row = self._numbers_per_row(inputs, coefficients)
        return by_rows(partial(self._mixed_sums, scale=scale), [inputs], shared, numbers_per_row)

    def _numbers_per_row(self, inputs: Tensor, coefficients: Tensor) -> int:
        return inputs[..., 0, :].numel() * self.basis.numbers_per_input(coefficients.shape[-1])

    def _sums(self, inputs: Tensor, mask: Tensor | None, coefficients: Tensor, scale: float) -> Tensor:
        """Φ[x] of one operator with its base function and its fixed factor: (..., rows, M) to (..., rows, P)."""
        if self.basis.linear:  # the coefficients are the smaller tensor
            sums = self.basis.sums(inputs, self._scaled(coefficients, scale, inputs), mask)
        else:
            sums = self.basis.sums(inputs, coefficients.to(inputs.dtype), mask) * scale
        return sums + self._base_sums(inputs, scale, mask)

    def _mixed_sums(self, inputs: Tensor, coefficients: Tensor, value: Tensor, scale: float) -> Tensor:
        """Φ[x] V for coefficients that `_mixed` made: (..., rows, M) and (..., P, d) to (..., rows, d)."""
        if not self.basis.linear:
            return self._sums(inputs, None, coefficients, scale) @ value
        sums = self.basis.sums(inputs, coefficients)
        return sums + self._base_sums(inputs, scale) * value.sum(dim=-2, keepdim=True)

    def _mixed(self, coefficients: Tensor, scale: float, value: Tensor) -> Tensor:
        """Coefficients of Φ[x] V. Mixing the units of a linear family is mixing their coefficients."""
        if not self.basis.linear:
            return coefficients

        def mixed(coefficients: Tensor, value: Tensor) -> Tensor:
            values = value[(..., *(None,) * len(self.basis.family), slice(None), slice(None))]
            return self._scaled(coefficients, scale, value) @ values

        # The product copies the coefficients for each of the batch.
        batch_size = value[..., 0, 0].numel() // self.num_karat_heads
        return by_rows(mixed, [coefficients], [value], batch_size * coefficients[..., 0, :].numel())

    def _base_sums(self, inputs: Tensor, scale: float, mask: Tensor | None = None) -> Tensor | float:
        """Σ_q b(x_q), of shape (..., rows, 1); the same for all units."""
        base_function = BASE_FUNCTIONS[self.config.base_function]
        if base_function is None:
            return 0.0
        values = base_function(inputs)
        return (values if mask is None else values * mask).sum(dim=-1, keepdim=True) * scale

    @staticmethod
    def _scaled(parameter: Tensor, factor: float, like: Tensor) -> Tensor:
        return parameter.to(like.dtype) * factor

    def check_tokens(self, num_tokens: int) -> None:
        """Raises ValueError if there are not as many tokens as this operator was made for."""
        if num_tokens != self.num_tokens:
            raise ValueError(
                f"This operator was made for N = {self.num_tokens} tokens and got {num_tokens}: it holds functions for "
                "each token, so N is fixed when it is made. Feed inputs of the size that the model was made for: in a "
                "ViTDet detector, images of MODEL.VIT.IMG_SIZE and IMG_WIDTH."
            )

    def _check_size(self, name: str, tensor: Tensor) -> None:
        if tensor.ndim < 3 or tensor.shape[-3] != self.num_heads:
            raise ValueError(
                f"{name} has the shape {tuple(tensor.shape)}. It must be (..., heads, N, size), with the "
                f"{self.num_heads} heads and N = {self.num_tokens} tokens that this operator was made for."
            )
        self.check_tokens(tensor.shape[-2])

    def extra_repr(self) -> str:
        config = self.config
        return (
            f"{config.shorthand}, basis={config.basis}, num_heads={self.num_heads}, "
            f"num_karat_heads={self.num_karat_heads}, num_tokens={self.num_tokens}, rank={config.rank}, "
            f"order={config.order}, base_function={config.base_function}, projection={config.projection}, "
            f"residual={config.residual}, init={config.init}"
        )


def make_basis(config: KArAtConfig) -> Basis:
    """The family of functions that a config names."""
    if config.basis == "fourier":
        return Fourier(config.grid_size)
    if config.basis == "bspline":
        return BSpline(config.grid_size, config.spline_order, config.spline_range)
    return Rational() if config.basis == "rational" else Wavelet(config.basis)


def project_on_simplex(rows: Tensor, mask: Tensor | None = None) -> Tensor:
    """The nearest point of the probability simplex to each row: x = max(y − λ, 0) with λ such that x sums to 1.

    Args:
        rows: y, of shape (..., N).
        mask: False where x is to be 0, broadcastable to the rows.

    Source: Algorithm 1 of the paper; Condat, "Fast projection onto the simplex and the l1 ball", 2016.
    """
    if mask is not None:
        rows = rows.masked_fill(~mask, -1e30)  # finite, for the sums below
    # x does not change if all of y is shifted; with its maximum at 0, sums are exact where it matters.
    rows = rows - rows.detach().amax(dim=-1, keepdim=True)
    downwards = rows.sort(dim=-1, descending=True).values
    excess = downwards.cumsum(dim=-1) - 1
    counts = torch.arange(1, rows.shape[-1] + 1, device=rows.device)
    support = (downwards * counts > excess).sum(dim=-1, keepdim=True)  # ρ, at least 1
    threshold = excess.gather(-1, support - 1) / support
    return (rows - threshold).clamp(min=0)


def _scores(query: Tensor, key: Tensor, bias: Bias, scale: float) -> Tensor:
    return bias.add_to((at_least_float32(query) * scale) @ at_least_float32(key).transpose(-2, -1))


def _project(bias: Bias, projector: Tensor) -> Bias:
    """The bias of the scores of r mixed keys, for a projector (heads, N, r)."""
    full = 0.0
    if bias.full is not None:
        full = at_least_float32(bias.full.expand(*bias.full.shape[:-1], projector.shape[-2])) @ projector
    if bias.vertical is not None:
        on_grid = projector.unflatten(-2, (bias.vertical.shape[-1], bias.horizontal.shape[-1]))  # (heads, H, W, r)
        full = full + bias.vertical @ on_grid.sum(dim=-2) + bias.horizontal @ on_grid.sum(dim=-3)
    return Bias(full if isinstance(full, Tensor) else None)


def _append_grid_terms(query: Tensor, key: Tensor, bias: Bias, scale: float) -> tuple[Tensor, Tensor, Bias, float]:
    """Query, key, bias and scale of the same scores, in which channels of query and key stand for a grid's terms.

    The query gets its terms; the key a 1 at its own row and its own column of the grid.
    """
    height, width = bias.vertical.shape[-1], bias.horizontal.shape[-1]
    query, key = at_least_float32(query) * scale, at_least_float32(key)
    rows = torch.eye(height, dtype=key.dtype, device=key.device).repeat_interleave(width, dim=0)  # (H · W, H)
    columns = torch.eye(width, dtype=key.dtype, device=key.device).repeat(height, 1)  # (H · W, W)
    places = torch.cat([rows, columns], dim=-1).expand(*key.shape[:-1], -1)
    query, key = torch.cat([query, bias.vertical, bias.horizontal], dim=-1), torch.cat([key, places], dim=-1)
    return query, key, Bias(bias.full), 1.0


def _softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(dim=-1)


def _softmax_attend(query: Tensor, key: Tensor, value: Tensor, bias: Bias, scale: float) -> Tensor:
    if bias.vertical is not None:
        query, key, bias, scale = _append_grid_terms(query, key, bias, scale)
    # torch's fused kernels want one type and, on the CPU, one width of all three.
    query, key = query.to(value.dtype), key.to(value.dtype)
    width = value.shape[-1]
    padded = F.pad(value, (0, query.shape[-1] - width)) if query.shape[-1] > width else value
    full = None if bias.full is None else bias.full.to(value.dtype)
    return F.scaled_dot_product_attention(query, key, padded, attn_mask=full, scale=scale)[..., :width]


def _of_heads(bias: Bias, heads: slice) -> Bias:
    """What of a bias belongs to some heads."""
    return Bias(*(_mask_of_heads(term, heads) for term in bias))


def _mask_of_heads(tensor: Tensor | None, heads: slice) -> Tensor | None:
    """What of a mask or a term of a bias, broadcastable to (..., heads, N, *), belongs to some heads."""
    if tensor is None or tensor.ndim < 3 or tensor.shape[-3] == 1:
        return tensor
    return tensor[..., heads, :, :]


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in its own type if that is wider: phases m · A in a narrower one are noise."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
