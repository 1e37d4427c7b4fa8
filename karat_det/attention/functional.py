"""Sums of learnable functions over rows of attention scores, without keeping the scores.

Of `fourier_sums` autograd keeps query, key, bias and coefficients: the scores, their sines and their cosines are formed
again in the backward pass. Both passes work in chunks that fit the processor's cache, so that memory grows with N, not
with N². Residual softmax comes from the same chunks. `by_rows` does as much for any other function of rows.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


class Bias(NamedTuple):
    """What is added to the scores of N queries and M keys: the sum of the terms that are not None.

    The last two are for keys on a grid of H · W = M places, and come together: a query has a term for each row and one
    for each column of the grid, and a key gets those of its own. Decomposed relative positions are of this kind
    (section 4 of MViTv2, arXiv 2112.01526).

    Args:
        full: broadcastable to (..., heads, N, M).
        vertical: of shape (..., heads, N, H).
        horizontal: of shape (..., heads, N, W).
    """

    full: Tensor | None = None
    vertical: Tensor | None = None
    horizontal: Tensor | None = None

    def add_to(self, scores: Tensor) -> Tensor:
        """The scores, (..., heads, N, M), with the terms."""
        if self.full is not None:
            scores = scores + self.full
        if self.vertical is not None:
            grid = self.vertical.shape[-1], self.horizontal.shape[-1]
            on_grid = scores.unflatten(-1, grid) + self.vertical.unsqueeze(-1) + self.horizontal.unsqueeze(-2)
            scores = on_grid.flatten(-2)
        return scores


def fourier_sums(
    query: Tensor,
    key: Tensor,
    coefficients: Tensor,
    scale: float,
    bias: Tensor | Bias | None = None,
    value: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Φ̂_p[A_k] = Σ_q Σ_m a_pqm cos(m A_kq) + b_pqm sin(m A_kq), for the scores A = scale · Q Kᵀ + bias.

    Args:
        query: of shape (..., heads, N, d).
        key: of shape (..., heads, M, d).
        coefficients: a then b, of shape (heads, 2, G, M, r), at index (head, a or b, m − 1, q, p).
        scale: of the product of query and key.
        bias: added to the scores; a tensor is a full one. It must be finite.
        value: V, of shape (..., heads, M, v). With it, softmax(A) V comes from the same scores.

    Returns:
        A tensor of shape (..., heads, N, r); with a value, it and softmax(A) V, of shape (..., heads, N, v). Both are
        differentiable once.

    Source: section 3 of the paper, arXiv 2503.10632.
    """
    batch_shape = query.shape[:-3]
    full, vertical, horizontal = bias if isinstance(bias, Bias) else Bias(bias)
    if full is not None:
        full = full[(None,) * (query.ndim - full.ndim)]
        if math.prod(full.shape[:-3]) > 1:
            full = full.expand(*batch_shape, *full.shape[-3:])
    # Of shape (B, heads, N or M, *); of a full bias each dimension is whole or 1.
    query, key, full, vertical, horizontal, value = (
        None if x is None else x.reshape(-1, *x.shape[-3:]) for x in (query, key, full, vertical, horizontal, value)
    )
    sums, attended = _FourierSums.apply(query, key, coefficients, scale, full, vertical, horizontal, value)
    sums = sums.reshape(*batch_shape, *sums.shape[1:])
    return sums if value is None else (sums, attended.reshape(*batch_shape, *attended.shape[1:]))


def by_rows(
    function: Callable[..., Tensor], rowwise: list[Tensor | None], shared: list[Tensor | None], numbers_per_row: int
) -> Tensor:
    """Applies a function to chunks of rows; what it does inside is done again in the backward pass and not kept.

    Args:
        function: maps chunks of the rowwise tensors, (..., rows, *) each, and the shared tensors to a tensor
            (..., rows, *). It gets a None where there is one. Gradients go to these tensors and to no others.
        rowwise: tensors of shape (..., N, *), cut along N; the first is not None.
        shared: tensors that each chunk gets whole.
        numbers_per_row: how many numbers the function forms for one row, batch and heads included.

    Returns:
        The results, joined along N; differentiable once.
    """
    if torch.jit.is_tracing():
        return function(*rowwise, *shared)
    if torch.compiler.is_compiling():
        # torch.compile cannot look into the backward pass of _ByRows. It unrolls the chunks: so let them be few.
        rows = max(1, 2**23 // max(1, numbers_per_row))
        chunks = (_cut(rowwise, slice(row, row + rows)) for row in range(0, rowwise[0].shape[-2], rows))
        return torch.cat([checkpoint(function, *chunk, *shared, use_reentrant=False) for chunk in chunks], dim=-2)
    # Larger chunks than in fourier_sums: each adds to the gradients of all that is shared.
    rows = max(1, _chunk_size(rowwise[0].device, per_thread=2**20) // max(1, numbers_per_row))
    return _ByRows.apply(function, rows, len(rowwise), *rowwise, *shared)


class _ByRows(torch.autograd.Function):
    """One node for all chunks. With torch's checkpoint for each, what every chunk leaves behind lies scattered between
    the blocks that it has freed, and so fragments the heap that the next chunk does not fit: memory grew with N² after
    all."""

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


class _FourierSums(torch.autograd.Function):
    """The sums and, with a value, else empty, softmax(A) V; arguments are those of _fourier_sums."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, coefficients: Tensor, scale: float, *others: Tensor | None):
        run = _fourier_sums_operator if torch.compiler.is_compiling() else _fourier_sums
        sums, attended, log_totals = run(query, key, coefficients, scale, *others)
        ctx.scale = scale
        ctx.save_for_backward(query, key, coefficients, *others, attended, log_totals)
        return sums, attended

    @staticmethod
    @once_differentiable
    def backward(ctx, sums_gradient: Tensor, attended_gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, coefficients, *others = ctx.saved_tensors
        with_full = ctx.needs_input_grad[4]
        run = _fourier_sums_backward_operator if torch.compiler.is_compiling() else _fourier_sums_backward
        gradients = run(sums_gradient, attended_gradient, query, key, coefficients, ctx.scale, *others, with_full)
        gradients = (*gradients[:3], None, *gradients[3:])
        return tuple(x if need else None for x, need in zip(gradients, ctx.needs_input_grad, strict=True))


def _fourier_sums(
    query: Tensor,
    key: Tensor,
    coefficients: Tensor,
    scale: float,
    full: Tensor | None,
    vertical: Tensor | None,
    horizontal: Tensor | None,
    value: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sums, and with a value softmax(A) V and log Σ_q exp A_kq, of shape (B, heads, N); else these are empty."""
    bias = Bias(full, vertical, horizontal)
    # Heads come first here and below, since they have coefficients of their own. Scores and what is made of them have
    # the queries last: products with few units are then faster, and so is adding to the scores of a key.
    query, key = query.transpose(0, 1), key.transpose(0, 1)
    weights = _weights(coefficients)
    sums = query.new_empty(*query.shape[:2], weights.shape[3], query.shape[2])
    attended, log_totals = query.new_empty(0, 0), query.new_empty(0, 0)
    if value is not None:
        value = value.transpose(0, 1)
        attended = query.new_empty(*query.shape[:3], value.shape[-1])
        log_totals = query.new_empty(query.shape[:3])

    def work(chunks: _Chunks) -> None:
        for chunk in chunks:
            heads, items, rows = chunk
            scores = chunks.scores(query[chunk].flatten(0, 1), key[heads, items].flatten(0, 1), scale, bias, chunk)
            if value is not None:
                highest = scores.amax(dim=1, keepdim=True)
                exponentials = torch.sub(scores, highest, out=chunks.memory(3, scores.shape)).exp_()
                totals = exponentials.sum(dim=1, keepdim=True)
                chunk_attended = attended[chunk].flatten(0, 1)
                _add_product(chunk_attended, exponentials.mT, value[heads, items].flatten(0, 1), keep=False)
                chunk_attended /= totals.mT
                log_totals[chunk] = (totals.log_() + highest).view(log_totals[chunk].shape)
            cosine_weights, sine_weights = chunks.weights(weights, chunk)  # (G, heads · items, r, M)
            chunk_sums = sums[heads, items, :, rows].flatten(0, 1)
            for m, sign, cosines, sines in chunks.harmonics(scores, len(cosine_weights)):
                _add_product(chunk_sums, cosine_weights[m - 1], cosines, sign, keep=m > 1)
                _add_product(chunk_sums, sine_weights[m - 1], sines, sign)

    _share_heads(work, query, key)
    return sums.transpose(0, 1).mT, attended.transpose(0, 1), log_totals.transpose(0, 1)


def _fourier_sums_backward(
    sums_gradient: Tensor,
    attended_gradient: Tensor,
    query: Tensor,
    key: Tensor,
    coefficients: Tensor,
    scale: float,
    full: Tensor | None,
    vertical: Tensor | None,
    horizontal: Tensor | None,
    value: Tensor | None,
    attended: Tensor,
    log_totals: Tensor,
    with_full: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of query, key, coefficients, full, vertical, horizontal and value.

    Empty are those of what is None and, without with_full, of a full bias.
    """
    bias = Bias(full, vertical, horizontal)
    query, key, sums_gradient = query.transpose(0, 1), key.transpose(0, 1), sums_gradient.transpose(0, 1)
    weights = _weights(coefficients)
    query_gradient, key_gradient = query.new_empty(query.shape), key.new_empty(key.shape)
    weights_gradient = weights.new_empty(*weights.shape[:3], *weights.shape[:2:-1])  # (2, G, heads, M, r)
    full_gradient = query.new_zeros(full.shape if with_full else 0)
    vertical_gradient, horizontal_gradient, value_gradient = (
        query.new_empty((0, 0) if x is None else x.transpose(0, 1).shape) for x in (vertical, horizontal, value)
    )
    if value is not None:
        value, attended_gradient = value.transpose(0, 1), attended_gradient.transpose(0, 1)
        attended, log_totals = attended.transpose(0, 1), log_totals.transpose(0, 1)

    def work(chunks: _Chunks) -> None:
        # A sum for each item of a chunk, so that a batch of products can be added.
        shape = len(chunks.all_heads), chunks.items, *weights_gradient.shape[3:]
        item_gradients = weights_gradient.new_zeros(*weights_gradient.shape[:2], *shape)
        for chunk in chunks:
            heads, items, rows = chunk
            shape = chunks.shape(chunk)
            chunk_query, chunk_key = query[chunk].flatten(0, 1), key[heads, items].flatten(0, 1)
            scores = chunks.scores(chunk_query, chunk_key, scale, bias, chunk)
            scores_gradient, product = (chunks.memory(name, scores.shape) for name in (1, 2))
            if value is not None:
                chunk_gradient = attended_gradient[chunk].flatten(0, 1)
                log_total = log_totals[chunk].flatten(0, 1).unsqueeze(1)
                softmax = torch.sub(scores, log_total, out=scores_gradient).exp_()
                _add_product(value_gradient[heads, items].flatten(0, 1), softmax, chunk_gradient, keep=rows.start > 0)
                # Of softmax P and dP = dO Vᵀ: dA = P ∘ (dP − Σ_q P dP), and that sum is dO · O.
                mean = (chunk_gradient * attended[chunk].flatten(0, 1)).sum(dim=-1).unsqueeze(1)
                torch.baddbmm(mean, value[heads, items].flatten(0, 1), chunk_gradient.mT, beta=-1, out=product)
                scores_gradient = softmax.mul_(product)
            unit_gradient = sums_gradient[chunk].flatten(0, 1)  # (heads · items, rows, r)
            cosine_weights, sine_weights = chunks.weights(weights, chunk)
            first, last = (head - chunks.all_heads.start for head in (heads.start, heads.stop))
            # (G, heads · items, M, r)
            cosine_gradients, sine_gradients = item_gradients[:, :, first:last, : shape[1]].flatten(2, 3)
            for m, sign, cosines, sines in chunks.harmonics(scores, len(cosine_weights)):
                _add_product(product, sine_weights[m - 1].mT, unit_gradient.mT, keep=False)
                if m == 1 and value is None:
                    torch.mul(cosines, product, out=scores_gradient)
                else:
                    scores_gradient.addcmul_(cosines, product, value=sign * m)
                _add_product(product, cosine_weights[m - 1].mT, unit_gradient.mT, keep=False)
                scores_gradient.addcmul_(sines, product, value=-sign * m)
                _add_product(cosine_gradients[m - 1], cosines, unit_gradient, sign)
                _add_product(sine_gradients[m - 1], sines, unit_gradient, sign)
            _add_product(query_gradient[chunk].flatten(0, 1), scores_gradient.mT, chunk_key, scale, keep=False)
            key_part = key_gradient[heads, items].flatten(0, 1)
            _add_product(key_part, scores_gradient, chunk_query, scale, keep=rows.start > 0)
            if with_full:
                part = _part(full_gradient, chunk)
                part += scores_gradient.view(shape).sum_to_size(part.mT.shape).mT
            if vertical is not None:
                grid = vertical.shape[-1], horizontal.shape[-1]
                on_grid = scores_gradient.view(shape).unflatten(2, grid)
                vertical_gradient[chunk] = on_grid.sum(dim=3).mT
                horizontal_gradient[chunk] = on_grid.sum(dim=2).mT
        weights_gradient[:, :, chunks.all_heads.start : chunks.all_heads.stop] = item_gradients.sum(dim=3)

    # Where all heads add to the gradient of one bias, they must not do so at the same time.
    _share_heads(work, query, key, in_threads=not (with_full and full.shape[1] == 1))
    return (
        query_gradient.transpose(0, 1),
        key_gradient.transpose(0, 1),
        weights_gradient.permute(2, 0, 1, 3, 4),
        full_gradient,
        *(x.transpose(0, 1) for x in (vertical_gradient, horizontal_gradient, value_gradient)),
    )


def _share_heads(work: "Callable[[_Chunks], None]", query: Tensor, key: Tensor, in_threads: bool = True) -> None:
    """Calls `work` with chunks of its own in each thread, whose operators are of a single thread.

    Were the operators of several threads, these would meet after each of some twenty for a chunk, and where another
    process takes one of the cores for a moment, all would wait.
    """
    num_heads, num_threads = len(query), torch.get_num_threads()
    num_scores = query[..., 0].numel() * key.shape[2]
    workers = max(1, min(num_threads, num_heads, math.ceil(num_scores / _chunk_size(query.device))))
    if query.device.type != "cpu" or workers == 1 or not in_threads:
        work(_Chunks(query, key, range(num_heads)))
        return

    def work_alone(worker: int) -> None:
        torch.set_num_threads(num_threads // workers)  # of this thread and of those that are yet to start
        heads = range(worker * num_heads // workers, (worker + 1) * num_heads // workers)
        with torch.inference_mode(inference), torch.no_grad():
            work(_Chunks(query, key, heads))

    inference = torch.is_inference_mode_enabled()
    try:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(work_alone, range(workers)))
    finally:
        torch.set_num_threads(num_threads)


class _Chunks:
    """Goes through (heads, items of the batch, rows of scores), and has memory for the numbers of one chunk.

    A chunk is rows of one item, or all rows of some items, or all items of some heads.

    Args:
        query, key: of shape (heads, B, N or M, d).
        heads: those to go through.
    """

    def __init__(self, query: Tensor, key: Tensor, heads: range):
        self.all_heads = heads
        _, self.batch_size, self.num_rows, _ = query.shape
        self.row_size = key.shape[2]
        room = max(1, _chunk_size(query.device) // self.row_size)  # rows in a chunk
        self.rows = min(self.num_rows, room)
        self.items = max(1, min(self.batch_size, room // self.rows))
        self.heads = min(len(heads), max(1, room // (self.rows * max(1, self.batch_size))))
        self.allocate = partial(query.new_empty, self.heads * self.items * self.rows * self.row_size)
        self.allocated: dict[int, Tensor] = {}
        self.one_and_zero = query.new_ones(()), query.new_zeros(())
        self.views: dict[tuple[int, tuple[int, ...]], Tensor] = {}

    def __iter__(self) -> Iterator[tuple[slice, slice, slice]]:
        for head in self.all_heads[:: self.heads]:
            heads = slice(head, min(head + self.heads, self.all_heads.stop))
            for item in range(0, self.batch_size, self.items):
                items = slice(item, min(item + self.items, self.batch_size))
                for row in range(0, self.num_rows, self.rows):
                    yield heads, items, slice(row, min(row + self.rows, self.num_rows))

    def shape(self, chunk: tuple[slice, slice, slice]) -> tuple[int, int, int, int]:
        """Of a chunk of scores, queries last: (heads, items, M, rows)."""
        heads, items, rows = (part.stop - part.start for part in chunk)
        return heads, items, self.row_size, rows

    def memory(self, name: int, shape: Sequence[int]) -> Tensor:
        """Memory that one chunk after the other uses, not initialised."""
        if (name, shape) not in self.views:
            if name not in self.allocated:
                self.allocated[name] = self.allocate()
            self.views[name, shape] = self.allocated[name][: math.prod(shape)].view(shape)
        return self.views[name, shape]

    def scores(self, query: Tensor, key: Tensor, scale: float, bias: Bias, chunk: tuple[slice, slice, slice]) -> Tensor:
        """(scale · Q Kᵀ + bias)ᵀ of a chunk, of shape (heads · items, M, rows), for its queries and keys."""
        scores = self.memory(0, (*key.shape[:2], query.shape[1]))
        # Made contiguous, what is added goes to whole vectors of scores at a time.
        if bias.vertical is not None:
            vertical, horizontal = (x.transpose(0, 1)[chunk].mT.contiguous() for x in (bias.vertical, bias.horizontal))
            on_grid = scores.view(*vertical.shape[:3], *horizontal.shape[2:])
            torch.add(vertical.unsqueeze(3), horizontal.unsqueeze(2), out=on_grid)
        if bias.full is not None:
            part = _part(bias.full, chunk).mT.contiguous()
            by_head = scores.view(self.shape(chunk))
            if bias.vertical is None:
                by_head.copy_(part)
            else:
                by_head += part
        has_bias = bias.full is not None or bias.vertical is not None
        _add_product(scores, key, query.mT, scale, keep=has_bias)
        return scores

    def weights(self, weights: Tensor, chunk: tuple[slice, slice, slice]) -> Tensor:
        """From (2, G, heads, r, M) to (2, G, heads · items, r, M) of a chunk, the same for each item."""
        heads, items, _ = chunk
        weights = weights[:, :, heads].unsqueeze(3)
        return weights.expand(-1, -1, -1, items.stop - items.start, -1, -1).flatten(2, 3)

    def harmonics(self, scores: Tensor, grid_size: int) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """Yields m, a sign, and the sign times cos(m A) and sin(m A), for m = 1 to G. It overwrites the scores.

        By Chebyshev, f((m + 1) x) = 2 cos x f(m x) − f((m − 1) x) for cosine and sine. It is one pass over memory, in
        place, if the result may have the wrong sign: f₊ = f₋ − 2 s₋ s cos x f has the sign s₊ = −s₋.
        """
        cosines = torch.cos(scores, out=self.memory(3, scores.shape))
        sines = scores.sin_()
        yield 1, 1, cosines, sines
        before = 1, *self.one_and_zero
        now = 1, cosines, sines
        for m in range(2, grid_size + 1):
            # Two memories in turn for either, since the first cosine is needed to the end.
            after = [
                torch.addcmul(old, cosines, new, value=-2 * before[0] * now[0], out=self.memory(name, scores.shape))
                for old, new, name in zip(before[1:], now[1:], (4 + m % 2, 6 + m % 2), strict=True)
            ]
            before, now = now, (-before[0], *after)
            yield m, *now


def _weights(coefficients: Tensor) -> Tensor:
    """Coefficients (heads, 2, G, M, r) as products want them: (2, G, heads, r, M)."""
    return coefficients.permute(1, 2, 0, 4, 3).contiguous()


def _add_product(total: Tensor, left: Tensor, right: Tensor, factor: float = 1, keep: bool = True) -> None:
    """Adds factor · left · right, or without `keep` writes it, to each of a batch of totals, in place."""
    total.baddbmm_(left, right, alpha=factor, beta=int(keep))


def _part(full: Tensor, chunk: tuple[slice, slice, slice]) -> Tensor:
    """What of a full bias (B, heads, N, M), each dimension whole or 1, is a chunk's: (heads, items, rows, M)."""
    whole = slice(None)
    full = full.transpose(0, 1)
    return full[tuple(part if size > 1 else whole for part, size in zip(chunk, full.shape, strict=False))]


def _chunk_size(device: torch.device, per_thread: int = 5 * 2**15) -> int:
    """Numbers that are worked on at a time. Larger chunks leave the processor's cache, smaller ones cost more calls."""
    return per_thread * torch.get_num_threads() if device.type == "cpu" else 2**25


# torch.compile does not look into operators; in functions it would unroll the chunks. A function is the cheaper call.
_fourier_sums_operator = torch.library.custom_op("karat_det::fourier_sums", _fourier_sums, mutates_args=())
_fourier_sums_backward_operator = torch.library.custom_op(
    "karat_det::fourier_sums_backward", _fourier_sums_backward, mutates_args=()
)


@_fourier_sums_operator.register_fake
def _(query, key, coefficients, scale, full, vertical, horizontal, value):
    batch_size, num_heads, num_rows, _ = query.shape
    sums = query.new_empty(num_heads, batch_size, coefficients.shape[-1], num_rows).transpose(0, 1).mT
    if value is None:
        return sums, query.new_empty(0, 0), query.new_empty(0, 0)
    attended = query.new_empty(num_heads, batch_size, num_rows, value.shape[-1])
    return sums, attended.transpose(0, 1), query.new_empty(attended.shape[:-1]).transpose(0, 1)


@_fourier_sums_backward_operator.register_fake
def _(
    sums_gradient,
    attended_gradient,
    query,
    key,
    coefficients,
    scale,
    full,
    vertical,
    horizontal,
    value,
    attended,
    log_totals,
    with_full,
):
    def heads_first(x: Tensor | None) -> Tensor:
        return query.new_empty(0, 0) if x is None else query.new_empty(x.transpose(0, 1).shape).transpose(0, 1)

    num_heads, _, grid_size, row_size, rank = coefficients.shape
    return (
        heads_first(query),
        heads_first(key),
        coefficients.new_empty(2, grid_size, num_heads, row_size, rank).permute(2, 0, 1, 3, 4),
        query.new_empty(full.shape if with_full else 0),
        heads_first(vertical),
        heads_first(horizontal),
        heads_first(value),
    )
