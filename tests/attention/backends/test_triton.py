"""The Triton kernels, without a GPU: what they compute, by Triton's interpreter, and what they compile to."""

import re
import subprocess
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

triton = pytest.importorskip("triton", reason="Triton comes with PyTorch's CUDA builds for Linux, and this is another")

from triton.backends.compiler import GPUTarget  # noqa: E402

from karat_det.attention import Bias  # noqa: E402
from karat_det.attention.backends import triton as kernels  # noqa: E402

# What a kernel may have of it on GPUs of compute capability 8.6, 8.9 and 12.0.
SMALLEST_SHARED_MEMORY = 99 * 1024
LAUNCHED = ("_forward_kernel", "_query_gradient_kernel", "_key_gradient_kernel")


def plain_sums(query, key, coefficients, scale, bias=None):
    """The equation as it is written, with all scores and features in memory."""
    scores = scale * query @ key.transpose(-2, -1)
    if bias is not None:
        scores = scores + bias
    terms = [
        (m * scores).cos() @ coefficients[:, 0, m - 1] + (m * scores).sin() @ coefficients[:, 1, m - 1]
        for m in range(1, coefficients.shape[2] + 1)
    ]
    return sum(terms)


def make_inputs(batch, heads, num_tokens, width, grid_size, rank, bias_shape=None, dtype=torch.float32):
    """Query and key, as a layer that makes query, key and value in one leaves them, coefficients and bias."""
    torch.manual_seed(0)
    fused = torch.randn(*batch, num_tokens, 3, heads, width, dtype=dtype)
    query, key, _ = fused.movedim(-3, 0).transpose(-3, -2).unbind(0)
    coefficients = torch.randn(heads, 2, grid_size, num_tokens, rank) * (num_tokens * grid_size) ** -0.5
    bias = None if bias_shape is None else torch.randn(bias_shape)
    return [None if tensor is None else tensor.requires_grad_() for tensor in (query, key, coefficients, bias)]


def assert_like_plain(inputs, tolerance, scale=0.3):
    """Values and all gradients differ from the plain version's in float64 by tolerance × their largest at most."""
    query, key, coefficients, bias = inputs
    given_inputs = [tensor for tensor in inputs if tensor is not None]
    sums = kernels.fourier_sums(query, key, coefficients, scale, Bias(bias))
    sums_gradient = torch.randn(sums.shape)
    gradients = torch.autograd.grad(sums, given_inputs, sums_gradient)

    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in given_inputs]
    exact_sums = plain_sums(*exact_inputs[:3], scale, *exact_inputs[3:])
    exact_gradients = torch.autograd.grad(exact_sums, exact_inputs, sums_gradient.double())

    assert sums.dtype == torch.float32
    assert [(g.dtype, g.shape) for g in gradients] == [(x.dtype, x.shape) for x in given_inputs]
    for actual, exact in zip([sums, *gradients], [exact_sums, *exact_gradients], strict=True):
        assert actual.shape == exact.shape
        assert (actual - exact).abs().max() <= tolerance * exact.abs().max()


@pytest.mark.parametrize(
    "batch, heads, num_tokens, width, grid_size, rank, bias_shape",
    [
        ((), 1, 70, 92, 1, 12, None),  # several tiles of queries and of keys, none full at the end
        ((1,), 1, 32, 64, 3, 12, None),
        ((), 2, 33, 20, 2, 5, None),
        ((2, 2), 2, 9, 8, 3, 1, None),
        ((), 2, 21, 20, 2, 17, (2, 21, 21)),
        ((2,), 2, 11, 8, 1, 5, (2, 11, 11)),
        ((2,), 2, 11, 8, 3, 5, (2, 1, 11, 11)),
        ((2,), 2, 11, 8, 1, 5, (11, 11)),
        ((2, 3), 1, 11, 8, 1, 5, (3, 1, 11, 11)),
        ((2, 2), 1, 11, 8, 1, 5, (2, 1, 1, 1, 11)),
        ((2, 2, 2), 1, 7, 8, 1, 5, (2, 1, 7, 7)),
    ],
)
def test_sums_and_gradients_are_the_plain_ones(
    interpreted, batch, heads, num_tokens, width, grid_size, rank, bias_shape
):
    assert_like_plain(make_inputs(batch, heads, num_tokens, width, grid_size, rank, bias_shape), tolerance=2e-6)


# The fixture may well stay the same for all examples.
@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_sums_and_gradients_are_the_plain_ones_for_any_sizes(interpreted, data):
    num_tokens = data.draw(st.integers(1, 36), "num_tokens")
    batch = data.draw(st.sampled_from([(), (1,), (2,), (1, 2), (2, 1)]), "batch")
    heads = data.draw(st.integers(1, 2), "heads")
    width = data.draw(st.integers(1, 40), "width")
    grid_size = data.draw(st.integers(1, 4), "grid_size")
    rank = data.draw(st.integers(1, min(20, num_tokens)), "rank")
    assert_like_plain(make_inputs(batch, heads, num_tokens, width, grid_size, rank), tolerance=5e-6)


def everything(query, key, coefficients, scale, bias, vertical, horizontal, mask):
    """The equation with the terms of a grid written out key by key, and a mask."""
    width = horizontal.shape[-1]
    terms = [vertical[..., q // width] + horizontal[..., q % width] for q in range(key.shape[-2])]
    scores = scale * query @ key.mT + bias + torch.stack(terms, dim=-1)
    return sum(
        (wave(m * scores) * mask) @ coefficients[:, part, m - 1]
        for m in range(1, coefficients.shape[2] + 1)
        for part, wave in enumerate((torch.cos, torch.sin))
    )


@pytest.mark.parametrize("mask_shape", [(2, 1, 42, 42), (2, 42, 42), (1, 42)], ids=str)
@pytest.mark.parametrize("grid", [(6, 7), (21, 2)], ids=str)
def test_terms_of_a_grid_and_masks_are_in_the_kernels(interpreted, grid, mask_shape):
    query, key, coefficients, bias = make_inputs((2,), 2, 42, 20, 2, 5, (42, 42))
    terms = [torch.randn(2, 2, 42, side, requires_grad=True) for side in grid]
    mask = torch.rand(mask_shape) < 0.6
    leaves = [query, key, coefficients, bias, *terms]
    sums = kernels.fourier_sums(*leaves[:3], 0.3, Bias(*leaves[3:]), mask)
    gradient = torch.randn(sums.shape)
    gradients = torch.autograd.grad(sums, leaves, gradient)
    exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
    exact_sums = everything(*exact_leaves[:3], 0.3, *exact_leaves[3:], mask)
    exact_gradients = torch.autograd.grad(exact_sums, exact_leaves, gradient.double())
    for actual, exact in zip([sums, *gradients], [exact_sums, *exact_gradients], strict=True):
        assert actual.shape == exact.shape
        assert (actual - exact).abs().max() <= 2e-6 * exact.abs().max()
    tests = "test_schema", "test_faketensor"
    inputs = query[..., :16], key[..., :16], torch.randn(2, 2, 1, 42, 16), 0.3, None, *terms, mask
    torch.library.opcheck(kernels._score_sums, inputs, test_utils=tests)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_narrow_inputs_round_the_factors_of_products_only(interpreted, dtype, tolerance):
    """Scores reach 36 here: in bfloat16 they, and their phases, would be wrong by up to 0.125."""
    inputs = make_inputs((2,), 1, 50, 92, 3, 12, (50, 50), dtype)
    assert (inputs[0] @ inputs[1].transpose(-2, -1)).abs().max() > 36
    assert_like_plain(inputs, tolerance, scale=1.0)


def test_phases_far_from_zero_keep_their_precision(interpreted):
    """A float32 score of 1000 is exact to 3e-5, and its sine must be, too."""
    query, key, coefficients, _ = make_inputs((), 1, 32, 16, 1, 4)
    bias = 1000 * torch.randn(32, 32)
    sums = kernels.fourier_sums(0 * query, key, coefficients, 1.0, Bias(bias))
    exact = plain_sums(0 * query.double(), key.double(), coefficients.double(), 1.0, bias.double())
    assert (sums - exact).abs().max() < 2e-6


def test_the_batch_split_over_programs_sums_to_the_whole_gradient(interpreted, monkeypatch):
    inputs = make_inputs((3,), 1, 16, 16, 1, 3)
    for enough_programs in (1, 2, 3):  # 3, 2 and 1 batch elements a program
        monkeypatch.setattr(kernels, "_ENOUGH_PROGRAMS", enough_programs)
        assert_like_plain(inputs, tolerance=2e-6)


def test_results_are_the_same_in_each_run(interpreted):
    query, key, coefficients, _ = make_inputs((2,), 1, 20, 16, 2, 3)
    runs = []
    for _ in range(2):
        sums = kernels.fourier_sums(query, key, coefficients, 0.3)
        runs.append([sums, *torch.autograd.grad(sums.square().sum(), (query, key, coefficients))])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_nothing_of_n_squared_is_kept_or_made(interpreted, monkeypatch):
    query, key, coefficients, _ = make_inputs((), 1, 64, 8, 1, 3)
    bias_of_keys = torch.randn(64)
    kept, made = [], []
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: made.append(new_empty(*a, **k)) or made[-1])
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        sums = kernels.fourier_sums(query, key, coefficients, 0.3, Bias(bias_of_keys))
    sums.sum().backward()
    assert bias_of_keys.data_ptr() in [tensor.data_ptr() for tensor in kept]
    assert sums.untyped_storage().data_ptr() in [tensor.untyped_storage().data_ptr() for tensor in made]
    assert max(tensor.untyped_storage().nbytes() for tensor in kept + made) < 64 * 64 * 4


@pytest.mark.parametrize("bias_shape", [None, (1, 17, 17)])
def test_it_is_a_well_formed_operator(interpreted, bias_shape):
    query, key, coefficients, bias = make_inputs((2,), 1, 17, 16, 1, 16, bias_shape)
    torch.library.opcheck(kernels._score_sums, (query, key, coefficients, 0.3, bias, None, None, None))


def test_compile_meets_no_graph_break(interpreted):
    inputs = make_inputs((2,), 2, 17, 20, 2, 5, (2, 17, 17))
    compiled = torch.compile(kernels.fourier_sums, backend="aot_eager", fullgraph=True)
    results = []
    for function in (kernels.fourier_sums, compiled):
        sums = function(inputs[0], inputs[1], inputs[2], 0.3, Bias(inputs[3]))
        results.append([sums, *torch.autograd.grad(sums.square().sum(), inputs)])
    for eager, of_graph in zip(*results, strict=True):
        torch.testing.assert_close(of_graph, eager)


class CompileOnly:
    """Takes a kernel's place: each launch compiles it for a target, as it would be for a GPU, and does no more."""

    def __init__(self, kernel, compiled):
        self.kernel, self.compiled = kernel, compiled

    def __getitem__(self, programs):
        return lambda *args, **options: self.compiled.append(self.kernel.warmup(*args, grid=programs, **options))


def compile_kernels(monkeypatch, capability, inputs, scale, terms=()):
    """The kernels of a forward and backward pass, compiled for GPUs of a compute capability, as 86 for 8.6."""
    target = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: capability,
        get_current_stream=lambda device: 0,
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", target)
    compiled = []
    for name in LAUNCHED:
        monkeypatch.setattr(kernels, name, CompileOnly(getattr(kernels, name), compiled))
    query, key, coefficients, bias = inputs
    kernels.fourier_sums(query, key, coefficients, scale, Bias(bias, *terms)).sum().backward()
    assert [kernel.metadata.name for kernel in compiled] == list(LAUNCHED)
    return compiled


COMPILED = [
    (196, 64, 1, torch.bfloat16, None),
    (196, 64, 3, torch.bfloat16, None),
    (196, 64, 1, torch.bfloat16, (14, 14)),
    (196, 64, 3, torch.float32, (14, 14)),
    (4096, 64, 1, torch.bfloat16, (64, 64)),
    (49, 32, 1, torch.bfloat16, "full"),
]


@pytest.mark.parametrize(
    "capability, num_tokens, width, grid_size, dtype, bias",
    # An older GPU gets those that need most registers and shared memory.
    [*((90, *sizes) for sizes in COMPILED), *((80, *sizes) for sizes in COMPILED[3:])],
)
def test_kernels_compile_for_gpus(monkeypatch, tmp_path, capability, num_tokens, width, grid_size, dtype, bias):
    """As launched at the sizes of ViT-Base and of Swin, with the compiler and assembler that Triton ships."""
    bias_shape = (12, num_tokens, num_tokens) if bias == "full" else None
    inputs = make_inputs((1,), 12, num_tokens, width, grid_size, 12, bias_shape, dtype)
    grid = bias if isinstance(bias, tuple) else ()
    terms = [torch.randn(1, 12, num_tokens, side, requires_grad=True) for side in grid]
    compiled = compile_kernels(monkeypatch, capability, inputs, width**-0.5, terms)

    for kernel in compiled:
        code = kernel.asm["cubin"]
        path = tmp_path / "kernel.cubin"
        path.write_bytes(code)
        report = subprocess.check_output([triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", path], text=True)
        # What registers do not hold is spilled to the stack, of which the kernels have no other use.
        registers, spilled = (int(re.search(rf"{name}:(\d+)", report)[1]) for name in ("REG", "STACK"))
        print(
            f"sm_{capability}, N {num_tokens}, d {width}, G {grid_size}, {dtype}, {kernel.metadata.name}: "
            f"{registers} registers and {spilled} bytes of spills a thread, {kernel.metadata.shared / 1024:.0f} KiB "
            f"shared memory, {len(code) / 1024:.0f} KiB of machine code"
        )
        # The sums along rows and columns of a grid stay in registers too, and drive out some other values.
        assert spilled <= (450 if grid else 0)
        assert kernel.metadata.shared <= SMALLEST_SHARED_MEMORY
        assert len(code) < 200 * 1024


def test_the_largest_sizes_that_can_run_fit_the_smallest_shared_memory(monkeypatch):
    # Of all with d = 256 and G · r = 128 these take most.
    inputs = make_inputs((2,), 2, 160, 256, 1, 128, (2, 160, 160))
    compiled = compile_kernels(monkeypatch, 86, inputs, scale=0.1)
    assert max(kernel.metadata.shared for kernel in compiled) <= SMALLEST_SHARED_MEMORY


@pytest.mark.parametrize(
    "changed, runs",
    [
        ({}, True),
        ({"width": 256}, True),
        ({"width": 257}, False),
        ({"rank": 128}, True),
        ({"rank": 129}, False),
        ({"rank": 33, "grid_size": 2}, True),
        ({"rank": 33, "grid_size": 3}, False),
        ({"grid_size": 8}, True),
        ({"grid_size": 9}, False),
        ({"dtype": torch.bfloat16}, True),
        ({"dtype": torch.float64}, False),
        ({"is_cuda": False}, False),
        ({"capability": (8, 0)}, True),
        ({"capability": (7, 5)}, False),
    ],
)
def test_the_kernels_run_for_sizes_and_gpus_that_they_are_made_for(monkeypatch, changed, runs):
    given = {"width": 64, "grid_size": 1, "rank": 12, "dtype": torch.float32, "is_cuda": True, "capability": (8, 6)}
    given |= changed
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: given["capability"])
    query = SimpleNamespace(
        is_cuda=given["is_cuda"], dtype=given["dtype"], device="cuda:0", shape=(2, 3, 49, given["width"])
    )
    coefficients = torch.empty(3, 2, given["grid_size"], 49, given["rank"], device="meta")
    assert kernels.can_run(query, query, coefficients, None, None, None) == runs
