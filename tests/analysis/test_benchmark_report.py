"""karat_det.analysis.benchmark_report: the table and the plot."""

import json

import pytest
from PIL import Image

from karat_det.analysis.benchmark_report import Comparison, Results, ScalingPoint, write_report

SDPA = "scaled_dot_product_attention"


def test_the_report_has_a_row_for_each_comparison_and_a_plot_of_the_scaling(tmp_path):
    results = Results(
        "a machine",
        [Comparison("pass", "softmax", 0.0123, 0.0100, "ms", 1.25), Comparison("peak", "softmax", 2**31, 2**32, "MiB")]
        + [Comparison("slow", "softmax", 0.0123, 0.0100, "ms", 1.2)],
        [ScalingPoint(SDPA, 49, 0.001, 2**20), ScalingPoint(SDPA, 196, 0.01, 2**22)]
        + [ScalingPoint("attend, G = 1", 49, 0.002, 0)],
    )
    table = write_report(results, tmp_path)
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == table
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    assert ["pass", "softmax", "1.23", "≤ 1.25", "12.3 : 10.0 ms"] in cells
    assert ["slow", "softmax", "1.23", "≤ 1.20, missed", "12.3 : 10.0 ms"] in cells
    assert ["peak", "softmax", "0.50", "", "2,048 : 4,096 MiB"] in cells
    assert [SDPA, "1.00 ms, 1.00 MiB", "10.0 ms, 4.00 MiB"] in cells
    assert ["attend, G = 1", "2.00 ms, 0.00 MiB", "left out"] in cells
    assert "a machine" in table
    saved = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert saved["comparisons"][0]["ratio"] == pytest.approx(1.23)
    assert saved["scaling"][1]["num_tokens"] == 196
    with Image.open(tmp_path / "scaling.png") as plot:
        assert plot.width > plot.height > 300
