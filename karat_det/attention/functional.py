"""Sums of learnable functions over rows of attention scores, without keeping the scores.

Of `fourier_sums` autograd keeps query, key, bias and coefficients: the scores, their sines and their cosines are formed
again in the backward pass. Both passes work in chunks that fit the processor's cache, so that memory grows with N, not
with N². Residual softmax comes from the same chunks. `by_rows` does as much for any other function of rows.
"""

import contextlib
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache, partial
from types import SimpleNamespace
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
    """The sums, and with a value softmax(A) V and log Σ_q exp A_kq, of shape (B, heads, N, 1); else these are empty."""
    # Heads come first here and below, since they have coefficients of their own. Scores and what is made of them have
    # the queries last: products with few units are then faster, and so is adding to the scores of a key.
    query, key, vertical, horizontal, value = _heads_first(query, key, vertical, horizontal, value)
    weights = _weights(coefficients)
    sums = query.new_empty(*query.shape[:2], weights.shape[3], query.shape[2])
    attended = log_totals = None
    if value is not None:
        attended = query.new_empty(*query.shape[:3], value.shape[-1])
        log_totals = query.new_empty(*query.shape[:3], 1)

    rowwise = {"query": query, "vertical": vertical, "horizontal": horizontal}
    rowwise |= {"sums": sums.mT, "attended": attended, "log_totals": log_totals}
    whole = {"key": key, "value": value}

    def work(chunks: _Chunks, heads: slice) -> None:
        pairs = _pairs(chunks.for_items(weights[:, :, heads]))  # of shape (heads · items, r, M)
        for chunk in chunks.cut(heads, rowwise, whole):
            scores = chunks.scores(chunk, scale, full)
            if value is not None:
                highest = scores.amax(dim=1, keepdim=True)
                exponentials = torch.sub(scores, highest, out=chunks.memory(3, scores.shape)).exp_()
                totals = exponentials.sum(dim=1, keepdim=True)
                _add_product(chunk.attended, exponentials.mT, chunk.value, keep=False)
                chunk.attended /= totals.mT
                chunk.log_totals.copy_((totals.log_() + highest).mT)
            chunk_sums = chunk.sums.mT
            for m, sign, cosines, sines in chunks.harmonics(scores, len(pairs)):
                cosine_weights, sine_weights = (x[: len(scores)] for x in pairs[m - 1])
                _add_product(chunk_sums, cosine_weights, cosines, sign, keep=m > 1)
                _add_product(chunk_sums, sine_weights, sines, sign)

    _share_heads(work, query, key)
    return sums.transpose(0, 1).mT, *_items_first(query, attended, log_totals)


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
    if value is None:
        attended_gradient = attended = log_totals = None
    query, key, vertical, horizontal, value, sums_gradient, attended_gradient, attended, log_totals = _heads_first(
        query, key, vertical, horizontal, value, sums_gradient, attended_gradient, attended, log_totals
    )
    weights = _weights(coefficients)
    query_gradient, key_gradient, vertical_gradient, horizontal_gradient, value_gradient = (
        None if x is None else x.new_empty(x.shape) for x in (query, key, vertical, horizontal, value)
    )
    weights_gradient = weights.new_empty(*weights.shape[:3], *weights.shape[:2:-1])  # (2, G, heads, M, r)
    full_gradient = query.new_zeros(full.shape if with_full else 0)

    rowwise = {"query": query, "vertical": vertical, "horizontal": horizontal, "attended": attended}
    rowwise |= {"log_totals": log_totals, "sums_gradient": sums_gradient, "attended_gradient": attended_gradient}
    rowwise |= {"query_gradient": query_gradient}
    rowwise |= {"vertical_gradient": vertical_gradient, "horizontal_gradient": horizontal_gradient}
    whole = {"key": key, "value": value, "key_gradient": key_gradient, "value_gradient": value_gradient}

    def work(chunks: _Chunks, heads: slice) -> None:
        pairs = _pairs(chunks.for_items(weights[:, :, heads]))  # of shape (heads · items, r, M)
        # A sum for each item of a chunk, so that a batch of products can be added.
        item_gradients = chunks.for_items(weights_gradient[:, :, heads]).contiguous().zero_()
        gradient_pairs = _pairs(item_gradients)  # of shape (heads · items, M, r)
        for chunk in chunks.cut(heads, rowwise, whole):
            scores = chunks.scores(chunk, scale, full)
            product = chunks.memory(1, scores.shape)
            # Of a single harmonic the gradient is made in place of the cosines: less goes through the cache.
            scores_gradient = chunks.memory(3 if len(pairs) == 1 and value is None else 2, scores.shape)
            is_first = chunk.rows.start == 0
            if value is not None:
                softmax = torch.sub(scores, chunk.log_totals.mT, out=scores_gradient).exp_()
                _add_product(chunk.value_gradient, softmax, chunk.attended_gradient, keep=not is_first)
                # Of softmax P and dP = dO Vᵀ: dA = P ∘ (dP − Σ_q P dP), and that sum is dO · O.
                mean = (chunk.attended_gradient * chunk.attended).sum(dim=-1).unsqueeze(1)
                torch.baddbmm(mean, chunk.value, chunk.attended_gradient.mT, beta=-1, out=product)
                scores_gradient = softmax.mul_(product)
            unit_gradient = chunk.sums_gradient  # (heads · items, rows, r)
            for m, sign, cosines, sines in chunks.harmonics(scores, len(pairs)):
                cosine_weights, sine_weights = (x[: len(scores)] for x in pairs[m - 1])
                cosine_gradient, sine_gradient = (x[: len(scores)] for x in gradient_pairs[m - 1])
                _add_product(cosine_gradient, cosines, unit_gradient, sign)
                _add_product(sine_gradient, sines, unit_gradient, sign)
                _add_product(product, sine_weights.mT, unit_gradient.mT, keep=False)
                if m == 1 and value is None:
                    torch.mul(cosines, product, out=scores_gradient)
                else:
                    scores_gradient.addcmul_(cosines, product, value=sign * m)
                _add_product(product, cosine_weights.mT, unit_gradient.mT, keep=False)
                scores_gradient.addcmul_(sines, product, value=-sign * m)
            _add_product(chunk.query_gradient, scores_gradient.mT, chunk.key, scale, keep=False)
            _add_product(chunk.key_gradient, scores_gradient, chunk.query, scale, keep=not is_first)
            if with_full:
                part = _part(full_gradient, chunk)
                part += scores_gradient.view(chunks.shape(chunk)).sum_to_size(part.mT.shape).mT
            if vertical is not None:
                on_grid = scores_gradient.unflatten(1, (vertical.shape[-1], horizontal.shape[-1]))
                chunk.vertical_gradient.copy_(on_grid.sum(dim=2).mT)
                chunk.horizontal_gradient.copy_(on_grid.sum(dim=1).mT)
        weights_gradient[:, :, heads] = item_gradients.sum(dim=3)

    # Where all heads add to the gradient of one bias, they must not do so at the same time.
    _share_heads(work, query, key, in_threads=not (with_full and full.shape[1] == 1))
    return (
        query_gradient.transpose(0, 1),
        key_gradient.transpose(0, 1),
        weights_gradient.permute(2, 0, 1, 3, 4),
        full_gradient,
        *_items_first(query, vertical_gradient, horizontal_gradient, value_gradient),
    )


def _share_heads(work: "Callable[[_Chunks, slice], None]", query: Tensor, key: Tensor, in_threads: bool = True) -> None:
    """Calls `work` with chunks and some of the heads until all have had their turn, from several threads on the CPU.

    Were the operators of several threads instead, these would meet after each of some twenty for a chunk, and where
    another process takes one of the cores for a moment, all would wait.
    """
    num_threads = torch.get_num_threads()
    workers = 1
    if query.device.type == "cpu" and in_threads:
        num_scores = query[..., 0].numel() * key.shape[2]
        workers = max(1, min(num_threads, len(query), math.ceil(num_scores / _chunk_size(query.device))))
    chunks = [_Chunks(query, key, workers) for _ in range(workers)]
    # Each takes the next: one that was held up takes fewer. Of a list, since two threads may not advance a generator.
    all_heads = iter(list(chunks[0].heads()))
    inference = torch.is_inference_mode_enabled()

    def work_alone(chunks: _Chunks) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            for heads in all_heads:
                work(chunks, heads)

    shares = []
    if workers > 1:
        # Python closes its thread pools before the last threads of a process end.
        with contextlib.suppress(RuntimeError):
            pool = _thread_pool(os.getpid(), workers, max(1, num_threads // workers))
            for each in chunks:
                shares.append(pool.submit(work_alone, each))
    if not shares:
        work_alone(chunks[0])
    wait(shares)
    for share in shares:
        share.result()


@lru_cache(maxsize=8)
def _thread_pool(process: int, workers: int, threads: int) -> ThreadPoolExecutor:
    """Threads that stay, whose operators are of so many threads each.

    Started anew for each pass they took a tenth of all, as they wait for a core until those of the operator before have
    stopped spinning. A process that was forked has none of its parent's.
    """
    num_threads = torch.get_num_threads()
    all_there = threading.Barrier(workers, timeout=60)

    def start(_: int) -> None:
        torch.set_num_threads(threads)
        torch.get_num_threads()  # Settles it: a thread's first operator would else take the number of the process.
        all_there.wait()

    pool = ThreadPoolExecutor(workers, thread_name_prefix="karat_attention")
    try:
        list(pool.map(start, range(workers)))
    except BaseException:
        all_there.abort()
        pool.shutdown(wait=False)
        raise
    finally:
        # A thread has set it for those that are yet to start, too.
        torch.set_num_threads(num_threads)
    return pool


class _Chunks:
    """Goes through (heads, items of the batch, rows of scores), and has memory for the numbers of one chunk.

    A chunk is rows of one item, or all rows of some items, or all items of some heads.

    Args:
        query, key: of shape (heads, B, N or M, d).
        workers: how many have chunks of their own at the same time.
    """

    def __init__(self, query: Tensor, key: Tensor, workers: int):
        self.num_heads, self.batch_size, self.num_rows, _ = query.shape
        self.row_size = key.shape[2]
        room = max(1, _chunk_size(query.device) // workers // self.row_size)  # rows in a chunk
        self.rows_at_once = min(self.num_rows, room)
        self.items = max(1, min(self.batch_size, room // self.rows_at_once))
        most_heads = room // (self.rows_at_once * max(1, self.batch_size))
        self.heads_at_once = max(1, min(math.ceil(self.num_heads / workers), most_heads))
        self.allocate = partial(query.new_empty, self.heads_at_once * self.items * self.rows_at_once * self.row_size)
        self.allocated: dict[int, Tensor] = {}
        self.one_and_zero = query.new_ones(()), query.new_zeros(())
        self.views: dict[tuple[int, tuple[int, ...]], Tensor] = {}

    def heads(self) -> Iterator[slice]:
        """All heads, so many at a time as one chunk can have."""
        return _slices(self.num_heads, self.heads_at_once)

    def cut(
        self, heads: slice, rowwise: dict[str, Tensor | None], whole: dict[str, Tensor | None]
    ) -> Iterator[SimpleNamespace]:
        """Yields the chunks of some heads: what is theirs of each tensor by its name; slices heads, items and rows.

        Args:
            heads: as `heads` gives them.
            rowwise: tensors (heads, B, N, *), of which a chunk has (heads · items, rows, *); None stays None.
            whole: tensors (heads, B, M, *), of which it has (heads · items, M, *).
        """
        of_heads = {name: None if x is None else x[heads].flatten(0, 1) for name, x in (rowwise | whole).items()}
        num_heads = heads.stop - heads.start
        for items in _slices(self.batch_size, self.items):
            # Of several heads a chunk has all items.
            place = slice(items.start * num_heads, items.stop * num_heads)
            of_items = {name: None if x is None else x[place] for name, x in of_heads.items()}
            for rows in _slices(self.num_rows, self.rows_at_once):
                parts = {name: None if of_items[name] is None else of_items[name][:, rows] for name in rowwise}
                yield SimpleNamespace(heads=heads, items=items, rows=rows, **(of_items | parts))

    def for_items(self, weights: Tensor) -> Tensor:
        """From (2, G, heads, *, *) to (2, G, heads, items, *, *), the same for each item of a chunk."""
        return weights.unsqueeze(3).expand(-1, -1, -1, self.items, -1, -1)

    def shape(self, chunk: SimpleNamespace) -> tuple[int, int, int, int]:
        """Of a chunk of scores, queries last: (heads, items, M, rows)."""
        heads, items, rows = (part.stop - part.start for part in (chunk.heads, chunk.items, chunk.rows))
        return heads, items, self.row_size, rows

    def memory(self, name: int, shape: Sequence[int]) -> Tensor:
        """Memory that one chunk after the other uses, not initialised."""
        if (name, shape) not in self.views:
            if name not in self.allocated:
                self.allocated[name] = self.allocate()
            self.views[name, shape] = self.allocated[name][: math.prod(shape)].view(shape)
        return self.views[name, shape]

    def scores(self, chunk: SimpleNamespace, scale: float, full: Tensor | None) -> Tensor:
        """(scale · Q Kᵀ + bias)ᵀ of a chunk, of shape (heads · items, M, rows).

        Args:
            chunk: with its query, key, and vertical and horizontal terms of the bias.
            scale: of the product of query and key.
            full: the full bias, of all chunks.
        """
        scores = self.memory(0, (*chunk.key.shape[:2], chunk.query.shape[1]))
        # Made contiguous, what is added goes to whole vectors of scores at a time.
        if chunk.vertical is not None:
            vertical, horizontal = chunk.vertical.mT.contiguous(), chunk.horizontal.mT.contiguous()
            on_grid = scores.unflatten(1, (vertical.shape[1], horizontal.shape[1]))
            torch.add(vertical.unsqueeze(2), horizontal.unsqueeze(1), out=on_grid)
        if full is not None:
            part = _part(full, chunk).mT.contiguous()
            by_head = scores.view(self.shape(chunk))
            if chunk.vertical is None:
                by_head.copy_(part)
            else:
                by_head += part
        has_bias = full is not None or chunk.vertical is not None
        _add_product(scores, chunk.key, chunk.query.mT, scale, keep=has_bias)
        return scores

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


def _pairs(of_items: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What cosines and what sines have, for each of G, of a tensor (2, G, heads, items, *, *)."""
    return list(zip(*(parts.unbind() for parts in of_items.flatten(2, 3)), strict=True))


def _slices(size: int, at_once: int) -> Iterator[slice]:
    return (slice(start, min(start + at_once, size)) for start in range(0, size, at_once))


def _weights(coefficients: Tensor) -> Tensor:
    """Coefficients (heads, 2, G, M, r) as products want them: (2, G, heads, r, M)."""
    return coefficients.permute(1, 2, 0, 4, 3).contiguous()


def _add_product(total: Tensor, left: Tensor, right: Tensor, factor: float = 1, keep: bool = True) -> None:
    """Adds factor · left · right, or without `keep` writes it, to each of a batch of totals, in place."""
    total.baddbmm_(left, right, alpha=factor, beta=int(keep))


def _heads_first(*tensors: Tensor | None) -> Iterator[Tensor | None]:
    return (None if tensor is None else tensor.transpose(0, 1) for tensor in tensors)


def _items_first(like: Tensor, *tensors: Tensor | None) -> Iterator[Tensor]:
    """The inverse; an empty tensor for None, each its own, since an operator's results may not share memory."""
    return (like.new_empty(0, 0) if tensor is None else tensor.transpose(0, 1) for tensor in tensors)


def _part(full: Tensor, chunk: SimpleNamespace) -> Tensor:
    """What of a full bias (B, heads, N, M), each dimension whole or 1, is a chunk's: (heads, items, rows, M)."""
    whole = slice(None)
    full = full.transpose(0, 1)
    place = (chunk.heads, chunk.items, chunk.rows, whole)
    return full[tuple(part if size > 1 else whole for part, size in zip(place, full.shape, strict=True))]


def _chunk_size(device: torch.device, per_thread: int = 10 * 2**15) -> int:
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
    attended, log_totals = (query.new_empty(num_heads, batch_size, num_rows, width) for width in (value.shape[-1], 1))
    return sums, attended.transpose(0, 1), log_totals.transpose(0, 1)


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
