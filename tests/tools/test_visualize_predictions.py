"""tools/visualize_predictions.py as a user runs it: on a small model with random weights."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from forked_command import run_command
from PIL import Image

from karat_det.engine.setup import load_cfg

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "quickstart.yaml")
# Random weights score all classes alike, so nothing would pass the usual threshold.
SMALL_MODEL = [
    *("MODEL.VIT.EMBED_DIM", "24", "MODEL.VIT.DEPTH", "1", "MODEL.FPN.OUT_CHANNELS", "8", "MODEL.DEVICE", "cpu"),
    *("MODEL.ROI_BOX_HEAD.CONV_DIM", "8", "MODEL.ROI_BOX_HEAD.FC_DIM", "8", "MODEL.ROI_MASK_HEAD.CONV_DIM", "8"),
    *("MODEL.ROI_HEADS.NUM_CLASSES", "2", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "TEST.DETECTIONS_PER_IMAGE", "5"),
]


def own_data(name: str, folder: Path | str, images: str = "one") -> list[str]:
    """Overrides that register the JSON of `folder` and a folder of images within it as a dataset."""
    return [
        *("KARAT_DATA.NAMES", f"['{name}']", "KARAT_DATA.JSONS", f"['{folder}/pets.json']"),
        *("KARAT_DATA.IMAGE_DIRS", f"['{folder}/{images}']", "DATASETS.TEST", f"('{name}',)"),
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with weights, two folders of images, a COCO JSON of one of them: text ids, classes of equal names."""
    folder = tmp_path_factory.mktemp("visualize")
    torch.manual_seed(0)
    torch.save(build_model(load_cfg(CONFIG, SMALL_MODEL)).state_dict(), folder / "weights.pth")
    rng = np.random.default_rng(0)
    images = []
    for name in ("one", "two"):
        (folder / name).mkdir()
        for i, (height, width) in enumerate([(112, 112), (90, 150)]):
            pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
            if name == "one":
                images.append({"id": f"camera/{500 + i}", "file_name": f"{i}.png", "height": height, "width": width})
    (folder / "one" / "notes.txt").write_text("no image")
    annotation = {"id": 0, "image_id": "camera/500", "category_id": 11, "bbox": [20, 30, 40, 30], "iscrowd": None}
    annotation["segmentation"] = [[20, 30, 60, 30, 60, 60, 20, 60]]
    categories = [{"id": 4, "name": "cat"}, {"id": 11, "name": "cat"}]
    (folder / "pets.json").write_text(
        json.dumps({"images": images, "annotations": [annotation], "categories": categories})
    )
    return folder


def visualize(folder: Path, *arguments: str, overrides: list[str]) -> subprocess.CompletedProcess:
    options = ("--config-file", CONFIG, "--weights", folder / "weights.pth", *arguments, *overrides)
    return run_command("visualize_predictions", *options, folder=folder)


def test_dataset_is_drawn_beside_its_ground_truth(folder, tmp_path):
    overrides = SMALL_MODEL + own_data("pets", folder)
    done = visualize(folder, "--dataset", "pets", "--output", str(tmp_path), "--threshold", "0", overrides=overrides)
    assert done.returncode == 0, done.stderr
    assert "100%" in done.stderr
    assert done.stdout.count("Checked 2 images") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.jpg", "1.jpg", "coco_instances_results.json"]
    with Image.open(tmp_path / "0.jpg") as picture:
        assert picture.size == (2 * 448 + 8, 448 + 28)
    results = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert {result["image_id"] for result in results} == {"camera/500", "camera/501"}
    assert {result["category_id"] for result in results} <= {4, 11}
    assert {tuple(result["segmentation"]["size"]) for result in results} == {(112, 112), (90, 150)}


def test_folders_with_equal_names_without_class_names(folder, tmp_path):
    # As on another machine than the one that the model was trained on: its data is not there.
    overrides = [*SMALL_MODEL, *own_data("pets", folder / "absent")]
    inputs = [str(folder / "one"), str(folder / "two")]
    done = visualize(
        folder, "--input", *inputs, "--output", str(tmp_path), "--top-k", "1", "--max-images", "3", overrides=overrides
    )
    assert done.returncode == 0, done.stderr
    assert "Skipped 1 file" in done.stdout
    assert "Going on without the datasets of KARAT_DATA" in done.stdout
    assert "classes go by their numbers" in done.stdout
    images = json.loads((tmp_path / "images.json").read_text())
    assert [(image["id"], image["file_name"]) for image in images] == [
        (1, f"{inputs[0]}/0.png"),
        (2, f"{inputs[0]}/1.png"),
        (3, f"{inputs[1]}/0.png"),
    ]
    assert sorted(path.name for path in tmp_path.glob("*.jpg")) == ["0-1.jpg", "0-3.jpg", "1-2.jpg"]
    results = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert {result["image_id"] for result in results} == {1, 2, 3}


def test_what_fails_for_one_image_costs_only_that_image(folder, tmp_path):
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    Image.new("L", (65_600, 10), 90).save(inputs / "long.png")
    Image.fromarray(np.full((40, 50), 40_000, np.uint16)).save(inputs / "deep.png")
    Image.new("RGB", (400, 300), "red").save(inputs / "short.jpg")
    (inputs / "short.jpg").write_bytes((inputs / "short.jpg").read_bytes()[:-100])
    os.mkfifo(inputs / "fifo.png")
    (inputs / "loop.png").symlink_to("loop.png")
    output = tmp_path / "out"
    overrides = [*SMALL_MODEL, "DATASETS.TEST", "()"]
    done = visualize(folder, "--input", str(inputs), "--output", str(output), "--threshold", "0", overrides=overrides)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: 1 of the 3 images failed: ")
    assert "short.jpg: OSError: Cannot read the image" in done.stdout
    assert "0 to 65535 become 0 to 255" in done.stdout
    assert "Skipped 2 files" in done.stdout
    assert sorted(path.name for path in output.glob("*.jpg")) == ["deep.jpg", "long.jpg"]
    results = json.loads((output / "coco_instances_results.json").read_text())
    assert {tuple(result["segmentation"]["size"]) for result in results} == {(40, 50), (10, 65_600)}


# Each of these is a mistake, and what the one line about it must say.
MISTAKES = {
    "absent input": (["--input", "absent.png"], "absent.png"),
    "not an image": (["--input", "one/notes.txt"], "one/notes.txt"),
    "folder without images": (["--input", "empty"], "empty"),
    "unknown dataset": (["--dataset", "no_such_set"], "no_such_set"),
    "absent weights": (["--input", "one", "--weights", "absent.pth"], "absent.pth"),
    "absent config": (["--input", "one", "--config-file", "absent.yaml"], "absent.yaml"),
    "unknown key": (["--input", "one", "--max-images", "1", "MODEL.KARAT.GRIDSIZE", "3"], "MODEL.KARAT.GRID_SIZE"),
    "other classes": (["--dataset", "ten_pets", *own_data("ten_pets", ".")], "NUM_CLASSES is 10"),
    "threshold": (["--input", "one", "--threshold", "50"], "--threshold"),
    "top k": (["--input", "one", "--top-k", "0"], "--top-k"),
    "output is a file": (["--input", "one", "--output", "pets.json"], "pets.json"),
    "two sources": (["--input", "one", "--dataset", "pets"], "not allowed with"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_in_one_line_before_the_model_is_built(mistake, folder, tmp_path, monkeypatch, capsys):
    arguments, said = MISTAKES[mistake]
    (folder / "empty").mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(ROOT / "tools")
    tool = importlib.import_module("visualize_predictions")
    monkeypatch.setattr(tool, "build_model", None)
    defaults = ["--config-file", CONFIG, "--weights", "weights.pth", "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["visualize_predictions.py", *defaults, *arguments])
    with pytest.raises(SystemExit) as exit:
        tool.main(tool.parse_args())
    # Status 2 is argparse's, which has printed its line; else the line is printed on the way out, with status 1.
    message = capsys.readouterr().err.splitlines()[-1] if exit.value.code == 2 else exit.value.code
    assert said in message
    assert len(message.splitlines()) == 1


def test_an_image_that_breaks_midway_is_named(folder, tmp_path):
    (folder / "broken").mkdir()
    for name in ("0.png", "1.png"):
        whole = (folder / "one" / name).read_bytes()
        (folder / "broken" / name).write_bytes(whole if name == "0.png" else whole[: len(whole) // 2])
    overrides = SMALL_MODEL + own_data("pets", folder, "broken")
    done = visualize(folder, "--dataset", "pets", "--output", str(tmp_path), overrides=overrides)
    assert done.returncode == 1
    assert "1 of the 2 images failed" in done.stderr and "broken/1.png" in done.stderr.splitlines()[-1]
    assert [path.name for path in tmp_path.glob("*.jpg")] == ["0.jpg"]
    assert "Traceback" not in done.stderr
