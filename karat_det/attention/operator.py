"""The operator in softmax's place: σ̂(A_k) = W Φ̂[A_k], with Φ̂_p[A_k] = Σ_q φ̂_pq(A_kq).

A = Q Kᵀ / √d are one head's attention scores, N×N, and A_k is row k. Φ̂ is a layer of r×N learnable functions φ̂_pq; W
projects its r units back to N. Equation 2 and section 4 of "Kolmogorov-Arnold attention", arXiv 2503.10632.

`activate` is that equation. `attend` is its product with the values, and needs no N×N matrix: W is linear, so
σ̂(A) V = Φ̂[A] (Wᵀ V), a product of (N, r) and (r, d). `backends` sums the functions over scores that are not kept.

To try another σ̂, change this file:

- `_activate` is what a head does to its scores, and `_attend` is the same times V. test_operator.py compares the two.
- `FunctionLayer.sums` and `_sums` are Φ̂ of given scores, some queries at a time. Functions that depend on the query
  have coefficients with a dimension for it, which `by_rows` cuts with the scores.
- The back ends serve functions that all queries share. For others, `_attend` starts as
  `self._activate(plain.scores(query, key, scale, bias), mask) @ value`.
"""

import math

import torch
from torch import Tensor, nn

from . import backends
from .backends import plain
from .backends.plain import at_least_float32
from .basis import BASE_FUNCTIONS, Basis, BSpline, Fourier, Rational, Wavelet
from .bias import Bias, check_broadcast, of_heads, split_mask
from .config import KArAtConfig


class FunctionLayer(nn.Module):
    """A layer of learnable functions: Φ_p[x] = s Σ_q (φ_pq(x_q) + b(x_q)), from M inputs x to P units, for each head.

    Args:
        num_heads: number of heads, each with functions of its own.
        num_inputs: M.
        num_units: P.
        config: its basis, grid_size, spline_order and spline_range make the functions, and its base_function is b.

    Attributes:
        coefficients: of the functions, of shape (heads, *family, M, P), not initialised: see `reset_parameters`.
        basis: the family of the functions.
        series_scale: s, a fixed factor: 1 / √(M · mean square of φ), so that units start at unit variance; 1 with init
            "paper".
    """

    def __init__(self, num_heads: int, num_inputs: int, num_units: int, config: KArAtConfig):
        super().__init__()
        self.basis = make_basis(config)
        self.base_function = BASE_FUNCTIONS[config.base_function]
        self.coefficients = nn.Parameter(torch.empty(num_heads, *self.basis.family, num_inputs, num_units))
        self.series_scale = 1.0 if config.init == "paper" else (num_inputs * self.basis.mean_square) ** -0.5

    def reset_parameters(self) -> None:
        """Draws the coefficients anew."""
        self.basis.reset(self.coefficients)

    def sums(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Φ[x].

        Args:
            inputs: x, of shape (..., heads, rows, M).
            mask: False where an input is in no sum, broadcastable to the inputs.

        Returns:
            A tensor of shape (..., heads, rows, P).
        """
        mask = None if mask is None else mask.expand(inputs.shape)
        return plain.by_rows(self._sums, [inputs, mask], [self.coefficients], self._elements(inputs))

    def score_sums(
        self,
        query: Tensor,
        key: Tensor,
        scale: float,
        bias: Bias,
        mask: Tensor | None = None,
        value: Tensor | None = None,
        with_triton: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Φ[A] for the scores A = scale · Q Kᵀ + bias, which are not kept.

        Args: those of `backends.fourier_sums`, without coefficients, and
            with_triton: whether Triton may sum a Fourier series on CUDA.

        Returns:
            A tensor of shape (..., heads, N, P), and with a value softmax(A) V, else None.
        """
        if not isinstance(self.basis, Fourier):
            units = self._by_scores(self._sums, query, key, scale, bias, mask, [self.coefficients])
            softmax = None if value is None else plain.softmax_attention(query, key, value, scale, bias, mask)
            return units, softmax
        coefficients = _scaled(self.coefficients, self.series_scale, at_least_float32(query))
        backend = backends.choose(query, key, coefficients, bias, mask, value, with_triton)
        units = backend.fourier_sums(query, key, coefficients, scale, bias, mask, value)
        units, softmax = (units, None) if value is None else units
        if self.base_function is not None:
            units = units + self._by_scores(self._base_sums, query, key, scale, bias, mask)
        return units, softmax

    def products(self, inputs: Tensor, value: Tensor) -> Tensor:
        """Φ[x] V, the sum of P values V, (..., heads, P, d), weighted by the units: of shape (..., heads, rows, d)."""
        shared = [self._mixed(value), value]
        return plain.by_rows(self._products, [inputs, None], shared, self._elements(inputs))

    def score_products(self, query: Tensor, key: Tensor, scale: float, bias: Bias, value: Tensor) -> Tensor:
        """Φ[A] V, without keeping A."""
        return self._by_scores(self._products, query, key, scale, bias, None, [self._mixed(value), value])

    def _sums(self, inputs: Tensor, mask: Tensor | None, coefficients: Tensor) -> Tensor:
        if self.basis.linear:  # the coefficients are the smaller tensor
            sums = self.basis.sums(inputs, _scaled(coefficients, self.series_scale, inputs), mask)
        else:
            sums = self.basis.sums(inputs, coefficients.to(inputs.dtype), mask) * self.series_scale
        return sums + self._base_sums(inputs, mask)

    def _base_sums(self, inputs: Tensor, mask: Tensor | None) -> Tensor | float:
        """s Σ_q b(x_q), of shape (..., rows, 1): the same for all units."""
        if self.base_function is None:
            return 0.0
        values = self.base_function(inputs)
        return (values if mask is None else values * mask).sum(dim=-1, keepdim=True) * self.series_scale

    def _products(self, inputs: Tensor, mask: None, coefficients: Tensor, value: Tensor) -> Tensor:
        """Φ[x] V for coefficients that `_mixed` made."""
        if not self.basis.linear:
            return self._sums(inputs, None, coefficients) @ value
        return self.basis.sums(inputs, coefficients) + self._base_sums(inputs, None) * value.sum(dim=-2, keepdim=True)

    def _mixed(self, value: Tensor) -> Tensor:
        """Coefficients of Φ[x] V. Mixing the units of a linear family is mixing their coefficients."""
        if not self.basis.linear:
            return self.coefficients

        def mixed(coefficients: Tensor, value: Tensor) -> Tensor:
            values = value[(..., *(None,) * len(self.basis.family), slice(None), slice(None))]
            return _scaled(coefficients, self.series_scale, value) @ values

        # The product copies the coefficients for each of the batch.
        batch_size = value[..., 0, 0].numel() // len(self.coefficients)
        return plain.by_rows(mixed, [self.coefficients], [value], batch_size * self.coefficients[..., 0, :].numel())

    def _by_scores(self, function, query: Tensor, key: Tensor, scale: float, bias: Bias, mask, shared=()) -> Tensor:
        elements = self.basis.elements_per_input(self.coefficients.shape[-1])
        return plain.by_score_rows(function, query, key, scale, bias, mask, shared, elements)

    def _elements(self, inputs: Tensor) -> int:
        return inputs[..., 0, :].numel() * self.basis.elements_per_input(self.coefficients.shape[-1])


_NO_BIAS = Bias()


class KArAtOperator(FunctionLayer):
    """The learnable operators of all heads of a block, or of all blocks that share them.

    It is its own layer of functions, Φ̂; W or a second layer, Φ̂₂, follows, or W comes first.

    Args:
        num_heads: number of attention heads; each KArAt head has an operator of its own.
        num_tokens: N, the number of tokens that attend to each other. It is fixed: each column of the scores has its
            own functions.
        config: see KArAtConfig.

    Attributes:
        coefficients: of Φ̂, of shape (heads, *family, N, r), KArAt heads alone. For Fourier, family is (2, G): a then b,
            index (…, m − 1, q, p) is that of cos(m x) or sin(m x) in φ̂_pq. (…, r, N) for "project_before", (…, N, N)
            at full rank.
        projector: W, of shape (heads, N, r); None for "two_operators" and at full rank.
        projector_scale: the fixed factor of W.
        outer: Φ̂₂ of "two_operators", with coefficients (heads, *family, r, N), in state dicts `outer_coefficients`;
            else None.

    Raises:
        ValueError: the rank is above the number of tokens, or there are more KArAt heads than heads.
    """

    def __init__(self, num_heads: int, num_tokens: int, config: KArAtConfig):
        if config.rank is not None and config.rank > num_tokens:
            raise ValueError(
                f"rank is {config.rank}, above N = {num_tokens}, the number of tokens that attend to each other. "
                f"It must be from 1 to {num_tokens}."
            )
        if config.num_karat_heads is not None and config.num_karat_heads > num_heads:
            raise ValueError(
                f"num_karat_heads is {config.num_karat_heads}, above the number of heads, {num_heads}. "
                f"It must be from 1 to {num_heads}, or None for all."
            )
        num_karat_heads, rank = config.num_karat_heads or num_heads, config.rank or num_tokens
        inputs, units = (rank, num_tokens) if config.order == "project_before" else (num_tokens, rank)
        super().__init__(num_karat_heads, inputs, units, config)
        self.num_heads = num_heads
        self.num_karat_heads = num_karat_heads
        self.num_tokens = num_tokens
        self._size = (num_heads, num_tokens)
        self.config = config

        self.projector = self.outer = None
        self.projector_scale = 1.0
        if config.order == "two_operators":
            self.outer = FunctionLayer(num_karat_heads, rank, num_tokens, config)
        elif config.rank is not None:
            self.projector = nn.Parameter(torch.empty(num_karat_heads, num_tokens, rank))
        if config.init == "scaled":
            # The last of them brings σ̂ to the scale of 1/N.
            if config.order == "project_before":
                self.projector_scale = num_tokens**-0.5
                self.series_scale /= num_tokens
            elif self.outer is not None:
                self.outer.series_scale /= num_tokens
            elif self.projector is not None:
                self.projector_scale = 1 / num_tokens
            else:
                self.series_scale /= num_tokens
        self.register_state_dict_post_hook(_name_outer_coefficients)
        self.register_load_state_dict_pre_hook(_find_outer_coefficients)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws coefficients and projector anew as `config.init` says."""
        super().reset_parameters()
        if self.outer is not None:
            self.outer.reset_parameters()
        if self.projector is not None:
            num_inputs = self.num_tokens if self.config.order == "project_before" else self.config.rank
            bound = 1.0 if self.config.init == "scaled" else num_inputs**-0.5
            nn.init.uniform_(self.projector, -bound, bound)
        if self.config.residual == "softmax":
            if self.config.order == "project_after" and self.projector is not None:
                nn.init.zeros_(self.projector)
            else:
                last = self if self.outer is None else self.outer
                with torch.no_grad():
                    last.coefficients[:, last.basis.amplitudes] = 0

    @property
    def outer_coefficients(self) -> nn.Parameter | None:
        return None if self.outer is None else self.outer.coefficients

    def fixed_factors(self) -> dict[str, float]:
        """The fixed factor of each tensor, by its name in the state dict."""
        factors = {"coefficients": self.series_scale}
        if self.projector is not None:
            factors["projector"] = self.projector_scale
        if self.outer is not None:
            factors["outer_coefficients"] = self.outer.series_scale
        return factors

    def activate(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        """The activated attention σ̂(A) itself.

        Args:
            scores: A, of shape (..., heads, N, N).
            mask: boolean, False where a query does not see a key, broadcastable to the scores. Such a score is in no
                sum, and its place in the result is 0. Each query must see a key.

        Returns:
            σ̂(A), of the same shape; row k holds the weights of the N values for query k.

        Raises:
            ValueError: the scores are of another number of heads or tokens than the operator, or the mask is of a shape
                that does not fit them.
        """
        self._check_size("scores", scores)
        self.check_tokens(scores.shape[-1])
        if mask is not None:
            check_broadcast("mask", mask, scores.shape)
        ours, rest = slice(self.num_karat_heads), slice(self.num_karat_heads, None)
        with torch.autocast(scores.device.type, enabled=False):
            exact = at_least_float32(scores)
            activated = self._activate(exact[..., ours, :, :], of_heads(mask, ours))
            if self.num_karat_heads < self.num_heads:
                softmax = plain.masked_softmax(exact[..., rest, :, :], of_heads(mask, rest))
                activated = torch.cat([activated, softmax], dim=-3)
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

        The scores are not kept for the backward pass, and the N×N matrix σ̂(A) does not appear. It does with the simplex
        projection, and with a mask unless W is last. Scores and phases of KArAt heads are float32 under autocast, since
        m · A in bfloat16 is noise; softmax's heads are computed in value's type.

        Args:
            query, key, value: of shape (..., heads, N, d).
            bias: added to the scores. A tensor is broadcastable to (..., heads, N, N), and a mask too: a query does not
                see a key where it is −∞, or False. A Bias, whose terms must be finite, may have terms for the rows and
                columns of a grid of tokens, which never become a matrix N×N.
            scale: of the scores; d^−½ unless given.
            mask: boolean, False where a query does not see a key, broadcastable to (..., heads, N, N). Each query must
                see a key.

        Returns:
            A tensor of value's shape and dtype.

        Raises:
            ValueError: query, key and value differ in shape, value's last size excepted, or are not of the operator's
                number of heads and N tokens; or a bias or mask is of a shape that does not fit.
        """
        if torch.is_autocast_enabled(query.device.type):
            with torch.autocast(query.device.type, enabled=False):
                return self.attend(query, key, value, bias, scale, mask)
        if not (self._size == query.shape[-3:-1] and query.shape == key.shape and query.shape[:-1] == value.shape[:-1]):
            self._refuse(query, key, value)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        if bias is None and mask is None:
            bias = _NO_BIAS
        else:
            bias, mask = self._check_bias(bias, mask, query.shape[:-3])
        if self.num_karat_heads == self.num_heads:
            return self._attend(query, key, value, scale, bias, mask)
        results = []
        for attend, heads in (
            (self._attend, slice(self.num_karat_heads)),
            (plain.softmax_attention, slice(self.num_karat_heads, None)),
        ):
            inputs = (x[..., heads, :, :] for x in (query, key, value))
            results.append(attend(*inputs, scale, bias.of_heads(heads), of_heads(mask, heads)))
        return torch.cat(results, dim=-3)

    def _activate(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        """σ̂(A) of KArAt heads."""
        if self.config.order == "project_before":  # Φ̂(W A)
            seen = scores if mask is None else scores * mask
            activated = self.sums(seen @ self._projector(scores))
        elif self.outer is not None:  # Φ̂₂(Φ̂₁(A))
            activated = self.outer.sums(self.sums(scores, mask))
        elif self.projector is None:  # Φ̂(A)
            activated = self.sums(scores, mask)
        else:  # W Φ̂(A)
            activated = self.sums(scores, mask) @ self._projector(scores).mT
        if mask is not None:
            activated = activated * mask
        if self.config.residual == "softmax":
            activated = activated + plain.masked_softmax(scores, mask)
        if self.config.projection == "simplex":
            activated = project_on_simplex(activated, mask)
        return activated

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Bias, mask) -> Tensor:
        """σ̂(A) V of KArAt heads, by the equations of `_activate`, reassociated so that no N×N matrix is kept."""
        if self.config.order == "project_after" and self.projector is not None and self.config.projection == "none":
            return self._project_after(query, key, value, scale, bias, mask)
        exact_query, exact_key, exact = (at_least_float32(x) for x in (query, key, value))
        if mask is not None or self.config.projection != "none":
            scores = plain.scores(exact_query, exact_key, scale, bias)
            return (self._activate(scores, mask) @ exact).to(value.dtype)

        if self.config.order == "project_before":
            # W (Q Kᵀ) = Q (W K)ᵀ: the inputs of Φ̂ are scores of r mixed keys.
            projector = self._projector(exact)
            mixed_key, mixed_bias = projector.mT @ exact_key, _project_bias(bias, projector)
            output = self.score_products(exact_query, mixed_key, scale, mixed_bias, exact)
        elif self.outer is not None:
            units, _ = self.score_sums(exact_query, exact_key, scale, bias, with_triton=self.config.triton)
            output = self.outer.products(units, exact)
        else:
            output = self.score_products(exact_query, exact_key, scale, bias, exact)
        if self.config.residual == "softmax":
            output = output + plain.softmax_attention(query, key, value, scale, bias)
        return output.to(value.dtype)

    def _project_after(self, query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Bias, mask) -> Tensor:
        """Φ̂[A] (Wᵀ V), and with the residual softmax(A) V from the same scores."""
        exact = at_least_float32(value)
        if not query.is_cuda:  # Triton's kernels make float32 scores of narrower factors
            query, key = at_least_float32(query), at_least_float32(key)
        residual, with_triton = self.config.residual == "softmax", self.config.triton
        if isinstance(self.basis, Fourier) and self.base_function is None:
            coefficients, projector = (x.to(exact.dtype) for x in (self.coefficients, self.projector))
            factor = self.series_scale * self.projector_scale  # both layers are linear in it
            output = backends.attend(
                query, key, exact, coefficients, projector, factor, scale, bias, mask, residual, with_triton
            )
            return output.to(value.dtype)
        units, softmax = self.score_sums(query, key, scale, bias, mask, exact if residual else None, with_triton)
        output = plain.project(units, self._projector(exact), exact, mask)
        return (output + softmax if residual else output).to(value.dtype)

    def _projector(self, like: Tensor) -> Tensor:
        return _scaled(self.projector, self.projector_scale, like)

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

    def _refuse(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            self._check_size(name, tensor)
        raise ValueError(
            f"query has the shape {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)}. They "
            "must be the same, except for value's last size."
        )

    def _check_bias(
        self, bias: Tensor | Bias | None, mask: Tensor | None, batch: torch.Size
    ) -> tuple[Bias, Tensor | None]:
        """The finite Bias, with all dimensions, and the boolean mask, after a look at their shapes."""
        if mask is not None and mask.dtype != torch.bool:
            raise ValueError(
                f"mask is of {mask.dtype}. It must be boolean, False where a query does not see a key. Floats that are "
                "added to the scores, −∞ where it does not, are a bias."
            )
        is_finite = isinstance(bias, Bias)
        bias = bias if is_finite else Bias(bias)
        scores = (*batch, self.num_heads, self.num_tokens, self.num_tokens)
        for name, tensor in (("bias", bias.full), ("mask", mask)):
            if tensor is not None:
                check_broadcast(name, tensor, scores)
        sides = [0 if term is None else term.shape[-1] for term in bias[1:]]
        if any(sides) and math.prod(sides) != self.num_tokens:
            raise ValueError(
                f"The bias has vertical terms for {sides[0]} rows and horizontal ones for {sides[1]} columns. It must "
                f"have both, for a grid of rows · columns = {self.num_tokens} tokens."
            )
        terms = []
        for name, term, side in zip(("vertical", "horizontal"), bias[1:], sides, strict=True):
            if term is not None:
                check_broadcast(name, term, (*scores[:-1], side))
                term = term.expand(*scores[:-1], side)
            terms.append(term)
        full = bias.full
        if full is not None and not (is_finite and full.is_floating_point()):
            full, mask = split_mask(full, mask)
        if full is not None:
            full = full[(None,) * (len(batch) + 3 - full.ndim)]
        return Bias(full, *terms), mask

    def extra_repr(self) -> str:
        config = self.config
        return (
            f"grid_size={config.grid_size}, basis={config.basis}, num_heads={self.num_heads}, "
            f"num_karat_heads={self.num_karat_heads}, num_tokens={self.num_tokens}, rank={config.rank}, "
            f"order={config.order}, base_function={config.base_function}, projection={config.projection}, "
            f"residual={config.residual}, init={config.init}"
        )


# Checkpoints have the second layer's coefficients as the operator's own.
def _name_outer_coefficients(operator: KArAtOperator, state: dict, prefix: str, metadata: dict) -> None:
    if operator.outer is not None:
        state[f"{prefix}outer_coefficients"] = state.pop(f"{prefix}outer.coefficients")


def _find_outer_coefficients(operator: KArAtOperator, state: dict, prefix: str, *others) -> None:
    if f"{prefix}outer_coefficients" in state:
        state[f"{prefix}outer.coefficients"] = state.pop(f"{prefix}outer_coefficients")


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


def _project_bias(bias: Bias, projector: Tensor) -> Bias:
    """The bias of the scores of r mixed keys, for a projector (heads, N, r)."""
    full = 0.0
    if bias.full is not None:
        full = at_least_float32(bias.full.expand(*bias.full.shape[:-1], projector.shape[-2])) @ projector
    if bias.vertical is not None:
        on_grid = projector.unflatten(-2, (bias.vertical.shape[-1], bias.horizontal.shape[-1]))  # (heads, H, W, r)
        full = full + bias.vertical @ on_grid.sum(dim=-2) + bias.horizontal @ on_grid.sum(dim=-3)
    return Bias(full if isinstance(full, Tensor) else None)


def _scaled(parameter: Tensor, factor: float, like: Tensor) -> Tensor:
    return parameter.to(like.dtype) * factor
