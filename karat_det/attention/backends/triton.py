"""Triton kernels for CUDA: sums of Fourier series over attention scores that are never in memory.

With scores A = scale · Q Kᵀ + bias, N×N for each head, the operator needs, at query k and for p = 1..r,

    S_kp = Σ_q Σ_m a_pqm cos(m A_kq) + b_pqm sin(m A_kq).

As in FlashAttention (arXiv 2205.14135) a program works through tiles of A. It makes cos A and sin A of a tile on chip,
gets those of m A from them by the angle addition formulas, and multiplies each with a tile of coefficients. Only Q, K,
the coefficients and the bias are kept for the backward pass, which forms the tiles again. From S̄, the gradient of S,

    Ā_kq = Σ_m m (cos(m A_kq) Σ_p b_pqm S̄_kp − sin(m A_kq) Σ_p a_pqm S̄_kp),
    Q̄ = scale · Ā K,   K̄ = scale · Āᵀ Q,   bias: Ā, summed over the dimensions along which it was broadcast,
    ā_pqm = Σ cos(m A_kq) S̄_kp,   b̄_pqm = Σ sin(m A_kq) S̄_kp,   summed over k and over the batch.

One backward kernel goes through the keys of a tile of queries, for Q̄; the other through the queries of a tile of keys,
for K̄, ā and b̄. No sum is made by atomic additions, so results are the same in each run.

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
# of 8.6, 8.9 and 12.0. d, with a channel for each row and column of the grid where there are relative positions, and G
# times r, as a power of two.
_MAX_WIDTH = 256
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
    softmax = None if value is None else plain.softmax_attention(query, key, value, scale, bias)
    if bias.vertical is not None:
        query, key, scale = plain.append_grid_terms(query, key.to(query.dtype), scale, bias)
        key = key.to(query.dtype)
    # Rows that begin at multiples of 16 elements are loaded in wide words, and 16 is the smallest side of a product.
    width, rank = query.shape[-1], coefficients.shape[-1]
    if width % 16:
        query, key = pad(query, (0, -width % 16)), pad(key, (0, -width % 16))
    if _padded_rank(rank) > rank:
        coefficients = pad(coefficients, (0, _padded_rank(rank) - rank))
    sums = _score_sums(query, key, coefficients, scale, bias.full)[..., :rank]
    return sums if value is None else (sums, softmax)


def can_run(query: Tensor, key: Tensor, coefficients: Tensor, bias: Bias | None, mask: Tensor | None, value) -> bool:
    """Whether the kernels are made for these sizes, types and this device.

    The device must be an NVIDIA GPU of compute capability 8.0 or more.
    """
    grid_size, rank = coefficients.shape[2], coefficients.shape[-1]
    width = query.shape[-1]
    if bias is not None and bias.vertical is not None:
        width += bias.vertical.shape[-1] + bias.horizontal.shape[-1]
    return (
        query.is_cuda
        and torch.version.cuda is not None
        and mask is None
        and query.shape == key.shape
        and query.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and width <= _MAX_WIDTH
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
def _bias_start(bias, strides, inner_size, batch, head):
    return bias + (batch // inner_size) * strides[0] + (batch % inner_size) * strides[1] + head * strides[2]


# All kernels begin with the arguments that _inputs gives. D is d, and BLOCK_D the power of two that holds it; in lower
# case are tiles, in the gradients' kernels with d for a gradient.
@triton.jit
def _forward_kernel(
    query, query_strides, key, key_strides, coefficients, bias, bias_strides, bias_inner, scale,
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
        if bias is not None:
            start = _bias_start(bias, bias_strides, bias_inner, batch, head)
            bias_tile = _tile(start, queries, bias_strides[3], num_tokens, keys, bias_strides[4], num_tokens)
            scores += bias_tile.to(tl.float32)
        cosine_1, sine_1 = _cosine_and_sine(scores)
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
    query, query_strides, key, key_strides, coefficients, bias, bias_strides, bias_inner, scale,
    heads, num_tokens, D: tl.constexpr, BLOCK_D: tl.constexpr, G: tl.constexpr, R: tl.constexpr,
    sums_gradient, query_gradient, score_gradient,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of queries and, where wanted, of their scores. Programs as in the forward pass."""
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
    for first_key in range(0, num_tokens, KEYS):
        keys = first_key + tl.arange(0, KEYS)
        k = _tile(key, keys, key_strides[2], num_tokens, features, key_strides[3], D)
        scores = _dot(q, tl.trans(k)) * scale
        if bias is not None:
            start = _bias_start(bias, bias_strides, bias_inner, batch, head)
            bias_tile = _tile(start, queries, bias_strides[3], num_tokens, keys, bias_strides[4], num_tokens)
            scores += bias_tile.to(tl.float32)
        cosine_1, sine_1 = _cosine_and_sine(scores)
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
        dq += _dot(dscores.to(q.dtype), k)
    _store_tile(query_gradient, dq * scale, queries, D, num_tokens, features, D)


@triton.jit
def _key_gradient_kernel(
    query, query_strides, key, key_strides, coefficients, bias, bias_strides, bias_inner, scale,
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
            if bias is not None:
                start = _bias_start(bias, bias_strides, bias_inner, batch, head)
                bias_tile = _tile(start, keys, bias_strides[4], num_tokens, queries, bias_strides[3], num_tokens)
                scores += bias_tile.to(tl.float32)
            cosine_1, sine_1 = _cosine_and_sine(scores)
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
def _score_sums(query: Tensor, key: Tensor, coefficients: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """fourier_score_sums for d a multiple of 16 and r a power of two from 16 on."""
    sums = query.new_empty(*query.shape[:-1], coefficients.shape[-1], dtype=torch.float32)
    *batch, heads, num_tokens, _ = query.shape
    options = _options(query, tile=(64, 32), float32_tile=(64, 16))
    programs = (math.prod(batch) * heads, triton.cdiv(num_tokens, options["QUERIES"]))
    with torch.cuda.device_of(query):
        _forward_kernel[programs](*_inputs(query, key, coefficients, scale, bias), sums, **options)
    return sums


@_score_sums.register_fake
def _(query, key, coefficients, scale, bias):
    return query.new_empty(*query.shape[:-1], coefficients.shape[-1], dtype=torch.float32)


@torch.library.custom_op("karat_det::fourier_score_sums_backward", mutates_args=())
def _score_sums_backward(
    sums_gradient: Tensor,
    query: Tensor,
    key: Tensor,
    coefficients: Tensor,
    scale: float,
    bias: Tensor | None,
    with_scores: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of query, key, coefficients and, with_scores, of the scores, else an empty tensor."""
    gradients = _empty_gradients(query, key, coefficients, with_scores)
    query_gradient, key_gradient, coefficients_gradient, score_gradient = gradients
    *batch, heads, num_tokens, _ = query.shape
    batch_size = math.prod(batch)
    inputs = (*_inputs(query, key, coefficients, scale, bias), sums_gradient.to(query.dtype).contiguous())
    with torch.cuda.device_of(query):
        options = _options(query, tile=(64, 32), float32_tile=(16, 32))
        programs = (batch_size * heads, triton.cdiv(num_tokens, options["QUERIES"]))
        _query_gradient_kernel[programs](*inputs, query_gradient, score_gradient if with_scores else None, **options)

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
def _(sums_gradient, query, key, coefficients, scale, bias, with_scores):
    return _empty_gradients(query, key, coefficients, with_scores)


def _save_inputs(ctx, inputs, output):
    query, key, coefficients, ctx.scale, bias = inputs
    ctx.save_for_backward(query, key, coefficients, bias)


def _backward(ctx, sums_gradient):
    query, key, coefficients, bias = ctx.saved_tensors
    with_scores = ctx.needs_input_grad[4]
    *gradients, score_gradient = _score_sums_backward(
        sums_gradient, query, key, coefficients, ctx.scale, bias, with_scores
    )
    bias_gradient = score_gradient.sum_to_size(bias.shape).to(bias.dtype) if with_scores else None
    return *gradients, None, bias_gradient


_score_sums.register_autograd(_backward, setup_context=_save_inputs)


def _empty_gradients(query, key, coefficients, with_scores):
    gradients = [tensor.new_empty(tensor.shape) for tensor in (query, key, coefficients)]
    scores_shape = (*query.shape[:-1], query.shape[-2]) if with_scores else (0,)
    return *gradients, query.new_empty(scores_shape, dtype=torch.float32)


def _inputs(query, key, coefficients, scale, bias):
    """The arguments that all kernels begin with: the tensors with one batch dimension, their strides and sizes."""
    *batch, heads, num_tokens, width = query.shape
    query = query.reshape(math.prod(batch), heads, num_tokens, width)
    key = key.reshape(query.shape)
    bias_strides, bias_inner = None, None
    if bias is not None:
        # Batch may have two dimensions, images and windows, of which the bias has one. Its strides then tell the two
        # apart, so that it is not copied along the other.
        bias_inner = batch[-1] if batch else 1
        bias = bias.expand(*batch, heads, num_tokens, num_tokens)
        bias = bias.reshape(math.prod(batch[:-1]), bias_inner, heads, num_tokens, num_tokens)
        bias_strides = bias.stride()
    grid_size, rank = coefficients.shape[2], coefficients.shape[4]
    coefficients = coefficients.to(query.dtype).contiguous()
    return (
        query, query.stride(), key, key.stride(), coefficients, bias, bias_strides, bias_inner, scale,
        heads, num_tokens, width, triton.next_power_of_2(width), grid_size, rank,
    )  # fmt: skip


def _options(query, tile, float32_tile):
    """Options of a kernel. A tile is (queries, keys), as many as registers hold."""
    # A float32 factor is split in two for the products, and takes four times the registers of a narrower one.
    is_float32 = query.dtype == torch.float32
    queries, keys = float32_tile if is_float32 else tile
    if query.shape[-1] > 128:
        # What a tile's rows take is the next power of two, 256 numbers: more than the shared memory of smaller GPUs.
        queries, keys = max(16, queries // 2), max(16, keys // 2)
    return {"QUERIES": queries, "KEYS": keys, "num_warps": 4, "num_stages": 1 if is_float32 else 2}
