"""karat_det.analysis.benchmark_attention: its cores are what they are said to be, and what is compared."""

import pytest
import torch
from detectron2.modeling.backbone.utils import add_decomposed_rel_pos
from hypothesis import given, settings
from hypothesis import strategies as st

from karat_det.analysis import benchmark_attention
from karat_det.analysis.benchmark_attention import (
    SDPA,
    SOFTMAX,
    TIMED,
    VARIANTS,
    AttentionCore,
    AttentionShape,
    compare_memory,
    compare_peaks,
    compare_times,
    measure_scaling,
)
from karat_det.analysis.measuring import Turns, multiply_adds

SMALL = AttentionShape(batch_size=2, num_heads=3, grid=(4, 5), head_dim=8, rank=4)
SMALL_REL_POS = AttentionShape(batch_size=2, num_heads=3, grid=(4, 5), head_dim=8, rank=4, bias="rel_pos")
SMALL_SWIN = AttentionShape(batch_size=128, num_heads=2, grid=(3, 3), head_dim=4, rank=4, bias="swin")
ONE_TURN = Turns(repeats=1, turn_seconds=0)


def random_inputs(shape):
    return tuple(torch.randn(shape.batch_size, shape.num_heads, shape.num_tokens, shape.head_dim) for _ in range(3))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.tuples(st.integers(1, 5), st.integers(1, 5)), st.booleans())
def test_both_softmax_cores_equal_detectron2s_formula(batch_size, num_heads, grid, rel_pos):
    torch.manual_seed(0)
    shape = AttentionShape(batch_size, num_heads, grid, head_dim=8, rank=1, bias="rel_pos" if rel_pos else "none")
    query, key, value = random_inputs(shape)
    fused, written_out = AttentionCore(SDPA, shape), AttentionCore(SOFTMAX, shape)
    fused.load_state_dict(written_out.state_dict())
    scores = query @ key.transpose(-2, -1) * 8**-0.5
    if rel_pos:
        rel_pos_h, rel_pos_w = written_out.rel_pos_h, written_out.rel_pos_w
        flat = add_decomposed_rel_pos(scores.flatten(0, 1), query.flatten(0, 1), rel_pos_h, rel_pos_w, grid, grid)
        scores = flat.reshape(scores.shape)
    expected = scores.softmax(dim=-1) @ value
    torch.testing.assert_close(fused(query, key, value), expected)
    torch.testing.assert_close(written_out(query, key, value), expected)


@pytest.mark.parametrize("shape", [SMALL, SMALL_REL_POS, SMALL_SWIN], ids=str)
@pytest.mark.parametrize("grid_size", [1, 3])
def test_attend_is_compared_with_a_direct_form_of_the_same_result(shape, grid_size):
    torch.manual_seed(1)
    inputs = random_inputs(shape)
    attend, direct = (AttentionCore(f"{name}, G = {grid_size}", shape) for name in ("attend", "direct"))
    direct.load_state_dict(attend.state_dict())
    torch.testing.assert_close(attend(*inputs), direct(*inputs))


def test_both_softmax_cores_have_swins_bias_and_mask():
    torch.manual_seed(0)
    query, key, value = random_inputs(SMALL_SWIN)
    fused, written_out = (AttentionCore(name, SMALL_SWIN) for name in (SDPA, SOFTMAX))
    fused.load_state_dict(written_out.state_dict())
    assert 0.5 < fused.mask.float().mean() < 1
    scores = (query @ key.mT * 4**-0.5 + fused.table).masked_fill(~fused.mask, -torch.inf)
    for core in (fused, written_out):
        torch.testing.assert_close(core(query, key, value), scores.softmax(dim=-1) @ value)


def test_the_plain_core_calls_no_compiled_back_end(monkeypatch):
    called = []
    forward = benchmark_attention.KArAtOperator.attend

    def attend(*arguments, **others):
        called.append(benchmark_attention.os.environ.get("KARAT_BACKEND"))
        return forward(*arguments, **others)

    monkeypatch.setattr(benchmark_attention.KArAtOperator, "attend", attend)
    plain, compiled = (AttentionCore(name, SMALL) for name in ("attend, G = 1, plain PyTorch", "attend, G = 1"))
    compiled.load_state_dict(plain.state_dict())
    inputs = random_inputs(SMALL)
    torch.testing.assert_close(plain(*inputs), compiled(*inputs))
    assert called[0] == "plain"
    assert called[1] != "plain"


def test_multiply_adds_of_the_cores():
    heads, tokens, d, r = 3, 20, 8, 4
    count = {name: multiply_adds(AttentionCore(name, SMALL), random_inputs(SMALL)) for name in VARIANTS}
    assert count[SOFTMAX] == heads * 2 * tokens**2 * d
    for grid_size in (1, 3):
        per_head = tokens**2 * d + 2 * grid_size * tokens**2 * r + 2 * tokens * r * d
        assert count[f"attend, G = {grid_size}"] == heads * per_head


def test_memory_is_compared_in_fresh_processes_and_attend_does_not_grow_with_n_squared():
    peaks = compare_peaks(AttentionShape(batch_size=1, num_heads=4, grid=(32, 32), head_dim=16))
    matrix = 4 * 4 * 1024**2
    assert 3 * matrix <= peaks.reference < 6 * matrix
    assert peaks.value < matrix


def test_what_is_timed_has_a_row_and_what_it_must_be(monkeypatch):
    small = [
        (variant, over, AttentionShape(64, 2, (3, 3), 4, 4, shape.bias), *goals)
        for variant, over, shape, *goals in TIMED
    ]
    monkeypatch.setattr(benchmark_attention, "TIMED", small)
    rows = list(compare_times(ONE_TURN))
    assert all(row.value > 0 and row.reference > 0 and row.unit == "ms" for row in rows)
    goals = {"forward + backward": [], "forward": []}
    for row in rows:
        goals[row.measured.partition(": ")[2].partition(",")[0]].append(row.goal)
    assert goals == {"forward + backward": [1.0] * 6 + [1.4, 1.35, 1.0, 1.0, 2.5, 0.35], "forward": [1.1] * 6}
    assert [row.over for row in rows] == [SDPA] * 17 + ["direct, G = 3"]


@pytest.mark.parametrize("shape", [SMALL, SMALL_REL_POS], ids=str)
def test_bytes_and_multiply_adds_are_compared(shape):
    rows = compare_memory(shape)
    assert all(str(shape) in row.measured and row.value > 0 and row.reference > 0 for row in rows)
    assert [(row.measured.partition(":")[0], row.over, row.unit, row.goal) for row in rows] == [
        ("attend, G = 1", SDPA, "MiB", 1.0),
        ("attend, G = 1, residual softmax", SDPA, "MiB", None),
        ("attend, G = 3", SDPA, "MiB", 1.0),
        ("attend, G = 1", SOFTMAX, "million multiply-adds", 0.8),
        ("attend, G = 1, residual softmax", SOFTMAX, "million multiply-adds", None),
    ]


def test_scaling_leaves_out_what_needs_too_much_memory():
    matrix = 4 * SMALL.batch_size * SMALL.num_heads * SMALL.num_tokens**2
    points = measure_scaling(SMALL, ONE_TURN, max_memory=5 * matrix)
    assert [point.variant for point in points] == [
        SDPA,
        SOFTMAX,
        "attend, G = 1",
        "attend, G = 1, residual softmax",
        "attend, G = 1, plain PyTorch",
    ]
    assert all(point.num_tokens == 20 and point.seconds > 0 and point.peak_bytes >= 0 for point in points)
