"""Triton kernels for CUDA: sums of Fourier series over attention scores that are never in memory.

With scores A = scale · Q Kᵀ + bias, N×N for each head, the operator needs, at query k and for p = 1..r,

    S_kp = Σ_q Σ_m a_pqm cos(m A_kq) + b_pqm sin(m A_kq).

As in FlashAttention (arXiv 2205.14135) a program works through tiles of A. It makes cos A and sin A of a tile on chip,
gets those of m A from them by the angle addition formulas, and multiplies each with a tile of coefficients. Only Q, K,
the coefficients and the bias are kept for the backward pass, which forms the tiles again. From S̄, the gradient of S,

    Ā_kq = Σ_m m (cos(m A_kq) Σ_p b_pqm S̄_kp − sin(m A_kq) Σ_p a_pqm S̄_kp),
    Q̄ = scale · Ā K,   K̄ = scale · Āᵀ Q,   bias: Ā, summed over the dimensions along which it was broadcast,
    ā_pqm = Σ cos(m A_kq) S̄_kp,   b̄_pqm = Σ sin(m A_kq) S̄_kp,   summed over k and over the batch.

One backward kernel goes through the keys of a tile of queries, for Q̄ and the gradients of a grid's terms; the other
through the queries of a tile of keys, for K̄, ā and b̄. No sum is made by atomic additions, so results are the same in
each run.

Scores, phases, sines, cosines and sums are float32. The products take their factors in the type of Q and K, float32
ones as three TensorFloat-32 products each, which is nearly exact.

Triton comes with PyTorch's CUDA builds for Linux. Importing this module without it raises ImportError.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad
from triton.language.extra.cuda import libdevice

from ..bias import Bias
from . import plain

# 2π in two parts. The first has so few bits that its product with a whole number of turns is exact.
_TURN_HIGH = tl.constexpr(6.28125)
_TURN_LOW = tl.constexpr(0.0019353071795864769)
_TURNS_PER_RADIAN = tl.constexpr(0.15915494309189535)
# Added to a float32 and subtracted again, it rounds to the nearest whole number. It costs less than an instruction
# that does: those are as slow as a sine.
_ROUND = tl.constexpr(12582912.0)

# Programs to keep a GPU busy: an A100 has 108 multiprocessors, an H100 132, and each runs several at once.
_ENOUGH_PROGRAMS = 512

# Up to these sizes the kernels fit the shared memory of every GPU of compute capability 8.0 and more: 99 KiB on those
# of 8.6, 8.9 and 12.0. d, H and W of the grid where there are relative positions, and G times r, as a power of two.
_MAX_WIDTH = 256
_MAX_SIDE = 128
_MAX_FUNCTIONS = 128


def fourier_sums(
    query: Tensor,
    key: Tensor,
    coefficients: Tensor,
    scale: float,
    bias: Bias | None = None,
    mask: Tensor | None = None,
    value: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See `backends.fourier_sums`. `can_run` must hold; the sums are float32."""
    bias = bias or Bias()
    softmax = None if value is None else plain.softmax_attention(query, key, value, scale, bias, mask)
    vertical, horizontal = (None if term is None else term.float().contiguous() for term in bias[1:])
    # Rows that begin at multiples of 16 elements are loaded in wide words, and 16 is the smallest side of a product.
    width, rank = query.shape[-1], coefficients.shape[-1]
    if width % 16:
        query, key = pad(query, (0, -width % 16)), pad(key, (0, -width % 16))
    if _padded_rank(rank) > rank:
        coefficients = pad(coefficients, (0, _padded_rank(rank) - rank))
    sums = _score_sums(query, key, coefficients, scale, bias.full, vertical, horizontal, mask)[..., :rank]
    return sums if value is None else (sums, softmax)


def can_run(query: Tensor, key: Tensor, coefficients: Tensor, bias: Bias | None, mask: Tensor | None, value) -> bool:
    """Whether the kernels are made for these sizes, types and this device.

    The device must be an NVIDIA GPU of compute capability 8.0 or more.
    """
    grid_size, rank = coefficients.shape[2], coefficients.shape[-1]
    sides = [term.shape[-1] for term in (bias or Bias())[1:] if term is not None]
    return (
        query.is_cuda
        and torch.version.cuda is not None
        and query.shape == key.shape
        and query.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and query.shape[-1] <= _MAX_WIDTH
        and all(side <= _MAX_SIDE for side in sides)
        and grid_size * _padded_rank(rank) <= _MAX_FUNCTIONS
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _padded_rank(rank: int) -> int:
    """The ranks that the kernels work with: 16, the smallest side of a product, and powers of two above it."""
    return max(16, triton.next_power_of_2(rank))


@triton.jit
def _tile(start, rows, row_stride, num_rows, columns, column_stride, num_columns):
    """Loads a tile of a matrix; zero where it is over the matrix's edge."""
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    return tl.load(start + rows[:, None] * row_stride + columns[None, :] * column_stride, mask=inside, other=0.0)


@triton.jit
def _store_tile(start, tile, rows, row_stride, num_rows, columns, num_columns):
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    tl.store(start + rows[:, None] * row_stride + columns[None, :], tile.to(start.dtype.element_ty), mask=inside)


@triton.jit
def _dot(a, b):
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def _cosine_and_sine(x):
    # The fast instructions are good to 2⁻²¹ within ±π. Those of the full range take hundreds of kilobytes of code.
    turns = (x * _TURNS_PER_RADIAN + _ROUND) - _ROUND
    x = x - turns * _TURN_HIGH
    x = x - turns * _TURN_LOW
    return libdevice.fast_cosf(x), libdevice.fast_sinf(x)


@triton.jit
def _start(tensor, strides, inner_size, batch, head):
    return tensor + (batch // inner_size) * strides[0] + (batch % inner_size) * strides[1] + head * strides[2]


@triton.jit
def _add_bias(
    scores, queries, keys, batch, head, heads, num_tokens, inner_size,
    bias, bias_strides, vertical, horizontal, H: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """The scores of a tile with the terms of a bias. Queries and keys are along one dimension each."""
    inside = (queries < num_tokens) & (keys < num_tokens)
    if bias is not None:
        start = _start(bias, bias_strides, inner_size, batch, head)
        terms = tl.load(start + queries * bias_strides[3] + keys * bias_strides[4], mask=inside, other=0.0)
        scores += terms.to(tl.float32)
    if vertical is not None:
        rows = (batch * heads + head) * num_tokens + queries
        scores += tl.load(vertical + rows * H + keys // W, mask=inside, other=0.0)
        scores += tl.load(horizontal + rows * W + keys % W, mask=inside, other=0.0)
    return scores


@triton.jit
def _seen_cosine_and_sine(scores, queries, keys, batch, head, num_tokens, inner_size, mask, mask_strides):
    """Both of a tile of scores, 0 where the mask is."""
    cosine, sine = _cosine_and_sine(scores)
    if mask is not None:
        inside = (queries < num_tokens) & (keys < num_tokens)
        start = _start(mask, mask_strides, inner_size, batch, head)
        seen = tl.load(start + queries * mask_strides[3] + keys * mask_strides[4], mask=inside, other=0) != 0
        cosine, sine = tl.where(seen, cosine, 0.0), tl.where(seen, sine, 0.0)
    return cosine, sine


# All kernels begin with the arguments that _inputs gives. D is d, and BLOCK_D the power of two that holds it; in lower
# case are tiles, in the gradients' kernels with d for a gradient.
@triton.jit
def _forward_kernel(
    query, query_strides, key, key_strides, coefficients, inner_size, bias, bias_strides, vertical, horizontal,
    H: tl.constexpr, W: tl.constexpr, mask, mask_strides, scale,
    heads, num_tokens, D: tl.constexpr, BLOCK_D: tl.constexpr, G: tl.constexpr, R: tl.constexpr,
    sums,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """S of a tile of queries. Programs: (batch and head, tile)."""
    batch_head = tl.program_id(0).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    query += batch * query_strides[0] + head * query_strides[1]
    key += batch * key_strides[0] + head * key_strides[1]
    coefficients += head * 2 * G * num_tokens * R
    sums += batch_head * num_tokens * R

    features = tl.arange(0, BLOCK_D)
    ranks = tl.arange(0, R)
    queries = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    q = _tile(query, queries, query_strides[2], num_tokens, features, query_strides[3], D)
    total = tl.full((QUERIES, R), 0.0, tl.float32)
    for first_key in range(0, num_tokens, KEYS):
        keys = first_key + tl.arange(0, KEYS)
        k = _tile(key, keys, key_strides[2], num_tokens, features, key_strides[3], D)
        scores = _dot(q, tl.trans(k)) * scale
        scores = _add_bias(
            scores, queries[:, None], keys[None, :], batch, head, heads, num_tokens, inner_size,
            bias, bias_strides, vertical, horizontal, H, W,
        )  # fmt: skip
        cosine_1, sine_1 = _seen_cosine_and_sine(
            scores, queries[:, None], keys[None, :], batch, head, num_tokens, inner_size, mask, mask_strides
        )
        cosine, sine = cosine_1, sine_1
        for m in tl.static_range(G):
            if m > 0:
                cosine, sine = cosine * cosine_1 - sine * sine_1, sine * cosine_1 + cosine * sine_1
            # Keys over the edge have coefficients 0.
            a = _tile(coefficients + m * num_tokens * R, keys, R, num_tokens, ranks, 1, R)
            b = _tile(coefficients + (G + m) * num_tokens * R, keys, R, num_tokens, ranks, 1, R)
            total += _dot(cosine.to(q.dtype), a) + _dot(sine.to(q.dtype), b)
    _store_tile(sums, total, queries, R, num_tokens, ranks, R)


@triton.jit
def _query_gradient_kernel(
    query, query_strides, key, key_strides, coefficients, inner_size, bias, bias_strides, vertical, horizontal,
    H: tl.constexpr, W: tl.constexpr, mask, mask_strides, scale,
    heads, num_tokens, D: tl.constexpr, BLOCK_D: tl.constexpr, G: tl.constexpr, R: tl.constexpr,
    sums_gradient, query_gradient, score_gradient, vertical_gradient, horizontal_gradient,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of queries, of their terms for a grid and, where wanted, of their scores.

    Programs as in the forward pass.
    """
    batch_head = tl.program_id(0).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    query += batch * query_strides[0] + head * query_strides[1]
    key += batch * key_strides[0] + head * key_strides[1]
    coefficients += head * 2 * G * num_tokens * R
    sums_gradient += batch_head * num_tokens * R
    query_gradient += batch_head * num_tokens * D

    features = tl.arange(0, BLOCK_D)
    ranks = tl.arange(0, R)
    queries = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    q = _tile(query, queries, query_strides[2], num_tokens, features, query_strides[3], D)
    ds = _tile(sums_gradient, queries, R, num_tokens, ranks, 1, R)
    dq = tl.full((QUERIES, BLOCK_D), 0.0, tl.float32)
    if vertical is not None:
        rows, columns = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_W)
        dvertical = tl.full((QUERIES, BLOCK_H), 0.0, tl.float32)
        dhorizontal = tl.full((QUERIES, BLOCK_W), 0.0, tl.float32)
    for first_key in range(0, num_tokens, KEYS):
        keys = first_key + tl.arange(0, KEYS)
        k = _tile(key, keys, key_strides[2], num_tokens, features, key_strides[3], D)
        scores = _dot(q, tl.trans(k)) * scale
        scores = _add_bias(
            scores, queries[:, None], keys[None, :], batch, head, heads, num_tokens, inner_size,
            bias, bias_strides, vertical, horizontal, H, W,
        )  # fmt: skip
        cosine_1, sine_1 = _seen_cosine_and_sine(
            scores, queries[:, None], keys[None, :], batch, head, num_tokens, inner_size, mask, mask_strides
        )
        cosine, sine = cosine_1, sine_1
        dscores = tl.full((QUERIES, KEYS), 0.0, tl.float32)
        for m in tl.static_range(G):
            if m > 0:
                cosine, sine = cosine * cosine_1 - sine * sine_1, sine * cosine_1 + cosine * sine_1
            a = _tile(coefficients + m * num_tokens * R, keys, R, num_tokens, ranks, 1, R)
            b = _tile(coefficients + (G + m) * num_tokens * R, keys, R, num_tokens, ranks, 1, R)
            dscores += (m + 1) * (cosine * _dot(ds, tl.trans(b)) - sine * _dot(ds, tl.trans(a)))
        if score_gradient is not None:
            start = score_gradient + batch_head * num_tokens * num_tokens
            _store_tile(start, dscores, queries, num_tokens, num_tokens, keys, num_tokens)
        if vertical is not None:  # sums along a row, or a column, of the grid; keys over the edge are none of its
            here = (keys < num_tokens)[:, None]
            dvertical += _dot(dscores, (here & (keys[:, None] // W == rows[None, :])).to(tl.float32))
            dhorizontal += _dot(dscores, (here & (keys[:, None] % W == columns[None, :])).to(tl.float32))
        dq += _dot(dscores.to(q.dtype), k)
    _store_tile(query_gradient, dq * scale, queries, D, num_tokens, features, D)
    if vertical is not None:
        _store_tile(vertical_gradient + batch_head * num_tokens * H, dvertical, queries, H, num_tokens, rows, H)
        _store_tile(horizontal_gradient + batch_head * num_tokens * W, dhorizontal, queries, W, num_tokens, columns, W)


@triton.jit
def _key_gradient_kernel(
    query, query_strides, key, key_strides, coefficients, inner_size, bias, bias_strides, vertical, horizontal,
    H: tl.constexpr, W: tl.constexpr, mask, mask_strides, scale,
    heads, num_tokens, D: tl.constexpr, BLOCK_D: tl.constexpr, G: tl.constexpr, R: tl.constexpr,
    sums_gradient, key_gradient, coefficients_gradient, batch_size, part_size,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of keys and of their coefficients, these summed over a part of the batch.

    Programs: (part of the batch and head, tile). Tiles of scores are transposed: (keys, queries).
    """
    part_head = tl.program_id(0).to(tl.int64)
    part, head = part_head // heads, part_head % heads
    coefficients += head * 2 * G * num_tokens * R
    coefficients_gradient += part_head * 2 * G * num_tokens * R

    features = tl.arange(0, BLOCK_D)
    ranks = tl.arange(0, R)
    keys = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    da, db = (), ()
    for _ in tl.static_range(G):
        da += (tl.full((KEYS, R), 0.0, tl.float32),)
        db += (tl.full((KEYS, R), 0.0, tl.float32),)
    for batch in range(part * part_size, tl.minimum((part + 1) * part_size, batch_size)):
        query_start = query + batch * query_strides[0] + head * query_strides[1]
        key_start = key + batch * key_strides[0] + head * key_strides[1]
        batch_head = batch * heads + head
        k = _tile(key_start, keys, key_strides[2], num_tokens, features, key_strides[3], D)
        dk = tl.full((KEYS, BLOCK_D), 0.0, tl.float32)
        for first_query in range(0, num_tokens, QUERIES):
            queries = first_query + tl.arange(0, QUERIES)
            q = _tile(query_start, queries, query_strides[2], num_tokens, features, query_strides[3], D)
            # 0 for queries over the edge, so that they add nothing.
            ds = _tile(sums_gradient + batch_head * num_tokens * R, queries, R, num_tokens, ranks, 1, R)
            scores = _dot(k, tl.trans(q)) * scale
            scores = _add_bias(
                scores, queries[None, :], keys[:, None], batch, head, heads, num_tokens, inner_size,
                bias, bias_strides, vertical, horizontal, H, W,
            )  # fmt: skip
            cosine_1, sine_1 = _seen_cosine_and_sine(
                scores, queries[None, :], keys[:, None], batch, head, num_tokens, inner_size, mask, mask_strides
            )
            cosine, sine = cosine_1, sine_1
            dscores = tl.full((KEYS, QUERIES), 0.0, tl.float32)
            more_da, more_db = (), ()
            for m in tl.static_range(G):
                if m > 0:
                    cosine, sine = cosine * cosine_1 - sine * sine_1, sine * cosine_1 + cosine * sine_1
                more_da += (da[m] + _dot(cosine.to(q.dtype), ds),)
                more_db += (db[m] + _dot(sine.to(q.dtype), ds),)
                a = _tile(coefficients + m * num_tokens * R, keys, R, num_tokens, ranks, 1, R)
                b = _tile(coefficients + (G + m) * num_tokens * R, keys, R, num_tokens, ranks, 1, R)
                dscores += (m + 1) * (cosine * _dot(b, tl.trans(ds)) - sine * _dot(a, tl.trans(ds)))
            da, db = more_da, more_db
            dk += _dot(dscores.to(q.dtype), q)
        start = key_gradient + batch_head * num_tokens * D
        _store_tile(start, dk * scale, keys, D, num_tokens, features, D)
    for m in tl.static_range(G):
        _store_tile(coefficients_gradient + m * num_tokens * R, da[m], keys, R, num_tokens, ranks, R)
        _store_tile(coefficients_gradient + (G + m) * num_tokens * R, db[m], keys, R, num_tokens, ranks, R)


@torch.library.custom_op("karat_det::fourier_score_sums", mutates_args=())
def _score_sums(
    query: Tensor,
    key: Tensor,
    coefficients: Tensor,
    scale: float,
    bias: Tensor | None,
    vertical: Tensor | None,
    horizontal: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """The sums for d a multiple of 16, r a power of two from 16 on, and contiguous terms of a grid."""
    sums = query.new_empty(*query.shape[:-1], coefficients.shape[-1], dtype=torch.float32)
    *batch, heads, num_tokens, _ = query.shape
    options = _options(query, tile=(64, 32), float32_tile=(64, 16))
    programs = (math.prod(batch) * heads, triton.cdiv(num_tokens, options["QUERIES"]))
    inputs = _inputs(query, key, coefficients, scale, bias, vertical, horizontal, mask)
    with torch.cuda.device_of(query):
        _forward_kernel[programs](*inputs, sums, **options)
    return sums


@_score_sums.register_fake
def _(query, key, coefficients, scale, bias, vertical, horizontal, mask):
    return query.new_empty(*query.shape[:-1], coefficients.shape[-1], dtype=torch.float32)


@torch.library.custom_op("karat_det::fourier_score_sums_backward", mutates_args=())
def _score_sums_backward(
    sums_gradient: Tensor,
    query: Tensor,
    key: Tensor,
    coefficients: Tensor,
    scale: float,
    bias: Tensor | None,
    vertical: Tensor | None,
    horizontal: Tensor | None,
    mask: Tensor | None,
    with_scores: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of query, key, coefficients, scores, vertical and horizontal.

    Those of the scores are empty without `with_scores`, those of the others where there are none.
    """
    gradients = _empty_gradients(query, key, coefficients, vertical, horizontal, with_scores)
    query_gradient, key_gradient, coefficients_gradient, score_gradient, *term_gradients = gradients
    *batch, heads, num_tokens, _ = query.shape
    batch_size = math.prod(batch)
    inputs = _inputs(query, key, coefficients, scale, bias, vertical, horizontal, mask)
    inputs = (*inputs, sums_gradient.to(query.dtype).contiguous())
    sides = [max(16, triton.next_power_of_2(term.shape[-1])) for term in term_gradients]
    with torch.cuda.device_of(query):
        options = _options(query, tile=(64, 32), float32_tile=(16, 32))
        programs = (batch_size * heads, triton.cdiv(num_tokens, options["QUERIES"]))
        results = query_gradient, score_gradient if with_scores else None, *term_gradients
        _query_gradient_kernel[programs](*inputs, *results, *sides, **options)

        options = _options(query, tile=(32, 64), float32_tile=(32, 16))
        tiles = triton.cdiv(num_tokens, options["KEYS"])
        # Each program sums the coefficients' gradients over as many batch elements as leave programs for the whole GPU.
        part_size = max(1, triton.cdiv(batch_size * heads * tiles, _ENOUGH_PROGRAMS))
        parts = triton.cdiv(batch_size, part_size)
        partial_sums = query.new_empty(parts, *coefficients.shape, dtype=torch.float32)
        programs = (parts * heads, tiles)
        _key_gradient_kernel[programs](*inputs, key_gradient, partial_sums, batch_size, part_size, **options)
    coefficients_gradient.copy_(partial_sums.sum(dim=0))
    return gradients


@_score_sums_backward.register_fake
def _(sums_gradient, query, key, coefficients, scale, bias, vertical, horizontal, mask, with_scores):
    return _empty_gradients(query, key, coefficients, vertical, horizontal, with_scores)


def _save_inputs(ctx, inputs, output):
    query, key, coefficients, ctx.scale, *others = inputs
    ctx.save_for_backward(query, key, coefficients, *others)


def _backward(ctx, sums_gradient):
    query, key, coefficients, bias, *others = ctx.saved_tensors
    with_scores = ctx.needs_input_grad[4]
    *gradients, scores, vertical, horizontal = _score_sums_backward(
        sums_gradient, query, key, coefficients, ctx.scale, bias, *others, with_scores
    )
    bias_gradient = scores.sum_to_size(bias.shape).to(bias.dtype) if with_scores else None
    vertical, horizontal = (vertical, horizontal) if ctx.needs_input_grad[5] else (None, None)
    return *gradients, None, bias_gradient, vertical, horizontal, None


_score_sums.register_autograd(_backward, setup_context=_save_inputs)


def _empty_gradients(query, key, coefficients, vertical, horizontal, with_scores):
    gradients = [tensor.new_empty(tensor.shape) for tensor in (query, key, coefficients)]
    scores_shape = (*query.shape[:-1], query.shape[-2]) if with_scores else (0,)
    gradients.append(query.new_empty(scores_shape, dtype=torch.float32))
    for term in (vertical, horizontal):
        gradients.append(query.new_empty((0,) if term is None else term.shape, dtype=torch.float32))
    return tuple(gradients)


def _inputs(query, key, coefficients, scale, bias, vertical, horizontal, mask):
    """The arguments that all kernels begin with: the tensors with one batch dimension, their strides and sizes."""
    *batch, heads, num_tokens, width = query.shape
    query = query.reshape(math.prod(batch), heads, num_tokens, width)
    key = key.reshape(query.shape)
    # The batch may have two dimensions, images and windows, of which a bias or mask has one. Separate strides for both
    # avoid a copy along the other.
    inner_size = batch[-1] if batch else 1

    def expanded(tensor):
        if tensor is None:
            return None, None
        tensor = tensor.expand(*batch, heads, num_tokens, num_tokens)
        tensor = tensor.reshape(math.prod(batch[:-1]), inner_size, heads, num_tokens, num_tokens)
        return tensor, tensor.stride()

    mask = None if mask is None else mask.view(torch.uint8)
    height, columns = (1 if term is None else term.shape[-1] for term in (vertical, horizontal))
    grid_size, rank = coefficients.shape[2], coefficients.shape[4]
    coefficients = coefficients.to(query.dtype).contiguous()
    return (
        query, query.stride(), key, key.stride(), coefficients, inner_size, *expanded(bias), vertical, horizontal,
        height, columns, *expanded(mask), scale,
        heads, num_tokens, width, triton.next_power_of_2(width), grid_size, rank,
    )  # fmt: skip


def _options(query, tile, float32_tile):
    """Options of a kernel. A tile is (queries, keys), as many as registers hold."""
    # A float32 factor is split in two for the products, and takes four times the registers of a narrower one.
    is_float32 = query.dtype == torch.float32
    queries, keys = float32_tile if is_float32 else tile
    if query.shape[-1] > 128:
        # What a tile's rows take is the next power of two, 256 elements: more than the shared memory of smaller GPUs.
        queries, keys = max(16, queries // 2), max(16, keys // 2)
    return {"QUERIES": queries, "KEYS": keys, "num_warps": 4, "num_stages": 1 if is_float32 else 2}
