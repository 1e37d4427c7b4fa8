import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from karat_det.attention import KArAtConfig, KArAtOperator, functional
from karat_det.attention.functional import Bias, by_rows, fourier_sums


def plain_fourier_sums(query, key, coefficients, scale, bias=None):
    scores = scale * query @ key.transpose(-2, -1)
    scores = scores if bias is None else scores + bias
    terms = [
        wave(m * scores) @ coefficients[:, part, m - 1]
        for m in range(1, coefficients.shape[2] + 1)
        for part, wave in enumerate((torch.cos, torch.sin))
    ]
    return sum(terms)


def plain_sums_and_softmax(query, key, coefficients, scale, value, full=None, vertical=None, horizontal=None):
    """Both results in one tensor, with the terms of a bias written out key by key."""
    bias = 0.0 if full is None else full
    if vertical is not None:
        width = horizontal.shape[-1]
        keys = range(vertical.shape[-1] * width)
        bias = bias + torch.stack([vertical[..., q // width] + horizontal[..., q % width] for q in keys], dim=-1)
    scores = scale * query @ key.transpose(-2, -1) + bias
    sums = plain_fourier_sums(query, key, coefficients, scale, bias)
    weights = scores.exp() / scores.exp().sum(dim=-1, keepdim=True)
    return torch.cat([sums, weights @ value], dim=-1)


def sums_and_softmax(query, key, coefficients, scale, value, full=None, vertical=None, horizontal=None):
    bias = Bias(full, vertical, horizontal)
    return torch.cat(fourier_sums(query, key, coefficients, scale, bias, value), dim=-1)


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def assert_equal_with_gradients(function, plain, inputs, **tolerances):
    """That two functions of tensors have the same values and gradients."""
    result, expected = function(*inputs), plain(*inputs)
    torch.testing.assert_close(result, expected, **tolerances)
    weight = torch.randn_like(expected)
    wanted = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    gradients, expected_gradients = (torch.autograd.grad((y * weight).sum(), wanted) for y in (result, expected))
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == expected_gradient.dtype
        torch.testing.assert_close(gradient, expected_gradient, **tolerances)


# 60 scores a head and item, of 6 rows. They cut: nothing, items (2 and 1), items one by one, rows (4 and 2), single
# rows, and rows that are longer than the chunk.
@pytest.mark.parametrize("chunk_size", [10**6, 120, 60, 45, 10, 3])
@pytest.mark.parametrize("grid_size", range(1, 7))
def test_chunks_of_any_size_give_the_same_sums(monkeypatch, chunk_size, grid_size):
    torch.manual_seed(grid_size)
    monkeypatch.setattr(functional, "_chunk_size", lambda device: chunk_size)
    inputs = normal(3, 2, 6, 4), normal(3, 2, 10, 4), normal(2, 2, grid_size, 10, 3), 0.7, normal(3, 2, 6, 10)
    assert_equal_with_gradients(fourier_sums, plain_fourier_sums, inputs)


@pytest.mark.parametrize("chunk_size", [10**6, 120, 60, 45, 10, 3])
@pytest.mark.parametrize("grid_size", [1, 3])
@pytest.mark.parametrize("full_shape", [None, (3, 2, 6, 10), (2, 1, 10), (1, 6, 1)])
def test_terms_of_a_grid_and_softmax_in_chunks_of_any_size(monkeypatch, chunk_size, grid_size, full_shape):
    torch.manual_seed(grid_size)
    monkeypatch.setattr(functional, "_chunk_size", lambda device: chunk_size)
    query, key, value = normal(3, 2, 6, 4), normal(3, 2, 10, 4), normal(3, 2, 10, 5)
    coefficients, vertical, horizontal = normal(2, 2, grid_size, 10, 3), normal(3, 2, 6, 2), normal(3, 2, 6, 5)
    full = None if full_shape is None else normal(*full_shape)
    inputs = query, key, coefficients, 0.7, value, full, vertical, horizontal
    assert_equal_with_gradients(sums_and_softmax, plain_sums_and_softmax, inputs)
    assert_equal_with_gradients(sums_and_softmax, plain_sums_and_softmax, inputs[:5])

    def without_value(sums):
        return lambda *inputs: sums(*inputs[:4], value.detach(), *inputs[4:])[..., :3]

    def of_chunks(query, key, coefficients, scale, full, vertical, horizontal):
        return fourier_sums(query, key, coefficients, scale, Bias(full, vertical, horizontal))

    assert_equal_with_gradients(of_chunks, without_value(plain_sums_and_softmax), inputs[:4] + inputs[5:])


@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
def test_a_bias_is_broadcast_along_any_dimension(monkeypatch, batch):
    torch.manual_seed(0)
    monkeypatch.setattr(functional, "_chunk_size", lambda device: 8)
    query, key, coefficients = normal(*batch, 2, 3, 4), normal(*batch, 2, 5, 4), normal(2, 2, 2, 5, 3)
    whole = (*batch, 2, 3, 5)
    shapes = {tuple(1 if one else size for one, size in zip(ones, whole, strict=True)) for ones in
              itertools.product((False, True), repeat=len(whole))}  # fmt: skip
    for shape in [*sorted(shapes), (5,), (3, 1), (3, 5), (2, 1, 5)]:
        assert_equal_with_gradients(fourier_sums, plain_fourier_sums, (query, key, coefficients, 0.5, normal(*shape)))


@given(
    batch=st.lists(st.integers(1, 3), max_size=2),
    sizes=st.tuples(*(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7), st.integers(1, 4), st.integers(1, 4))),
    grid_size=st.integers(1, 6),
    chunk_size=st.integers(1, 200),
    seed=st.integers(0, 999),
)
@settings(deadline=None, max_examples=50)
def test_any_shape_gives_the_plain_sums(batch, sizes, grid_size, chunk_size, seed):
    torch.manual_seed(seed)
    heads, rows, columns, width, rank = sizes
    inputs = normal(*batch, heads, rows, width), normal(*batch, heads, columns, width)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "_chunk_size", lambda device: chunk_size)
        assert_equal_with_gradients(
            fourier_sums, plain_fourier_sums, (*inputs, normal(heads, 2, grid_size, columns, rank), 0.8)
        )


@given(
    batch=st.lists(st.integers(1, 3), max_size=2),
    sizes=st.tuples(*(st.integers(1, 3), st.integers(1, 7), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))),
    widths=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    chunk_size=st.integers(1, 200),
    seed=st.integers(0, 999),
)
@settings(deadline=None, max_examples=50)
def test_any_shape_gives_the_plain_sums_and_softmax_with_terms_of_a_grid(batch, sizes, widths, chunk_size, seed):
    torch.manual_seed(seed)
    heads, rows, height, width, rank = sizes
    query, key, value = (
        normal(*batch, heads, n, d)
        for n, d in ((rows, widths[0]), (height * width, widths[0]), (height * width, widths[1]))
    )
    terms = normal(*batch, heads, rows, height), normal(*batch, heads, rows, width)
    inputs = query, key, normal(heads, 2, 2, height * width, rank), 0.8, value, None, *terms
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "_chunk_size", lambda device: chunk_size)
        assert_equal_with_gradients(sums_and_softmax, plain_sums_and_softmax, inputs)


@pytest.fixture
def threads(monkeypatch):
    """Sets the number of threads for one test, in which a few scores are enough for all of them."""
    monkeypatch.setattr(functional, "_chunk_size", lambda device: 8)
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# Fewer threads than the 3 heads, as many, and more.
@pytest.mark.parametrize("num_threads", [2, 3, 8])
@pytest.mark.parametrize("bias_heads", [1, 3])
def test_heads_may_be_shared_among_threads(threads, num_threads, bias_heads):
    torch.manual_seed(0)
    inputs = normal(2, 3, 6, 4), normal(2, 3, 5, 4), normal(3, 2, 2, 5, 3), 0.7, normal(bias_heads, 6, 5)
    threads(num_threads)
    assert_equal_with_gradients(fourier_sums, plain_fourier_sums, inputs)
    assert torch.get_num_threads() == num_threads
    with torch.inference_mode():
        torch.testing.assert_close(fourier_sums(*inputs), plain_fourier_sums(*inputs))


def test_heads_shared_among_threads_give_softmax_and_terms_of_a_grid(threads):
    torch.manual_seed(0)
    query, key, value, terms = (
        normal(2, 3, 6, 4),
        normal(2, 3, 6, 4),
        normal(2, 3, 6, 4),
        (
            normal(2, 3, 6, 2),
            normal(2, 3, 6, 3),
        ),
    )
    threads(2)
    inputs = query, key, normal(3, 2, 2, 6, 3), 0.7, value, None, *terms
    assert_equal_with_gradients(sums_and_softmax, plain_sums_and_softmax, inputs)


def test_threads_may_take_heads_at_the_same_moment(threads):
    """With hundreds of heads and Python switching threads all the time."""
    torch.manual_seed(0)
    inputs = normal(1, 400, 3, 2), normal(1, 400, 3, 2), normal(400, 2, 1, 3, 2), 1.0
    threads(2)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(5):
            torch.testing.assert_close(fourier_sums(*inputs), plain_fourier_sums(*inputs))
    finally:
        sys.setswitchinterval(before)


def test_attention_works_in_a_thread_that_outlives_the_main_one():
    code = """
import threading
import time
import torch
from karat_det.attention.functional import fourier_sums
torch.set_num_threads(2)

def work():
    threading.main_thread().join()
    inputs = torch.rand(8, 4, 196, 16), torch.rand(8, 4, 196, 16), torch.rand(4, 2, 1, 196, 6), 0.1
    print(fourier_sums(*inputs).shape)

threading.Thread(target=work).start()
"""
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert "torch.Size([8, 4, 196, 6])" in output.stdout and not output.stderr


def test_an_error_in_a_thread_is_not_lost_and_their_number_stays(threads):
    threads(2)
    query, coefficients = normal(2, 3, 6, 4), normal(3, 2, 2, 5, 3)
    with pytest.raises(RuntimeError):
        fourier_sums(query, query, coefficients, 1.0)  # 6 keys, functions for 5
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("with_grid", [False, True])
def test_operators_are_what_torch_compile_is_told_of_them(residual, with_grid):
    torch.manual_seed(0)
    query, key, value, coefficients = normal(2, 3, 6, 4), normal(2, 3, 6, 4), normal(2, 3, 6, 5), normal(3, 2, 2, 6, 3)
    terms = (normal(2, 3, 6, 2), normal(2, 3, 6, 3)) if with_grid else (None, None)
    inputs = (
        query,
        key,
        coefficients,
        0.7,
        None if with_grid else normal(1, 3, 6, 6),
        *terms,
        value if residual else None,
    )
    tests = "test_schema", "test_faketensor"
    torch.library.opcheck(functional._fourier_sums_operator, inputs, test_utils=tests)
    sums, attended, log_totals = functional._fourier_sums(*inputs)
    backward = torch.randn_like(sums), torch.randn_like(attended), *inputs, attended, log_totals, not with_grid
    torch.library.opcheck(functional._fourier_sums_backward_operator, backward, test_utils=tests)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="wants os.fork")
def test_a_forked_process_starts_threads_of_its_own():
    code = """
import os
import torch
from karat_det.attention.functional import fourier_sums
torch.set_num_threads(2)
inputs = torch.rand(8, 4, 196, 16), torch.rand(8, 4, 196, 16), torch.rand(4, 2, 1, 196, 6), 0.1
with torch.inference_mode():
    expected = fourier_sums(*inputs)
    child = os.fork()
    if child == 0:
        os._exit(int(not torch.equal(fourier_sums(*inputs), expected)))
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_query_and_key_may_be_views_of_one_projection():
    torch.manual_seed(1)
    qkv, coefficients = normal(2, 6, 3, 2, 4), normal(2, 2, 2, 6, 3)

    def through(sums):
        def function(qkv, coefficients):
            query, key, _ = qkv.permute(2, 0, 3, 1, 4)
            return sums(query, key, coefficients.mT.contiguous().mT, 0.5)

        return function

    assert_equal_with_gradients(through(fourier_sums), through(plain_fourier_sums), (qkv, coefficients))


def test_an_expanded_gradient_is_that_of_every_number():
    inputs = normal(2, 3, 4), normal(2, 5, 4), normal(2, 2, 2, 5, 3)
    gradients = [torch.autograd.grad(f(*inputs, 0.5).sum(), inputs) for f in (fourier_sums, plain_fourier_sums)]
    for gradient, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, expected)


def test_gradients_pass_gradcheck():
    torch.manual_seed(2)
    inputs = normal(2, 2, 3, 2), normal(2, 2, 4, 2), normal(2, 2, 3, 4, 2), 0.7, normal(2, 1, 4)
    assert torch.autograd.gradcheck(fourier_sums, inputs)
    inputs = *inputs[:4], normal(2, 2, 4, 3), normal(2, 1, 4), normal(2, 2, 3, 2), normal(2, 2, 3, 2)
    assert torch.autograd.gradcheck(sums_and_softmax, inputs)


def test_it_is_differentiable_once():
    query, coefficients = normal(2, 3, 4), normal(2, 2, 2, 3, 3)
    sums = fourier_sums(query, query, coefficients, 0.5)
    (gradient,) = torch.autograd.grad(sums.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_softmax_of_huge_scores_is_finite():
    """Of which the exponentials, and those of 1e4 less, are not."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 5, 4, requires_grad=True) for _ in range(3))
    coefficients, bias = torch.zeros(2, 2, 1, 5, 3), torch.tensor([1e4, -1e4])[:, None, None]
    _, attended = fourier_sums(query, key, coefficients, 300.0, bias, value)
    expected = (300.0 * query @ key.mT + bias).softmax(dim=-1) @ value
    torch.testing.assert_close(attended, expected, atol=1e-3, rtol=1e-3)
    gradients = [torch.autograd.grad(x.sum(), (query, key, value)) for x in (attended, expected)]
    for gradient, expected_gradient in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, atol=0.05, rtol=0.01)


@pytest.mark.parametrize("wanted", [True, False])
def test_the_gradient_of_a_bias_is_computed_only_where_it_is_wanted(monkeypatch, wanted):
    backward, returned = functional._fourier_sums_backward, []

    def spy(*arguments):
        returned[:] = backward(*arguments)
        return tuple(returned)

    monkeypatch.setattr(functional, "_fourier_sums_backward", spy)
    query, key, coefficients = normal(2, 3, 4), normal(2, 5, 4), normal(2, 2, 2, 5, 3)
    bias = normal(3, 5).detach().requires_grad_(wanted)
    fourier_sums(query, key, coefficients, 0.5, bias).sum().backward()
    assert returned[3].numel() == (15 if wanted else 0)
    assert (bias.grad is not None) == wanted


def test_float32_sums_are_as_exact_as_float32_is():
    torch.manual_seed(3)
    inputs = 3 * torch.randn(1, 2, 64, 16), torch.randn(1, 2, 64, 16), torch.randn(2, 2, 6, 64, 4)
    exact = plain_fourier_sums(*(x.double() for x in inputs), 0.25)
    assert (fourier_sums(*inputs, 0.25) - exact).abs().max() < 3e-5 * exact.abs().max()


@pytest.mark.parametrize("chunk_size", [10**6, 20, 1])
def test_by_rows_is_the_function_itself(monkeypatch, chunk_size):
    torch.manual_seed(4)
    monkeypatch.setattr(functional, "_chunk_size", lambda device, per_thread: chunk_size)
    rows_seen = []

    def function(x, mask, missing, weight, unused, none):
        assert missing is none is None
        rows_seen.append(x.shape[-2])
        return (x.sin() * mask) @ weight.exp()

    mask = torch.rand(2, 7, 4) < 0.5
    inputs = normal(2, 7, 4), normal(4, 3), normal(2)

    def chunked(x, weight, unused):
        return by_rows(function, [x, mask, None], [weight, unused, None], 8)

    result = chunked(*inputs)
    assert rows_seen == {10**6: [7], 20: [2, 2, 2, 1], 1: [1] * 7}[chunk_size]
    torch.testing.assert_close(result, function(inputs[0], mask, None, inputs[1], None, None))
    assert torch.autograd.gradcheck(chunked, inputs)
    # Where not all tensors learn, nothing is computed for the others.
    frozen = inputs[1].detach()
    assert_equal_with_gradients(
        lambda x: chunked(x, frozen, inputs[2]), lambda x: function(x, mask, None, frozen, None, None), inputs[:1]
    )


def test_by_rows_recomputes_in_the_precision_of_the_forward_pass():
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(8, 2, requires_grad=True)
    (expected,) = torch.autograd.grad((x @ weight).sin().sum(), x)
    result = by_rows(lambda x, weight: (x @ weight).sin(), [x], [weight], 1)
    with torch.autocast("cpu", torch.bfloat16):
        (gradient,) = torch.autograd.grad(result.sum(), x)
    torch.testing.assert_close(gradient, expected)


def bytes_kept(function, *inputs):
    """Bytes that autograd keeps for the backward pass, storages counted once."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function(*inputs)
    assert result.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize("grid_size", [1, 3])
def test_attend_keeps_fewer_bytes_than_softmax_attention(grid_size):
    operator = KArAtOperator(12, 196, KArAtConfig(grid_size=grid_size, rank=12))
    inputs = [torch.randn(8, 12, 196, 64, requires_grad=True) for _ in range(3)]
    softmax = bytes_kept(torch.nn.functional.scaled_dot_product_attention, *inputs)
    assert bytes_kept(operator.attend, *inputs) <= 0.9 * softmax


def test_attend_keeps_no_bias_that_is_written_out():
    operator = KArAtOperator(12, 196, KArAtConfig(residual="softmax"))
    inputs = [torch.randn(8, 12, 196, 64, requires_grad=True) for _ in range(3)]
    terms = [torch.randn(8, 12, 196, 14, requires_grad=True) for _ in range(2)]
    softmax = bytes_kept(torch.nn.functional.scaled_dot_product_attention, *inputs)
    kept = bytes_kept(lambda *inputs: operator.attend(*inputs[:3], Bias(None, *inputs[3:])), *inputs, *terms)
    assert kept <= 1.15 * softmax + sum(term.untyped_storage().nbytes() for term in terms)


@pytest.mark.parametrize("fields", [{"basis": basis} for basis in ("bspline", "rational", "morlet")] + [
    {"basis": "rational", "order": "project_before"},
    {"basis": "rational", "order": "two_operators"},
    {"basis": "fourier", "order": "two_operators"},
    {"basis": "rational", "rank": None},
    {"basis": "bspline", "rank": None},
    {"base_function": "gelu"},
], ids=str)  # fmt: skip
def test_attend_keeps_neither_scores_nor_functions_of_them(fields):
    operator = KArAtOperator(2, 128, KArAtConfig(**{"rank": 4, **fields}))
    inputs = [torch.randn(4, 2, 128, 4, requires_grad=True) for _ in range(3)]
    parameters = sum(4 * parameter.numel() for parameter in operator.parameters())
    scores = 4 * 4 * 2 * 128**2
    # Parameters and what they are with their fixed factors.
    assert bytes_kept(operator.attend, *inputs) < 2 * parameters + 0.75 * scores


PEAK = """
import ctypes, sys, torch
from karat_det.attention import KArAtConfig, KArAtOperator, functional
from karat_det.attention.functional import Bias

def read(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(key))

def added(num_tokens, grid=(), **fields):
    operator = KArAtOperator(1, num_tokens, KArAtConfig(**fields))
    inputs = [torch.randn(1, 1, num_tokens, 16, requires_grad=True) for _ in range(3)]
    inputs.append(Bias(None, *(torch.randn(1, 1, num_tokens, side, requires_grad=True) for side in grid)))
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = read("VmRSS")
    operator.attend(*inputs).sum().backward()
    return read("VmHWM") - before

added(64), added(64, (8, 8), residual="softmax"), added(64, basis="rational")
fourier = added(2048), added(4096)
fourier += added(2048, (32, 64), residual="softmax"), added(4096, (64, 64), residual="softmax")
functional._chunk_size = lambda device, per_thread: 2**16
print(*fourier, added(512, basis="rational"), added(1024, basis="rational"))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_peak_memory_grows_with_n_and_not_with_its_square():
    """In megabytes of the process, since what is freed in small pieces is not always given back."""
    output = subprocess.run([sys.executable, "-c", PEAK], check=True, capture_output=True, text=True).stdout
    *fourier, rational_half, rational_whole = (float(word) for word in output.split())
    for half, whole in (fourier[:2], fourier[2:]):
        assert whole < 2.3 * half
        assert whole < 4096**2 * 4 / 2**20, "a matrix of scores"
    assert rational_whole < 2.3 * rational_half
    assert rational_whole < 1024**2 * 12 * 4 / 2**20, "N²·r"
