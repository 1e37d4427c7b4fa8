"""Sums of learnable functions over rows of attention scores, without keeping the scores.

Of `fourier_sums` autograd keeps query, key, bias and coefficients: the scores, their sines and their cosines are formed
again in the backward pass. Both passes work in chunks that fit the processor's cache, so that memory grows with N, not
with N². `by_rows` does as much for any other function of rows.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


def fourier_sums(query: Tensor, key: Tensor, coefficients: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """Φ̂_p[A_k] = Σ_q Σ_m a_pqm cos(m A_kq) + b_pqm sin(m A_kq), for the scores A = scale · Q Kᵀ + bias.

    Args:
        query: of shape (..., heads, N, d).
        key: of shape (..., heads, M, d).
        coefficients: a then b, of shape (heads, 2, G, M, r), at index (head, a or b, m − 1, q, p).
        scale: of the product of query and key.
        bias: added to the scores, broadcastable to (..., heads, N, M).

    Returns:
        A tensor of shape (..., heads, N, r), differentiable once.

    Source: section 3 of the paper, arXiv 2503.10632.
    """
    batch_shape = query.shape[:-3]
    if bias is not None:
        bias = bias[(None,) * (query.ndim - bias.ndim)]
        if math.prod(bias.shape[:-3]) > 1:
            bias = bias.expand(*batch_shape, *bias.shape[-3:])
        bias = bias.reshape(-1, *bias.shape[-3:])  # (B, heads, N, M), each dimension whole or 1
    query, key = (x.reshape(-1, *x.shape[-3:]) for x in (query, key))
    sums = _fourier_sums(query, key, coefficients, scale, bias)
    return sums.reshape(*batch_shape, *sums.shape[1:])


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
        rows = max(1, 2**23 // numbers_per_row)
        chunks = (_cut(rowwise, slice(row, row + rows)) for row in range(0, rowwise[0].shape[-2], rows))
        return torch.cat([checkpoint(function, *chunk, *shared, use_reentrant=False) for chunk in chunks], dim=-2)
    # Larger chunks than in fourier_sums: each adds to the gradients of all that is shared.
    rows = max(1, _chunk_size(rowwise[0].device, per_thread=2**20) // numbers_per_row)
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


# Operators that torch.compile does not look into: it would unroll the chunks.
@torch.library.custom_op("karat_det::fourier_sums", mutates_args=())
def _fourier_sums(query: Tensor, key: Tensor, coefficients: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    grid_size, _, rank = coefficients.shape[2:]
    # Heads come first here and below: they have coefficients of their own, and so chunks are contiguous.
    query, key = query.transpose(0, 1), key.transpose(0, 1)
    sums = query.new_empty(*query.shape[:-1], rank)

    def work(chunks: _Chunks) -> None:
        for heads, items, rows in chunks:
            cosine_weights, sine_weights = coefficients[heads].unbind(1)  # (heads, G, M, r)
            scaled_query, chunk_key = query[heads, items, rows] * scale, key[heads, items]
            scores = chunks.scores(scaled_query, chunk_key, _part(bias, heads, items, rows))
            chunk_sums = sums[heads, items, rows].flatten(1, 2)
            for m, sign, cosines, sines in chunks.harmonics(scores, grid_size):
                _add_product(chunk_sums, cosines, cosine_weights[:, m - 1], sign, keep=m > 1)
                _add_product(chunk_sums, sines, sine_weights[:, m - 1], sign)

    _share_heads(work, query, key)
    return sums.transpose(0, 1)


@torch.library.custom_op("karat_det::fourier_sums_backward", mutates_args=())
def _fourier_sums_backward(
    sums_gradient: Tensor,
    query: Tensor,
    key: Tensor,
    coefficients: Tensor,
    scale: float,
    bias: Tensor | None,
    with_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of query, key, coefficients and, with_bias, of the bias, else an empty tensor."""
    grid_size = coefficients.shape[2]
    query, key, sums_gradient = query.transpose(0, 1), key.transpose(0, 1), sums_gradient.transpose(0, 1)
    query_gradient = query.new_empty(query.shape)
    key_gradient = key.new_zeros(key.shape)
    # (heads, 2, G, r, M): a product with the many rows last is the faster one.
    weights_gradient = coefficients.new_zeros(coefficients.transpose(3, 4).shape)
    bias_gradient = query.new_zeros(bias.shape if with_bias else 0)

    def work(chunks: _Chunks) -> None:
        for heads, items, rows in chunks:
            cosine_weights, sine_weights = coefficients[heads].mT.unbind(1)  # (heads, G, r, M)
            cosine_gradients, sine_gradients = weights_gradient[heads].unbind(1)
            scaled_query, chunk_key = query[heads, items, rows] * scale, key[heads, items]
            scores = chunks.scores(scaled_query, chunk_key, _part(bias, heads, items, rows))
            unit_gradient = sums_gradient[heads, items, rows].flatten(1, 2)
            scores_gradient, feature_gradient = (chunks.memory(name, scores.shape) for name in (1, 2))
            for m, sign, cosines, sines in chunks.harmonics(scores, grid_size):
                _add_product(feature_gradient, unit_gradient, sine_weights[:, m - 1], keep=False)
                if m == 1:
                    torch.mul(cosines, feature_gradient, out=scores_gradient)
                else:
                    scores_gradient.addcmul_(cosines, feature_gradient, value=sign * m)
                _add_product(feature_gradient, unit_gradient, cosine_weights[:, m - 1], keep=False)
                scores_gradient.addcmul_(sines, feature_gradient, value=-sign * m)
                _add_product(cosine_gradients[:, m - 1], unit_gradient.mT, cosines, sign)
                _add_product(sine_gradients[:, m - 1], unit_gradient.mT, sines, sign)
            by_item = scores_gradient.view(-1, scaled_query.shape[2], scores.shape[2])
            torch.bmm(by_item, chunk_key.flatten(0, 1), out=query_gradient[heads, items, rows].flatten(0, 1))
            key_gradient[heads, items].flatten(0, 1).baddbmm_(by_item.mT, scaled_query.flatten(0, 1))
            if with_bias:
                part = _part(bias_gradient, heads, items, rows)
                part += by_item.view(*scaled_query.shape[:3], -1).sum_to_size(part.shape)

    # Where all heads add to the gradient of one bias, they must not do so at the same time.
    _share_heads(work, query, key, in_threads=not (with_bias and bias.shape[1] == 1))
    query_gradient *= scale
    return (
        query_gradient.transpose(0, 1),
        key_gradient.transpose(0, 1),
        weights_gradient.transpose(3, 4),
        bias_gradient,
    )


def _share_heads(work: "Callable[[_Chunks], None]", query: Tensor, key: Tensor, in_threads: bool = True) -> None:
    """Calls `work` with chunks of its own in each thread, whose operators are of a single thread.

    Were the operators of several threads, these would meet after each of some twenty for a chunk, and where another
    process takes one of the cores for a moment, all would wait.
    """
    num_heads, num_threads = len(query), torch.get_num_threads()
    num_scores = query[..., 0].numel() * key.shape[2]
    workers = min(num_threads, num_heads, math.ceil(num_scores / _chunk_size(query.device)))
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
        row_size = key.shape[2]
        room = max(1, _chunk_size(query.device) // row_size)  # rows in a chunk
        self.rows = min(self.num_rows, room)
        self.items = min(self.batch_size, max(1, room // self.rows))
        self.heads = min(len(heads), max(1, room // (self.rows * self.batch_size)))
        self.allocate = partial(query.new_empty, self.heads * self.items * self.rows * row_size)
        self.allocated = {}

    def __iter__(self) -> Iterator[tuple[slice, slice, slice]]:
        for head in self.all_heads[:: self.heads]:
            heads = slice(head, min(head + self.heads, self.all_heads.stop))
            for item in range(0, self.batch_size, self.items):
                for row in range(0, self.num_rows, self.rows):
                    yield heads, slice(item, item + self.items), slice(row, row + self.rows)

    def memory(self, name: int, shape: Sequence[int]) -> Tensor:
        """Memory that one chunk after the other uses, not initialised."""
        if name not in self.allocated:
            self.allocated[name] = self.allocate()
        return self.allocated[name][: math.prod(shape)].view(shape)

    def scores(self, query: Tensor, key: Tensor, bias: Tensor | None) -> Tensor:
        """Q Kᵀ + bias of a chunk, of shape (heads, items · rows, M)."""
        heads, items, rows, _ = query.shape
        scores = self.memory(0, (heads, items, rows, key.shape[2]))
        torch.bmm(query.flatten(0, 1), key.flatten(0, 1).mT, out=scores.flatten(0, 1))
        if bias is not None:
            scores += bias
        return scores.flatten(1, 2)

    def harmonics(self, scores: Tensor, grid_size: int) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """Yields m, a sign, and the sign times cos(m A) and sin(m A), for m = 1 to G. It overwrites the scores.

        By Chebyshev, f((m + 1) x) = 2 cos x f(m x) − f((m − 1) x) for cosine and sine. It is one pass over memory, in
        place, if the result may have the wrong sign: f₊ = f₋ − 2 s₋ s cos x f has the sign s₊ = −s₋.
        """
        cosines = torch.cos(scores, out=self.memory(3, scores.shape))
        sines = scores.sin_()
        yield 1, 1, cosines, sines
        before = 1, cosines.new_ones(()), cosines.new_zeros(())
        now = 1, cosines, sines
        for m in range(2, grid_size + 1):
            # Two memories in turn for either, since the first cosine is needed to the end.
            after = [
                torch.addcmul(old, cosines, new, value=-2 * before[0] * now[0], out=self.memory(name, scores.shape))
                for old, new, name in zip(before[1:], now[1:], (4 + m % 2, 6 + m % 2), strict=True)
            ]
            before, now = now, (-before[0], *after)
            yield m, *now


def _add_product(total: Tensor, left: Tensor, right: Tensor, sign: int = 1, keep: bool = True) -> None:
    """Adds sign · left · right, or without `keep` writes it, to the total of each head, in place."""
    if len(total) == 1:  # faster as a product of matrices than as a batch of one
        total[0].addmm_(left[0], right[0], alpha=sign, beta=int(keep))
    else:
        total.baddbmm_(left, right, alpha=sign, beta=int(keep))


def _part(bias: Tensor | None, heads: slice, items: slice, rows: slice) -> Tensor | None:
    """What of a bias (B, heads, N, M), each dimension whole or 1, belongs to a chunk: (heads, items, rows, M) or 1."""
    if bias is None:
        return None
    whole = slice(None)
    bias = bias.transpose(0, 1)
    return bias[
        tuple(part if size > 1 else whole for part, size in zip((heads, items, rows), bias.shape, strict=False))
    ]


def _chunk_size(device: torch.device, per_thread: int = 5 * 2**15) -> int:
    """Numbers that are worked on at a time. Larger chunks leave the processor's cache, smaller ones cost more calls."""
    return per_thread * torch.get_num_threads() if device.type == "cpu" else 2**25


@_fourier_sums.register_fake
def _(query, key, coefficients, scale, bias):
    batch_size, num_heads, num_rows, _ = query.shape
    return query.new_empty(num_heads, batch_size, num_rows, coefficients.shape[-1]).transpose(0, 1)


@_fourier_sums_backward.register_fake
def _(sums_gradient, query, key, coefficients, scale, bias, with_bias):
    return (
        query.new_empty(query.transpose(0, 1).shape).transpose(0, 1),
        key.new_empty(key.transpose(0, 1).shape).transpose(0, 1),
        coefficients.new_empty(coefficients.transpose(3, 4).shape).transpose(3, 4),
        query.new_empty(bias.shape if with_bias else 0),
    )


def _keep(ctx, inputs, output):
    query, key, coefficients, ctx.scale, bias = inputs
    ctx.save_for_backward(query, key, coefficients, bias)


def _backward(ctx, sums_gradient):
    query, key, coefficients, bias = ctx.saved_tensors
    with_bias = ctx.needs_input_grad[4]
    *gradients, bias_gradient = _fourier_sums_backward(
        sums_gradient, query, key, coefficients, ctx.scale, bias, with_bias
    )
    return *gradients, None, bias_gradient if with_bias else None


_fourier_sums.register_autograd(_backward, setup_context=_keep)
