"""The plain back end: PyTorch alone, for any family of functions, any device and any floating-point type.

Scores are formed row by row, as many at a time as fit a chunk, and again in the backward pass, so that memory grows
with N, not with N².
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..basis import Fourier
from ..bias import Bias

# Elements of a chunk. Larger chunks take memory, smaller ones read keys and coefficients more often.
_CHUNK_OF_THREAD = 2**22
_CHUNK_OF_CPU = 2**24  # at most, by all threads
_CHUNK_OF_GPU = 2**25


def fourier_sums(
    query: Tensor,
    key: Tensor,
    coefficients: Tensor,
    scale: float,
    bias: Bias | None = None,
    mask: Tensor | None = None,
    value: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See `backends.fourier_sums`."""
    basis = Fourier(coefficients.shape[2])
    rank = coefficients.shape[-1]

    def sums(scores: Tensor, mask: Tensor | None, coefficients: Tensor, value: Tensor | None) -> Tensor:
        units = basis.sums(scores, coefficients, mask)
        if value is None:
            return units
        return torch.cat([units, masked_softmax(scores, mask) @ value], dim=-1)

    shared = [coefficients, value]
    both = by_score_rows(sums, query, key, scale, bias, mask, shared, basis.elements_per_input(rank))
    return both if value is None else (both[..., :rank], both[..., rank:])


def project(units: Tensor, projector: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Φ̂[A] (Wᵀ V), or (Φ̂[A] Wᵀ ∘ mask) V, for Φ̂[A] of shape (..., heads, N, r) and W of shape (heads, M, r)."""
    if mask is None:
        return units @ (projector.mT @ value)

    def products(units: Tensor, mask: Tensor, projector: Tensor, value: Tensor) -> Tensor:
        return (units @ projector.mT * mask) @ value

    mask = _with_rows(mask, units)
    return by_rows(products, [units, mask], [projector, value], units[..., 0, 0].numel() * value.shape[-2])


def scores(query: Tensor, key: Tensor, scale: float, bias: Bias | None = None) -> Tensor:
    """scale · Q Kᵀ + bias, of shape (..., heads, N, M), in float32 or wider."""
    product = (at_least_float32(query) * scale) @ at_least_float32(key).mT
    return product if bias is None else bias.add_to(product)


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in its own type if that is wider: phases m · A in a narrower one are noise."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def masked_softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(dim=-1)


def softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Bias, mask: Tensor | None = None
) -> Tensor:
    """softmax(scale · Q Kᵀ + bias) V by torch's own kernels, in value's type, for the shapes of `fourier_sums`."""
    if bias.vertical is not None:
        query, key, scale = append_grid_terms(query, key, scale, bias)
    # torch's fused kernels take one type and, on the CPU, one width of all three.
    query, key = query.to(value.dtype), key.to(value.dtype)
    width = value.shape[-1]
    padded = F.pad(value, (0, query.shape[-1] - width)) if query.shape[-1] > width else value
    full = mask
    if bias.full is not None:
        full = bias.full.to(value.dtype)
        full = full if mask is None else torch.where(mask, full, -torch.inf)
    return F.scaled_dot_product_attention(query, key, padded, attn_mask=full, scale=scale)[..., :width]


def append_grid_terms(query: Tensor, key: Tensor, scale: float, bias: Bias) -> tuple[Tensor, Tensor, float]:
    """Query, key and scale of the same scores, with channels in place of a grid's terms.

    The query gets its terms; the key a 1 at its own row and its own column of the grid.
    """
    height, width = bias.vertical.shape[-1], bias.horizontal.shape[-1]
    rows = torch.eye(height, dtype=key.dtype, device=key.device).repeat_interleave(width, dim=0)  # (H · W, H)
    columns = torch.eye(width, dtype=key.dtype, device=key.device).repeat(height, 1)  # (H · W, W)
    places = torch.cat([rows, columns], dim=-1).expand(*key.shape[:-1], -1)
    query = torch.cat([at_least_float32(query) * scale, bias.vertical, bias.horizontal], dim=-1)
    return query, torch.cat([key, places], dim=-1), 1.0


def by_score_rows(
    function: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    scale: float,
    bias: Bias | None,
    mask: Tensor | None,
    shared: Sequence[Tensor | None],
    elements_per_score: int,
) -> Tensor:
    """`by_rows` for a function of scores, their mask and shared tensors; the scores are not kept."""

    def of_scores(query, full, vertical, horizontal, mask, key, *shared) -> Tensor:
        return function(scores(query, key, scale, Bias(full, vertical, horizontal)), mask, *shared)

    full, vertical, horizontal = bias or Bias()
    rowwise = [query, _with_rows(full, query), vertical, horizontal, _with_rows(mask, query)]
    return by_rows(of_scores, rowwise, [key, *shared], query[..., 0, 0].numel() * key.shape[-2] * elements_per_score)


def by_rows(
    function: Callable[..., Tensor],
    rowwise: Sequence[Tensor | None],
    shared: Sequence[Tensor | None],
    elements_per_row: int,
) -> Tensor:
    """Applies a function to chunks of rows; its intermediate results are computed again in the backward pass, not kept.

    Args:
        function: maps chunks of the rowwise tensors, (..., rows, *) each, and the shared tensors to a tensor
            (..., rows, *). Gradients go to these tensors and to no others.
        rowwise: tensors of shape (..., N, *), cut along N; the first is not None. Any other may be None, and is passed
            on as None.
        shared: tensors that each chunk gets whole, or None.
        elements_per_row: how many elements the function forms for one row, batch and heads included.

    Returns:
        The results, joined along N; differentiable once.
    """
    num_rows, device = rowwise[0].shape[-2], rowwise[0].device
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        return function(*rowwise, *shared)
    if torch.compiler.is_compiling():
        # torch.compile cannot trace the backward pass of _ByRows. It unrolls the chunks, which must therefore be few.
        rows = max(1, 2**23 // max(1, elements_per_row))
        chunks = (_cut(rowwise, slice(row, row + rows)) for row in range(0, num_rows, rows))
        return torch.cat([checkpoint(function, *chunk, *shared, use_reentrant=False) for chunk in chunks], dim=-2)
    chunk_size = _CHUNK_OF_GPU
    if device.type == "cpu":
        chunk_size = min(_CHUNK_OF_THREAD * torch.get_num_threads(), _CHUNK_OF_CPU)
    rows = max(1, chunk_size // max(1, elements_per_row))
    return _ByRows.apply(function, rows, len(rowwise), *rowwise, *shared)


class _ByRows(torch.autograd.Function):
    """One node for all chunks.

    With torch's checkpoint for each chunk, kept tensors lie between freed blocks and fragment the heap, so that the
    next chunk does not fit into them: memory would grow with N² after all.
    """

    @staticmethod
    def forward(ctx, function, rows: int, num_rowwise: int, *tensors: Tensor | None) -> Tensor:
        ctx.function, ctx.rows, ctx.num_rowwise = function, rows, num_rowwise
        ctx.save_for_backward(*tensors)
        rowwise, shared = tensors[:num_rowwise], tensors[num_rowwise:]
        num_rows = rowwise[0].shape[-2]
        output = None
        for row in range(0, num_rows, rows):
            chunk = slice(row, row + rows)
            result = function(*_cut(rowwise, chunk), *shared)
            if output is None:
                output = result.new_empty(*result.shape[:-2], num_rows, result.shape[-1])
            output[..., chunk, :] = result
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, output_gradient: Tensor) -> tuple[Tensor | None, ...]:
        rowwise, shared = ctx.saved_tensors[: ctx.num_rowwise], ctx.saved_tensors[ctx.num_rowwise :]
        needed = ctx.needs_input_grad[3:]
        gradients = [torch.zeros_like(x) if need else None for x, need in zip(ctx.saved_tensors, needed, strict=True)]
        for row in range(0, output_gradient.shape[-2], ctx.rows):
            chunk = slice(row, row + ctx.rows)
            inputs = [None if x is None else x.detach() for x in (*_cut(rowwise, chunk), *shared)]
            learning = [x.requires_grad_() for x, need in zip(inputs, needed, strict=True) if need]
            with torch.autocast(output_gradient.device.type, enabled=False):
                with torch.enable_grad():
                    result = ctx.function(*inputs)
                parts = torch.autograd.grad(result, learning, output_gradient[..., chunk, :], allow_unused=True)
            totals = [*_cut(gradients[: ctx.num_rowwise], chunk), *gradients[ctx.num_rowwise :]]
            for total, part in zip((x for x in totals if x is not None), parts, strict=True):
                if part is not None:
                    total += part
        return None, None, None, *gradients


def _cut(tensors: Sequence[Tensor | None], rows: slice) -> list[Tensor | None]:
    return [None if tensor is None else tensor[..., rows, :] for tensor in tensors]


def _with_rows(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    """A bias or mask with as many rows as `like`: it may have one row for all, or no dimension for rows."""
    if tensor is None:
        return None
    tensor = tensor[(None,) * (2 - tensor.ndim)]
    return tensor.expand(*tensor.shape[:-2], like.shape[-2], tensor.shape[-1])
