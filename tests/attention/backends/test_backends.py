"""Sums over scores and products with values: each back end beside the equation, in value and every gradient."""

import itertools
import tempfile
from pathlib import Path

import pytest
import torch
from forked_command import run_command
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from karat_det.attention import Bias, KArAtConfig, KArAtOperator, backends
from karat_det.attention.backends import cpu, plain

needs_compiler = pytest.mark.skipif(not cpu.is_available(), reason="no C++ compiler, so the CPU has the plain back end")


@pytest.fixture(params=["plain", pytest.param("cpu", marks=needs_compiler)])
def dtype(request, monkeypatch):
    """The type of the inputs, which decides on the back end; a plain chunk is of 60 elements, or some rows."""
    monkeypatch.setattr(plain, "_CHUNK_OF_THREAD", 60 // torch.get_num_threads())
    return {"plain": torch.float64, "cpu": torch.float32}[request.param]


def equation(query, key, coefficients, scale, bias=None, mask=None, value=None):
    """Φ̂[A], and softmax(A) V, as they are written, key by key for the terms of a grid."""
    full, vertical, horizontal = bias or Bias()
    scores = scale * query @ key.mT
    if full is not None:
        scores = scores + full
    if vertical is not None:
        width = horizontal.shape[-1]
        terms = [vertical[..., q // width] + horizontal[..., q % width] for q in range(key.shape[-2])]
        scores = scores + torch.stack(terms, dim=-1)
    seen = torch.ones_like(scores) if mask is None else mask.expand(scores.shape).to(scores.dtype)
    sums = sum(
        (wave(m * scores) * seen) @ coefficients[:, part, m - 1]
        for m in range(1, coefficients.shape[2] + 1)
        for part, wave in enumerate((torch.cos, torch.sin))
    )
    if value is None:
        return sums
    weights = (scores - scores.amax(dim=-1, keepdim=True)).exp() * seen
    return sums, weights / weights.sum(dim=-1, keepdim=True) @ value


def attention(query, key, value, coefficients, projector, factor, scale, bias=None, mask=None, residual=False):
    """(f Φ̂[A] Wᵀ ∘ mask) V, + softmax(A) V."""
    units, softmax = equation(query, key, coefficients, scale, bias, mask, value)
    activated = factor * units @ projector.mT
    output = (activated if mask is None else activated * mask) @ value
    return output + softmax if residual else output


def results(function, inputs, dtype):
    """What a function makes of inputs in a type, tuples of tensors among them, and the gradients of all floats."""
    leaves = []

    def leaf(x):
        if isinstance(x, Bias):
            return Bias(*map(leaf, x))
        if not isinstance(x, torch.Tensor) or x.dtype == torch.bool:
            return x
        leaves.append(x.detach().to(dtype).requires_grad_())
        return leaves[-1]

    outputs = function(*map(leaf, inputs))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator).to(dtype) for x in outputs]
    gradients = torch.autograd.grad(outputs, leaves, weights)
    assert [(x.shape, x.dtype) for x in gradients] == [(x.shape, x.dtype) for x in leaves]
    return [*outputs, *gradients]


def assert_same(function, expected, inputs, dtype):
    for actual, exact in zip(results(function, inputs, dtype), results(expected, inputs, torch.float64), strict=True):
        assert actual.shape == exact.shape
        tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
        assert (actual - exact).abs().max() <= tolerance * exact.abs().max().clamp(min=1)


def make_inputs(batch, heads, rows, keys, width, grid_size, rank, values=None):
    query, key = torch.randn(*batch, heads, rows, width), torch.randn(*batch, heads, keys, width)
    value = None if values is None else torch.randn(*batch, heads, keys, values)
    return query, key, torch.randn(heads, 2, grid_size, keys, rank), 0.7 / width**0.5, value


def make_mask(*shape):
    """Random, but each query sees some key."""
    return (torch.rand(*shape) < 0.6) | (torch.arange(shape[-1]) == 0)


# Sizes at, below and above those of vectors, blocks of products and tiles.
@pytest.mark.parametrize("keys", [1, 16, 57, 130])
@pytest.mark.parametrize("rows", [1, 64, 65])
@pytest.mark.parametrize(("width", "grid_size", "rank"), [(1, 1, 1), (16, 3, 12), (33, 2, 17), (20, 6, 5)])
def test_sums_and_softmax_are_those_of_the_equation(dtype, rows, keys, width, grid_size, rank):
    torch.manual_seed(0)
    *inputs, value = make_inputs((2,), 2, rows, keys, width, grid_size, rank, values=width + 3)
    assert_same(backends.fourier_sums, equation, inputs, dtype)
    assert_same(backends.fourier_sums, equation, (*inputs, None, None, value), dtype)


@pytest.mark.parametrize("batch", [(), (3,), (2, 2)], ids=str)
@pytest.mark.parametrize("with_value", [False, True])
@pytest.mark.parametrize("with_grid", [False, True])
def test_a_bias_and_a_mask_are_broadcast_along_any_dimension(dtype, batch, with_value, with_grid):
    torch.manual_seed(0)
    *inputs, value = make_inputs(batch, 2, 3, 6, 4, 2, 3, values=5 if with_value else None)
    terms = (torch.randn(*batch, 2, 3, 2), torch.randn(*batch, 2, 3, 3)) if with_grid else (None, None)
    whole = (*batch, 2, 3, 6)
    shapes = {tuple(1 if one else size for one, size in zip(ones, whole, strict=True)) for ones in
              itertools.product((False, True), repeat=len(whole))}  # fmt: skip
    for shape in [*sorted(shapes), (6,), (3, 1), (3, 6), (2, 1, 6)]:
        bias = Bias(torch.randn(shape), *terms)
        assert_same(backends.fourier_sums, equation, (*inputs, bias, None, value), dtype)
        mask = make_mask(*shape) if shape[-1] > 1 else torch.ones(shape, dtype=torch.bool)
        assert_same(backends.fourier_sums, equation, (*inputs, Bias(None, *terms), mask, value), dtype)


@settings(deadline=None, max_examples=60, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.lists(st.integers(1, 3), max_size=2),
    heads=st.integers(1, 3),
    rows=st.integers(1, 70),
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    sizes=st.tuples(*[st.integers(1, 20)] * 2, st.integers(1, 6), st.integers(1, 18)),
    options=st.sets(st.sampled_from(["value", "grid", "full", "mask"])),
    num_threads=st.integers(1, 5),
)
def test_any_shape_and_number_of_threads(dtype, batch, heads, rows, grid, sizes, options, num_threads):
    torch.manual_seed(rows)
    width, values, grid_size, rank = sizes
    keys = grid[0] * grid[1]
    *inputs, value = make_inputs(batch, heads, rows, keys, width, grid_size, rank, values)
    bias = Bias(
        torch.randn(heads, rows, keys) if "full" in options else None,
        *((torch.randn(*batch, heads, rows, side) if "grid" in options else None) for side in grid),
    )
    mask = make_mask(rows, keys) if "mask" in options else None
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        residual = "value" in options
        assert_same(backends.fourier_sums, equation, (*inputs, bias, mask, value if residual else None), dtype)
        query, key, coefficients, scale = inputs
        projector = torch.randn(heads, keys, rank)
        inputs = query, key, value, coefficients, projector, 0.5, scale, bias, mask, residual
        assert_same(backends.attend, attention, inputs, dtype)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    ("dtype", "num_threads"),
    # Only the compiled back end divides its work by threads.
    [("plain", 2), *(pytest.param("cpu", count, marks=needs_compiler) for count in (1, 2, 3, 8))],
    indirect=["dtype"],
)
def test_attention_with_masks_and_any_share_of_the_work(dtype, num_threads, residual):
    """Masks of Swin's kind, regions of some items; of keys alone; and one that differs from query to query."""
    torch.manual_seed(0)
    query, key, coefficients, scale, value = make_inputs((5,), 2, 70, 70, 20, 2, 12, values=20)
    inputs = query, key, value, coefficients, torch.randn(2, 70, 12), 0.5, scale
    regions = torch.randint(0, 3, (5, 1, 70, 1))
    regions[2] = 0
    masks = None, regions == regions.mT, make_mask(5, 1, 1, 70), make_mask(70, 70), make_mask(2, 1, 1)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for mask in masks:
            assert_same(backends.attend, attention, (*inputs, None, mask, residual), dtype)
    finally:
        torch.set_num_threads(before)


def test_query_key_and_value_may_be_views_of_one_projection(dtype):
    torch.manual_seed(1)

    def of(attend):
        def function(qkv, coefficients, projector):
            query, key, value = qkv.permute(2, 0, 3, 1, 4)
            return attend(query, key, value, coefficients.mT.contiguous().mT, projector, 0.5, 0.5, residual=True)

        return function

    inputs = torch.randn(2, 6, 3, 2, 4), torch.randn(2, 2, 2, 6, 3), torch.randn(2, 6, 3)
    assert_same(of(backends.attend), of(attention), inputs, dtype)


def test_an_expanded_gradient_is_that_of_every_element(dtype):
    inputs = [x.to(dtype).requires_grad_() for x in make_inputs((), 2, 3, 5, 4, 2, 3)[:3]]
    gradients = [torch.autograd.grad(f(*inputs, 0.5).sum(), inputs) for f in (backends.fourier_sums, equation)]
    for gradient, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, expected)


def test_gradients_pass_gradcheck():
    torch.manual_seed(2)
    query, key, coefficients, scale, value = make_inputs((2,), 2, 3, 4, 2, 2, 2, values=3)
    terms = torch.randn(2, 1, 4), torch.randn(2, 2, 3, 2), torch.randn(2, 2, 3, 2)
    inputs = [x.double().requires_grad_() for x in (query, key, coefficients, value, *terms)]

    def sums(query, key, coefficients, value, *terms):
        return plain.fourier_sums(query, key, coefficients, scale, Bias(*terms), make_mask(3, 4), value)

    assert torch.autograd.gradcheck(lambda *inputs: (torch.manual_seed(0), sums(*inputs))[1], inputs)


def test_it_is_differentiable_once(dtype):
    query, coefficients = torch.randn(2, 3, 4, dtype=dtype).requires_grad_(), torch.randn(2, 2, 2, 3, 3, dtype=dtype)
    sums = backends.fourier_sums(query, query, coefficients, 0.5)
    (gradient,) = torch.autograd.grad(sums.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|derivative for .* is not implemented"):
        gradient.sum().backward()


def test_softmax_of_huge_scores_is_finite(dtype):
    """Though the exponentials of the scores are not, nor those of scores that are 1e4 lower."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 5, 4, requires_grad=True) for _ in range(3))
    coefficients, bias = torch.zeros(2, 2, 1, 5, 3), torch.tensor([1e4, -1e4])[:, None, None]
    _, attended = backends.fourier_sums(query, key, coefficients, 300.0, Bias(bias), None, value)
    expected = (300.0 * query @ key.mT + bias).softmax(dim=-1) @ value
    torch.testing.assert_close(attended, expected, atol=1e-3, rtol=1e-3)
    gradients = [torch.autograd.grad(x.sum(), (query, key, value)) for x in (attended, expected)]
    for gradient, expected_gradient in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, atol=0.05, rtol=0.01)


@needs_compiler
def test_sines_and_cosines_of_large_scores_are_exact():
    """To 2e-7 up to |A| = 1,000, for the score as float32 has it; beyond, as exact as the library's; else NaN."""
    scores = torch.cat(
        [torch.linspace(-1000, 1000, 200_003), torch.linspace(-1, 1, 1001), torch.tensor([4096.5, -3e7])]
    )
    one, coefficients = torch.ones(1, 1, 1), torch.eye(2)[:, None, None][None]
    waves = cpu.fourier_sums(scores[None, :, None], one, coefficients, 1.0)[0]  # cosine, sine
    exact = torch.stack([scores.double().cos(), scores.double().sin()], dim=-1)
    assert (waves - exact).abs().max() < 2e-7
    assert cpu.fourier_sums(torch.tensor([[[torch.inf], [torch.nan]]]), one, coefficients, 1.0).isnan().all()


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *[("key", (2, 3, 6, 3)), ("key", (1, 3, 6, 4)), ("coefficients", (3, 2, 2, 5, 3)), ("value", (2, 3, 5, 5))],
        *[("coefficients", (2, 2, 2, 6, 3)), ("vertical", (2, 3, 5, 2)), ("horizontal", (1, 3, 6, 3))],
        *[("full", (3, 6, 5)), ("mask", (2, 1, 5, 6)), ("vertical", (2, 3, 6, 3))],
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_are_refused(name, shape):
    """By the compiled op too, which would read what lies beyond a tensor."""
    query, key, coefficients, scale, value = make_inputs((2,), 3, 6, 6, 4, 2, 3, values=5)
    names = ("query", "key", "coefficients", "full", "vertical", "horizontal", "mask", "value")
    terms = torch.randn(3, 6, 6), torch.randn(2, 3, 6, 2), torch.randn(2, 3, 6, 3)
    inputs = dict(zip(names, (query, key, coefficients, *terms, make_mask(6, 6), value), strict=True))
    inputs[name] = torch.zeros(shape, dtype=inputs[name].dtype)
    query, key, coefficients, *terms, mask, value = inputs.values()
    with pytest.raises(ValueError, match=r"has the shape|grid of the bias"):
        backends.fourier_sums(query, key, coefficients, scale, Bias(*terms), mask, value)
    if cpu.is_available():
        with pytest.raises(ValueError, match=r"has the shape|A grid must"):
            cpu.fourier_sums(query, key, coefficients, scale, Bias(*terms), mask, value)


@needs_compiler
@pytest.mark.parametrize(("with_projector", "residual"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("bias", [None, "full", "grid"])
def test_compiled_ops_are_what_torch_compile_is_told_of_them(with_projector, residual, bias):
    torch.manual_seed(0)
    query, key, coefficients, scale, value = make_inputs((2,), 3, 6, 6, 4, 2, 3, values=5)
    full = torch.randn(1, 3, 6, 6) if bias == "full" else None
    terms = (torch.randn(2, 3, 6, 2), torch.randn(2, 3, 6, 3)) if bias == "grid" else (None, None)
    with_output = with_projector or residual
    inputs = [query, key, coefficients, scale, full, *terms, make_mask(1, 1, 6, 6), value if with_output else None]
    inputs += [torch.randn(3, 6, 3) if with_projector else None, 0.5, residual]
    ops, tests = torch.ops.karat_det, ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.fourier_attention.default, inputs, test_utils=tests)
    units, output, log_totals = ops.fourier_attention(*inputs)
    gradients = torch.randn_like(units.mT), torch.randn_like(output) if with_output else None
    kept = (output, log_totals) if residual else (None, None)
    backward = *gradients, *inputs, units, *kept, bias == "full"
    torch.library.opcheck(ops.fourier_attention_backward.default, backward, test_utils=tests)


def test_a_compiled_operator_is_one_graph():
    torch.manual_seed(0)
    operator = KArAtOperator(2, 12, KArAtConfig(rank=3, residual="softmax"))
    torch.nn.init.normal_(operator.projector)
    inputs = [torch.randn(2, 2, 12, 8, requires_grad=True) for _ in range(3)]
    bias = Bias(None, torch.randn(2, 2, 12, 3), torch.randn(2, 2, 12, 4))
    compiled = torch.compile(operator.attend, fullgraph=True, backend="aot_eager")
    outcomes = []
    for attend in (operator.attend, compiled):
        output = attend(*inputs, bias)
        outcomes.append([output, *torch.autograd.grad(output.square().sum(), [*inputs, *operator.parameters()])])
    for actual, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(actual, expected)


class Attend(torch.nn.Module):
    def __init__(self, operator):
        super().__init__()
        self.operator = operator

    def forward(self, query, key, value, vertical, horizontal):
        return self.operator.attend(query, key, value, Bias(None, vertical, horizontal))


@pytest.mark.parametrize("residual", ["none", "softmax"])
def test_an_exported_operator_is_plain_calls(residual):
    torch.manual_seed(0)
    module = Attend(KArAtOperator(2, 12, KArAtConfig(rank=3, grid_size=2, residual=residual)))
    torch.nn.init.normal_(module.operator.projector)
    inputs = *(torch.randn(1, 2, 12, 8) for _ in range(3)), torch.randn(1, 2, 12, 3), torch.randn(1, 2, 12, 4)
    program = torch.export.export(module, inputs)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [name for name in names if "karat_det" in name]
    torch.testing.assert_close(program.module()(*inputs), module(*inputs))


def test_the_environment_forces_the_plain_back_end(monkeypatch):
    called = []
    monkeypatch.setattr(plain, "fourier_sums", lambda *inputs: called.append(1) or equation(*inputs))
    inputs = make_inputs((), 1, 4, 4, 4, 1, 2)[:4]
    for value, calls in (("", int(not cpu.is_available())), ("plain", 1)):
        called.clear()
        monkeypatch.setenv("KARAT_BACKEND", value)
        backends.fourier_sums(*inputs)
        assert len(called) == calls


COMPILE = """
import logging, torch
logging.basicConfig(format="%(message)s")
from karat_det.attention import KArAtConfig, KArAtOperator
operator, x = KArAtOperator(1, 4, KArAtConfig(rank=2)), torch.randn(1, 1, 4, 8)
for _ in range(2):
    print(operator.attend(x, x, x).shape)
"""


@pytest.mark.parametrize(("compiler", "message"), [
    ("no-such-compiler", "There is no C++ compiler 'no-such-compiler': install g++, or name one by CXX."),
    ("false", "fourier.cpp could not be compiled: see "),
])  # fmt: skip
def test_without_a_compiler_the_plain_back_end_serves_and_the_log_says_so_once(tmp_path, compiler, message):
    (tmp_path / "attend.py").write_text(COMPILE)

    def forget():
        cpu._load.cache_clear()
        tempfile.tempdir = None

    environment = {"CXX": compiler, "TORCH_EXTENSIONS_DIR": str(tmp_path), "TMPDIR": str(tmp_path)}
    run = run_command(tmp_path / "attend", folder=tmp_path, environment=environment, prepare=forget)
    assert not run.returncode, run.stderr
    assert run.stdout.count("torch.Size([1, 1, 4, 8])") == 2
    # On a machine with a CUDA compiler and no GPU, PyTorch has a line of its own.
    (line,) = (line for line in run.stderr.splitlines() if "No CUDA runtime is found" not in line)
    assert line.startswith(message) and line.endswith(cpu.CONSEQUENCE)
    if compiler == "false":
        assert "returned non-zero exit status 1" in Path(line.removeprefix(message).split(". ")[0]).read_text()


@pytest.mark.parametrize("chunk_size", [10**6, 20, 1])
def test_by_rows_is_the_function_itself(monkeypatch, chunk_size):
    torch.manual_seed(4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(plain, "_CHUNK_OF_THREAD", chunk_size)
    rows_seen = []

    def function(x, mask, missing, weight, unused, none):
        assert missing is none is None
        rows_seen.append(x.shape[-2])
        return (x.sin() * mask) @ weight.exp()

    mask = torch.rand(2, 7, 4) < 0.5
    inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 7, 4), (4, 3), (2,))]

    def chunked(x, weight, unused):
        return plain.by_rows(function, [x, mask, None], [weight, unused, None], 8)

    result = chunked(*inputs)
    assert rows_seen == {10**6: [7], 20: [2, 2, 2, 1], 1: [1] * 7}[chunk_size]
    torch.testing.assert_close(result, function(inputs[0], mask, None, inputs[1], None, None))
    assert torch.autograd.gradcheck(chunked, inputs)
    # Where not all tensors learn, nothing is computed for the others.
    x, weight, unused = inputs
    chunked(x, weight.detach(), unused.detach()).sum().backward()
    function(x.detach().requires_grad_(), mask, None, weight, unused, None).sum().backward()
    assert x.grad is not None and unused.grad is None


def test_by_rows_recomputes_in_the_precision_of_the_forward_pass():
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(8, 2, requires_grad=True)
    (expected,) = torch.autograd.grad((x @ weight).sin().sum(), x)
    result = plain.by_rows(lambda x, weight: (x @ weight).sin(), [x], [weight], 1)
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
from karat_det.attention import Bias, KArAtConfig, KArAtOperator
from karat_det.attention.backends import plain

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
fourier = added(4096), added(8192)
fourier += added(4096, residual="softmax"), added(8192, residual="softmax")
fourier += (added(8192, (64, 128), residual="softmax"),)
plain._CHUNK_OF_THREAD = 2**15
print(*fourier, added(512, basis="rational"), added(1024, basis="rational"))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_peak_memory_grows_with_n_and_not_with_its_square(tmp_path):
    """In megabytes of the process, since what is freed in small pieces is not always given back."""
    (tmp_path / "peak.py").write_text(PEAK)
    run = run_command(tmp_path / "peak", folder=tmp_path)
    assert not run.returncode, run.stderr
    output = run.stdout
    *fourier, with_grid, rational_half, rational_whole = (float(word) for word in output.split())
    for half, whole in (fourier[:2], fourier[2:]):
        assert whole < 2.3 * half
    assert max(*fourier, with_grid) < 8192**2 * 4 / 2**20 / 10, "a tenth of a matrix of scores"
    assert rational_whole < 2.3 * rational_half
    assert rational_whole < 1024**2 * 12 * 4 / 2**20, "N²·r"
