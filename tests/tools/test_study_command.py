"""tools/study.py as a user runs it, on a small model and a few scenes of digits."""

import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from forked_command import run_command, run_in_fork

from karat_det.analysis import study as study_module
from karat_det.data.digits import generate_digits

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A folder with a dataset and a study of four variants: one diverges, one predicts nothing."""
    folder = tmp_path_factory.mktemp("study")
    generate_digits(folder, {"train": 6, "val": 2})
    small = {
        **{"MODEL.VIT.EMBED_DIM": 24, "MODEL.VIT.DEPTH": 2, "MODEL.FPN.OUT_CHANNELS": 8, "DATALOADER.NUM_WORKERS": 0},
        **{"MODEL.ROI_BOX_HEAD.CONV_DIM": 8, "MODEL.ROI_BOX_HEAD.FC_DIM": 8, "MODEL.ROI_MASK_HEAD.CONV_DIM": 8},
        **{"SOLVER.IMS_PER_BATCH": 2, "SOLVER.MAX_ITER": 2, "SOLVER.WARMUP_ITERS": 0, "TEST.DETECTIONS_PER_IMAGE": 5},
        **{"MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0},
    }
    content = {
        "CONFIG": str(ROOT / "configs" / "quickstart.yaml"),
        "SETTINGS": small,
        "SEEDS": [1],
        "STARTS": {"softmax": {"MODEL.KARAT.ENABLED": False, "SEED": 7}},
        "VARIANTS": {
            "softmax": {"MODEL.KARAT.ENABLED": False},
            "half": {"MODEL.KARAT.NUM_KARAT_HEADS": 1, "MODEL.KARAT.BLOCKS": [1], "SOLVER.OPERATOR_LR_FACTOR": 2.0},
            # The decay alone makes weights 10,000 times as large in each step.
            "too fast": {"SOLVER.BASE_LR": 100.0, "SOLVER.WEIGHT_DECAY": 100.0, "SOLVER.MAX_ITER": 20},
            "unsure": {"MODEL.ROI_HEADS.SCORE_THRESH_TEST": 1.0},
        },
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder


def run(folder, study="study.yaml", output="out"):
    environment = {"PYTHONPATH": str(ROOT), "DETECTRON2_DATASETS": str(folder)}
    options = ("--study", study, "--output", output, "--jobs", "2")
    fork = partial(setattr, study_module, "subprocess", SimpleNamespace(run=run_in_fork))
    return run_command("study", *options, folder=folder, environment=environment, prepare=fork)


def test_it_trains_every_run_once_and_ends_with_a_table_and_a_plot(study):
    done = run(study)
    assert done.returncode == 0, done.stdout + done.stderr
    table = (study / "out" / "table.md").read_text()
    assert table.strip() in done.stdout
    rows = {line.split("|")[1].strip(): line for line in table.splitlines()}
    assert "diverged" in rows["too fast"]
    assert "diverged" not in rows["half"]
    assert (study / "out" / "plot.png").is_file()
    results = json.loads((study / "out" / "results.json").read_text())
    assert [result["variant"] for result in results] == ["softmax", "half", "too fast", "unsure"]
    assert (results[-1]["segm/AP"], results[-1]["bbox/AP"]) == (0.0, 0.0)
    # Each starts from the softmax backbone, whose file holds nothing else, and the operator from its own start.
    console = (study / "out" / "softmax" / "half" / "seed_1" / "console.txt").read_text()
    assert "backbone.pth" in console
    assert not list((study / "out").rglob("model_0*.pth"))

    again = run(study, output=str(study / "out"))
    assert again.returncode == 0, again.stderr
    assert "Training" not in again.stdout
    assert (study / "out" / "table.md").read_text() == table


def test_a_run_that_fails_names_its_console(study, tmp_path):
    shutil.copytree(study / "digits", tmp_path / "digits")
    next((tmp_path / "digits" / "train").iterdir()).write_text("no image")
    shutil.copy(study / "study.yaml", tmp_path)
    done = run(tmp_path)
    assert done.returncode != 0
    assert "console.txt" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_finished_run_is_not_taken_for_one_with_other_settings(study):
    content = yaml.safe_load((study / "study.yaml").read_text())
    (study / "own.yaml").write_text(f"_BASE_: {content['CONFIG']}\nSOLVER:\n  WEIGHT_DECAY: 0.1\n")
    others = {
        "longer.yaml": {"SETTINGS": content["SETTINGS"] | {"SOLVER.MAX_ITER": 3}},
        "narrow.yaml": {"SETTINGS": content["SETTINGS"] | {"SOLVER.AMP.ENABLED": True}},
        "decays.yaml": {"CONFIG": "own.yaml"},
        "random.yaml": {"STARTS": {"softmax": {}}},
    }
    for name, other in others.items():
        other = content | other
        (study / name).write_text(yaml.safe_dump(other, sort_keys=False))
        done = run(study, name)
        assert done.returncode != 0
        assert "holds a run with other settings" in done.stderr
