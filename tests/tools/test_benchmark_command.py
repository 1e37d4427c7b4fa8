"""tools/benchmark.py as a user runs it, on a small model."""

import json
from pathlib import Path

import pytest
from forked_command import run_command

ROOT = Path(__file__).parents[2]
SMALL_MODEL = [
    *("MODEL.VIT.EMBED_DIM", "24", "MODEL.VIT.DEPTH", "1", "MODEL.FPN.OUT_CHANNELS", "8"),
    *("MODEL.ROI_BOX_HEAD.CONV_DIM", "8", "MODEL.ROI_BOX_HEAD.FC_DIM", "8", "MODEL.ROI_MASK_HEAD.CONV_DIM", "8"),
]


def run(*arguments):
    return run_command("benchmark", "--device", "cpu", *arguments, folder=ROOT)


def test_a_detectors_step_and_inference_are_compared_with_softmax(tmp_path):
    config = str(ROOT / "configs" / "quickstart.yaml")
    parts = ["--parts", "step", "inference", "--repeats", "1", "--threads", "1", "--config-file", config]
    done = run("--output", tmp_path / "new", *parts, "--", *SMALL_MODEL)
    assert done.returncode == 0, done.stderr
    assert "Its peak memory" in done.stdout
    assert f"Written to {tmp_path / 'new'}: results.json, table.md" in done.stdout
    assert (tmp_path / "new" / "table.md").read_text(encoding="utf-8") in done.stdout
    results = json.loads((tmp_path / "new" / "results.json").read_text())
    assert ", 1 thread, PyTorch" in results["machine"]
    measured = [(row["measured"].partition(",")[0], row["unit"]) for row in results["comparisons"]]
    assert measured == [
        ("training step", "s"),
        ("forward + backward of the backbone", "s"),
        ("peak memory of training", "MiB"),
        ("inference (more is better)", "images/s"),
    ]
    assert all(row["value"] > 0 and row["reference"] > 0 for row in results["comparisons"])
    assert "quickstart.yaml with MODEL.VIT.EMBED_DIM 24" in results["comparisons"][0]["measured"]
    assert "4 images of 112 × 112" in results["comparisons"][0]["measured"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--repeats", "0"], "--repeats is 0. It must be at least 1."),
        (["--", "MODEL.NO_KEY", "1"], "error: There is no key MODEL.NO_KEY"),
    ],
)
def test_a_mistake_is_named_without_a_stack_trace(tmp_path, arguments, complaint):
    done = run("--output", tmp_path, *arguments)
    assert done.returncode != 0
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr
    assert "Attention core" not in done.stdout  # nothing was measured first
