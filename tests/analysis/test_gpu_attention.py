"""What a GPU is asked about attention, asked of the CPU, with the Triton kernels in Triton's interpreter."""

import pytest
import torch

from karat_det.analysis import gpu_attention
from karat_det.analysis.benchmark_attention import AttentionShape
from karat_det.analysis.check_runner import FAIL, FOR_THE_RECORD, PASS, SKIPPED
from karat_det.analysis.gpu_attention import (
    LEARNED_BIAS,
    MASK,
    NO_BIAS,
    REL_POS,
    AttentionCase,
    attend,
    attend_exactly,
    check_attention,
    check_compiled_attention,
    check_compiled_backbone,
    check_times,
    largest_error,
)
from karat_det.analysis.measuring import Turns

SCORES = (NO_BIAS, MASK, REL_POS, LEARNED_BIAS)
DTYPES = (torch.float32, torch.bfloat16)


def small(scores, dtype=torch.float32, grid=(3, 5), grid_size=3):
    return AttentionCase(grid, grid_size, dtype, scores, batch_size=2, num_heads=2, head_dim=16, rank=4)


@pytest.fixture
def on_the_cpu(interpreted, monkeypatch):
    """Operators use the kernels for tensors on the CPU."""
    launches = []
    kernels = gpu_attention.backends.triton
    sums = kernels.fourier_sums
    monkeypatch.setattr(gpu_attention.backends.cpu, "can_run", lambda *tensors: False)
    monkeypatch.setattr(kernels, "can_run", lambda *inputs: True)
    monkeypatch.setattr(kernels, "fourier_sums", lambda *inputs: launches.append(inputs) or sums(*inputs))
    return launches


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scores", SCORES)
def test_kernels_and_plain_pytorch_are_compared_with_the_equation(on_the_cpu, scores, dtype):
    (row,) = check_attention("cpu", small(scores, dtype))
    assert row.result == PASS
    assert row.name == f"errors: N = 15, G = 3, {str(dtype)[6:]}, {scores}"
    assert "plain PyTorch " in row.measured
    assert len(on_the_cpu) == 1
    assert row.measured.startswith("kernels ")


@pytest.mark.parametrize("scores", SCORES)
def test_the_equation_is_cut_into_rows_without_a_difference(monkeypatch, scores):
    """Beside autograd through the activated attention of all rows, in float64."""
    case = small(scores, torch.float64, grid_size=2)
    operator = case.make_operator("cpu", triton=False).double()
    learned, mask, gradient = case.make_inputs("cpu")
    learned = {name: x.double() for name, x in learned.items()}
    leaves = {name: x.detach().requires_grad_() for name, x in learned.items()}
    bias = gpu_attention._bias(leaves)
    rows = bias.add_to(0.25 * leaves["query"] @ leaves["key"].transpose(-2, -1))
    output = operator.activate(rows, mask) @ leaves["value"]
    leaves |= dict(operator.named_parameters())
    gradients = torch.autograd.grad(output, list(leaves.values()), gradient)
    expected = {f"gradient of {name}": x for name, x in zip(leaves, gradients, strict=True)}

    exact = attend_exactly(operator, learned, mask, gradient)
    assert exact.keys() == {"output", *expected}
    torch.testing.assert_close(exact, {"output": output.detach(), **expected})
    monkeypatch.setattr(gpu_attention, "_NUMBERS_AT_ONCE", 2 * 2 * 15 * 4)  # four rows
    torch.testing.assert_close(attend_exactly(operator, learned, mask, gradient), exact)


@pytest.mark.parametrize("which", ["kernels", "plain PyTorch"])
def test_a_wrong_gradient_fails_and_is_named(on_the_cpu, monkeypatch, which):
    def attend_wrongly(operator, *inputs):
        results = attend(operator, *inputs)
        if operator.config.triton == (which == "kernels"):
            results["gradient of key"] = 1.001 * results["gradient of key"]
        return results

    monkeypatch.setattr(gpu_attention, "attend", attend_wrongly)
    (row,) = check_attention("cpu", small(NO_BIAS))
    assert row.result == FAIL
    assert f"{which} 1.0e-03 (gradient of key)" in row.measured


def test_products_of_single_tensorfloat32_factors_would_fail(on_the_cpu, monkeypatch):
    def rounded(x):
        return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    kernels = gpu_attention.backends.triton
    sums = kernels.fourier_sums
    monkeypatch.setattr(kernels, "fourier_sums", lambda query, key, *rest: sums(rounded(query), rounded(key), *rest))
    case = AttentionCase((7, 7), 1, torch.float32, NO_BIAS)
    learned, _, gradient = case.make_inputs("cpu")
    learned = {name: x.contiguous() for name, x in learned.items()}
    operator = case.make_operator("cpu", triton=True)
    exact = attend_exactly(operator, learned, None, gradient)
    operator_output = operator.attend(learned["query"], learned["key"], learned["value"]).detach()
    error, _ = largest_error({"output": operator_output}, {"output": exact["output"]})
    assert gpu_attention.TOLERANCES[torch.float32] < error < 1e-2


def test_what_is_not_finite_is_the_largest_error():
    exact = {"a": torch.ones(3), "b": torch.zeros(2)}
    assert largest_error({"a": torch.tensor([1.0, 1.5, 1.0]), "b": torch.zeros(2)}, exact) == (0.5, "a")
    assert largest_error({"a": torch.ones(3), "b": torch.tensor([0.0, float("nan")])}, exact) == (float("inf"), "b")


def test_a_device_without_kernels_skips_them_and_says_why(monkeypatch):
    (row,) = check_attention("cpu", small(REL_POS))
    assert (row.result, row.measured.split("; ")[1]) == (SKIPPED, "no kernels: this is a cpu device")
    monkeypatch.setattr(gpu_attention.backends, "triton", None)
    (row,) = check_attention("cpu", small(REL_POS))
    assert (row.result, row.measured.split("; ")[1]) == (SKIPPED, "no kernels: Triton is not installed")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_times_and_memory_are_over_fused_softmax(dtype):
    shape = AttentionShape(batch_size=2, num_heads=2, grid=(4, 5), head_dim=8, rank=4, bias="rel_pos")
    rows = check_times("cpu", shape, dtype, Turns(repeats=1))
    assert [row.name.split(", over scaled_dot_product_attention: ")[0] for row in rows] == [
        "attend, G = 1",
        "attend, G = 1, residual softmax",
        "attend, G = 3",
    ]
    for row in rows:
        assert f"{shape}, {str(dtype)[6:]}" in row.name
        assert (row.goal, row.result) == (FOR_THE_RECORD, PASS)
        assert "time " in row.measured
        assert " ms, memory " in row.measured


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiled_attention_is_compared_with_itself(dtype):
    (row,) = check_compiled_attention("cpu", (4, 5), dtype, Turns(repeats=1), backend="aot_eager")
    assert (row.result, "eager" in row.measured) == (PASS, True)


def test_a_compiler_that_errs_fails(monkeypatch):
    def doubles(graph, inputs):
        return lambda *args: tuple(2 * x for x in graph(*args))

    (row,) = check_compiled_attention("cpu", (4, 5), torch.float32, Turns(repeats=1), backend=doubles)
    assert row.result == FAIL


def test_a_compiled_backbone_is_compared_with_itself(configs):
    opts = ["MODEL.VIT.EMBED_DIM", "24", "MODEL.VIT.DEPTH", "1"]
    config_file = configs / "quickstart.yaml"
    (row,) = check_compiled_backbone("cpu", config_file, opts, torch.float32, Turns(repeats=1), backend="aot_eager")
    assert (row.name, row.result) == ("torch.compile: backbone of quickstart.yaml, float32", PASS)
