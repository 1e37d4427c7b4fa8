import json
import os
import resource
from functools import partial

import pytest
import torch
from detectron2.modeling.backbone.utils import add_decomposed_rel_pos
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from karat_det.analysis import benchmark
from karat_det.analysis.benchmark import (
    SDPA,
    SOFTMAX,
    VARIANTS,
    AttentionCore,
    AttentionShape,
    Turns,
    bytes_kept,
    compare_cores,
    compare_peaks,
    make_step,
    measure_scaling,
    multiply_adds,
    peak_memory,
    synthetic_batch,
)
from karat_det.analysis.benchmark_report import Comparison, Results, ScalingPoint, write_report
from karat_det.engine.setup import load_cfg

SMALL = AttentionShape(batch_size=2, num_heads=3, grid=(4, 5), head_dim=8, rank=4)
SMALL_REL_POS = AttentionShape(batch_size=2, num_heads=3, grid=(4, 5), head_dim=8, rank=4, rel_pos=True)


def random_inputs(shape):
    return tuple(torch.randn(shape.batch_size, shape.num_heads, shape.num_tokens, shape.head_dim) for _ in range(3))


class Function(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.forward = function


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.tuples(st.integers(1, 5), st.integers(1, 5)), st.booleans())
def test_both_softmax_cores_equal_detectron2s_formula(batch_size, num_heads, grid, rel_pos):
    torch.manual_seed(0)
    shape = AttentionShape(batch_size, num_heads, grid, head_dim=8, rank=1, rel_pos=rel_pos)
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


@pytest.mark.parametrize("shape", [SMALL, SMALL_REL_POS], ids=str)
@pytest.mark.parametrize("grid_size", [1, 3])
def test_attend_is_compared_with_a_direct_form_of_the_same_result(shape, grid_size):
    torch.manual_seed(1)
    inputs = random_inputs(shape)
    attend, direct = (AttentionCore(f"{name}, G = {grid_size}", shape) for name in ("attend", "direct"))
    direct.load_state_dict(attend.state_dict())
    torch.testing.assert_close(attend(*inputs), direct(*inputs))


def test_bytes_kept_counts_each_storage_once_and_whole():
    x, y = torch.randn(10, 6, requires_grad=True), torch.randn(10, 6, requires_grad=True)
    assert bytes_kept(Function(lambda x, y: x * y), (x, y)) == 2 * 240
    assert bytes_kept(Function(lambda x, y: x * x.detach() + y), (x, y)) == 240
    assert bytes_kept(Function(lambda x, y: (x[:2] * y[:2]).exp()), (x, y)) == 2 * 240 + 2 * 6 * 4
    assert bytes_kept(Function(lambda x, y: x + y), (x, y)) == 0


def test_multiply_adds_are_those_of_the_matrix_products_for_one_of_the_batch():
    heads, tokens, d, r = 3, 20, 8, 4
    count = {name: multiply_adds(AttentionCore(name, SMALL), random_inputs(SMALL)) for name in VARIANTS}
    assert count[SOFTMAX] == heads * 2 * tokens**2 * d
    for grid_size in (1, 3):
        per_head = tokens**2 * d + 2 * grid_size * tokens**2 * r + 2 * tokens * r * d
        assert count[f"attend, G = {grid_size}"] == heads * per_head


def test_functions_are_timed_in_turns_and_the_median_counts(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock[0])
    durations = {"a": iter([100.0, 3.0, 50.0, 4.0]), "b": iter([100.0, 7.0, 8.0, 9.0])}

    def function(name):
        def run():
            calls.append(name)
            clock[0] += next(durations[name])

        return run

    medians = Turns(repeats=3, seconds=1000).median_seconds({name: function(name) for name in durations})
    assert medians == {"a": 4.0, "b": 8.0}  # without the 100 of the first calls
    assert "".join(calls) == "abababab"


def test_slow_functions_have_three_turns_at_least():
    calls = []
    Turns(repeats=5, seconds=0).median_seconds({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")})
    assert "".join(calls) == "ab" * 4


def _peaks_of_ones(*sizes):
    torch.ones(2**20)  # a process's first call brings code into memory
    return [peak_memory(partial(torch.ones, size), "cpu") for size in sizes]


def test_peak_memory_is_what_a_call_adds():
    mib = 2**20
    # This process has free memory of earlier tests, which a call would fill without adding any.
    small, large = benchmark._in_fresh_process(_peaks_of_ones, 1, 16 * mib)
    assert small < 2 * mib
    assert large == pytest.approx(64 * mib, abs=2 * mib)


def _page_faults_of_large_tensors(keep_freed_memory):
    if keep_freed_memory:
        benchmark._keep_freed_memory()
    for _ in range(3):
        torch.ones(2**24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_steps_are_timed_without_the_page_faults_of_large_tensors():
    given_back, kept = (benchmark._in_fresh_process(_page_faults_of_large_tensors, keep) for keep in (False, True))
    assert kept < 0.1 * given_back


def test_memory_is_compared_in_fresh_processes_and_attend_does_not_grow_with_n_squared():
    peaks = compare_peaks(AttentionShape(batch_size=1, num_heads=4, grid=(32, 32), head_dim=16))
    matrix = 4 * 4 * 1024**2
    assert 3 * matrix <= peaks.reference < 6 * matrix
    assert peaks.value < matrix


def test_a_process_that_dies_is_named_with_what_to_do():
    with pytest.raises(RuntimeError, match=r"was killed.*--max-memory"):
        benchmark._in_fresh_process(os._exit, 1)


@pytest.mark.parametrize("shape", [SMALL, SMALL_REL_POS], ids=str)
def test_a_core_is_compared_in_time_bytes_and_multiply_adds(shape):
    rows = compare_cores(shape, Turns(repeats=1))
    assert all(str(shape) in row.measured and row.value > 0 and row.reference > 0 for row in rows)
    units = [row.unit for row in rows]
    assert {unit: units.count(unit) for unit in units} == {"ms": 5, "MiB": 4, "million multiply-adds": 2}
    goals = [(row.measured.partition(":")[0], row.over, row.goal) for row in rows if row.goal]
    assert goals == [
        ("attend, G = 1", SDPA, 1.25),
        ("attend, G = 3", "direct, G = 3", 0.35),
        ("attend, G = 1", SDPA, 1.0),
        ("attend, G = 3", SDPA, 1.0),
        ("attend, G = 1", SOFTMAX, 0.8),
    ]
    direct = [row for row in rows if row.over == "direct, G = 3" and row.unit == "MiB"]
    assert direct[0].ratio < 1


def test_scaling_leaves_out_what_needs_too_much_memory():
    matrix = 4 * SMALL.batch_size * SMALL.num_heads * SMALL.num_tokens**2
    points = measure_scaling(SMALL, Turns(repeats=1), max_memory=5 * matrix)
    assert [point.variant for point in points] == [SDPA, SOFTMAX, "attend, G = 1", "attend, G = 1, residual softmax"]
    assert all(point.num_tokens == 20 and point.seconds > 0 and point.peak_bytes >= 0 for point in points)


def test_a_synthetic_batch_is_the_same_each_time_and_its_boxes_are_in_the_image(configs):
    cfg = load_cfg(str(configs / "quickstart.yaml"), [])
    batch, again = synthetic_batch(cfg, 2), synthetic_batch(cfg, 2)
    assert len(batch) == 2
    for one, other in zip(batch, again, strict=True):
        assert one["image"].shape == (3, 112, 112)
        assert torch.equal(one["image"], other["image"])
        boxes = one["instances"].gt_boxes.tensor
        assert torch.equal(boxes, other["instances"].gt_boxes.tensor)
        assert len(boxes) == len(one["instances"].gt_masks) == 8
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert boxes.min() >= 0
        assert boxes.max() <= 112
        assert one["instances"].gt_classes.max() < 10
    assert not torch.equal(batch[0]["image"], batch[1]["image"])


@pytest.mark.parametrize("enabled", ["True", "False"])
def test_the_heads_of_a_step_get_as_many_positive_proposals_as_they_may(configs, enabled):
    opts = ["MODEL.DEVICE", "cpu", "MODEL.KARAT.ENABLED", enabled]
    cfg = load_cfg(str(configs / "quickstart.yaml"), opts)
    step = make_step(cfg, batch_size=2)
    heads, sampled = step.model.roi_heads, []
    label_and_sample = heads.label_and_sample_proposals
    heads.label_and_sample_proposals = lambda *args: sampled.append(label_and_sample(*args)) or sampled[-1]
    step.train(0, 2)
    assert len(sampled) == 2
    for instances in (instances for of_step in sampled for instances in of_step):
        boxes = instances.proposal_boxes.tensor
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert len(boxes) == cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE
        positives = (instances.gt_classes < cfg.MODEL.ROI_HEADS.NUM_CLASSES).sum()
        assert positives == cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE * cfg.MODEL.ROI_HEADS.POSITIVE_FRACTION


def test_the_report_has_a_row_for_each_comparison_and_a_plot_of_the_scaling(tmp_path):
    results = Results(
        "a machine",
        [Comparison("pass", "softmax", 0.0123, 0.0100, "ms", 1.25), Comparison("peak", "softmax", 2**31, 2**32, "MiB")],
        [ScalingPoint(SDPA, 49, 0.001, 2**20), ScalingPoint(SDPA, 196, 0.01, 2**22)]
        + [ScalingPoint("attend, G = 1", 49, 0.002, 0)],
    )
    table = write_report(results, tmp_path)
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == table
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    assert ["pass", "softmax", "1.23", "≤ 1.25", "12.3 : 10.0 ms"] in cells
    assert ["peak", "softmax", "0.50", "", "2,048 : 4,096 MiB"] in cells
    assert [SDPA, "1.00 ms, 1.00 MiB", "10.0 ms, 4.00 MiB"] in cells
    assert ["attend, G = 1", "2.00 ms, 0.00 MiB", "left out"] in cells
    assert "a machine" in table
    saved = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert saved["comparisons"][0]["ratio"] == pytest.approx(1.23)
    assert saved["scaling"][1]["num_tokens"] == 196
    with Image.open(tmp_path / "scaling.png") as plot:
        assert plot.width > plot.height > 300
