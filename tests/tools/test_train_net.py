"""tools/train_net.py as a user runs it: as processes, on a small model and real files."""

import functools
import json
import os
import runpy
import shutil
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from detectron2.engine import default_argument_parser
from forked_command import run_command
from PIL import Image

from karat_det.data import dataset_check, registration
from karat_det.data.digits import generate_digits
from karat_det.engine import setup, signals
from karat_det.engine.output_dir import claim, claims
from karat_det.engine.processes import run_distributed

ROOT = Path(__file__).parents[2]
TRAIN_NET = str(ROOT / "tools" / "train_net.py")
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
SMALL_MODEL = [
    *(
        "MODEL.VIT.EMBED_DIM",
        "24",
        "MODEL.VIT.DEPTH",
        "2",
        "MODEL.FPN.OUT_CHANNELS",
        "8",
        "DATALOADER.NUM_WORKERS",
        "0",
    ),
    *("MODEL.ROI_BOX_HEAD.CONV_DIM", "8", "MODEL.ROI_BOX_HEAD.FC_DIM", "8", "MODEL.ROI_MASK_HEAD.CONV_DIM", "8"),
    *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "4", "SOLVER.CHECKPOINT_PERIOD", "2", "TEST.EVAL_PERIOD", "2"),
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "TEST.DETECTIONS_PER_IMAGE", "5"),
]


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    root = tmp_path_factory.mktemp("datasets")
    generate_digits(root, {"train": 8, "val": 3})
    return root


def run_train_net(
    datasets, folder, *arguments, config=QUICKSTART, overrides=SMALL_MODEL, fresh=False, fails=False, **how
):
    """Runs train_net.py in `folder`, with OUTPUT_DIR its subfolder out; in a fork, or with all imports anew."""
    options = ["--config-file", config, *arguments, *overrides, "OUTPUT_DIR", str(folder / "out")]
    environment = {"DETECTRON2_DATASETS": str(datasets)}
    if fresh:
        command = [sys.executable, TRAIN_NET, *options]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    else:
        done = run_command("train_net", *options, folder=folder, environment=environment, **how)
    assert bool(done.returncode) == fails, done.stdout + done.stderr
    return done


@pytest.fixture
def train(datasets, tmp_path):
    return partial(run_train_net, datasets, tmp_path)


@pytest.fixture(scope="module")
def trained(datasets, tmp_path_factory):
    """A folder whose subfolder out holds a finished run of 3 iterations, and what that run printed."""
    folder = tmp_path_factory.mktemp("trained")
    overrides = [*SMALL_MODEL, "SOLVER.MAX_ITER", "3"]
    return folder, run_train_net(datasets, folder, "--num-gpus", "0", overrides=overrides, fresh=True)


@pytest.fixture
def out(trained, tmp_path):
    """A copy of that run in the folder that `train` writes to."""
    return Path(shutil.copytree(trained[0] / "out", tmp_path / "out"))


def metrics(folder):
    """The last value of each scalar that the run wrote."""
    return {
        key: value
        for line in (folder / "metrics.json").read_text().splitlines()
        for key, value in json.loads(line).items()
    }


def figures(done):
    """The last line of figures that Detectron2 prints for copying."""
    return [line for line in done.stdout.splitlines() if "copypaste: " in line][-1].rpartition(" ")[2]


def test_a_run_trains_evaluates_and_saves_without_a_warning(trained, out):
    log = trained[1].stdout + trained[1].stderr
    assert "training starts from random weights" in log
    assert "Evaluation results for segm" in log
    for word in ("Warning", "WARNING", "warn(", "Traceback"):
        assert word not in log, log
    names = {path.name for path in out.iterdir()}
    assert {"config.yaml", "metrics.json", "model_0000001.pth", "model_final.pth", "log.txt"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert (out / "inference" / "digits_val" / "coco_instances_results.json").is_file()
    assert {"bbox/AP", "segm/AP", "segm/AP-9", "total_loss", "grad_norm", "lr"} <= set(metrics(out))


def count_calls(path, functions):
    """Makes each call of some functions, given by module and name, a line of a file."""

    def counted(function, name):
        @functools.wraps(function)
        def call(*arguments, **keywords):
            with open(path, "a") as file:
                file.write(f"{name}\n")
            return function(*arguments, **keywords)

        return call

    for module, name in functions:
        setattr(module, name, counted(getattr(module, name), name))


def test_a_run_checks_its_model_and_datasets_once(train, datasets, tmp_path):
    digits = datasets / "digits"
    jsons = [str(digits / "annotations" / f"instances_{split}.json") for split in ("train", "val")]
    images = [str(digits / split) for split in ("train", "val")]
    own = ["KARAT_DATA.NAMES", "['a', 'b']", "KARAT_DATA.JSONS", str(jsons), "KARAT_DATA.IMAGE_DIRS", str(images)]
    own += ["DATASETS.TRAIN", "('a',)", "DATASETS.TEST", "('b',)", "SOLVER.MAX_ITER", "1"]
    functions = [(setup, "check_model"), (setup, "check_datasets"), (registration, "read_categories")]
    functions += [(dataset_check, "load_coco"), (dataset_check, "check_images")]
    counting = partial(count_calls, tmp_path / "calls", functions)
    train("--num-gpus", "0", overrides=[*SMALL_MODEL, *own], prepare=counting)
    # Of two datasets.
    once = {"read_categories": 2, "check_model": 1, "check_datasets": 1, "load_coco": 2, "check_images": 2}
    assert Counter((tmp_path / "calls").read_text().split()) == once


def test_a_finished_run_is_not_overwritten_without_a_word(train, out):
    before = (out / "model_final.pth").read_bytes()
    refused = train(fails=True)
    assert refused.stderr.strip().splitlines()[-1].startswith("error: OUTPUT_DIR is") and "--resume" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert (out / "model_final.pth").read_bytes() == before


def test_resumes_where_it_stopped_and_evaluates_to_the_same_figures(train, out):
    with claims():
        claim(str(out))
        refused = train("--resume", fails=True)
        assert refused.stderr.startswith(f"error: OUTPUT_DIR is '{out}', into which another run writes just now")
    resumed = train(overrides=[*SMALL_MODEL, "--resume", "SOLVER.MAX_ITER", "5"])
    assert "Starting training from iteration 3" in resumed.stdout
    assert torch.load(out / "model_final.pth", weights_only=True)["iteration"] == 4
    config = (out / "config.yaml").read_text()
    # The run's last checkpoint, and the same file named.
    for source in (["--resume"], ["MODEL.WEIGHTS", str(out / "model_final.pth")]):
        evaluated = train("--eval-only", overrides=[*source, *SMALL_MODEL])
        assert (out / "config.yaml").read_text() == config
        assert figures(evaluated) == figures(resumed)


def test_torchrun_trains_and_evaluates_in_two_processes(train, tmp_path):
    done = train(torchrun=("--nproc-per-node", "2"), overrides=[*SMALL_MODEL, "SOLVER.MAX_ITER", "3"])
    assert "World size: 2" in done.stdout
    assert "Evaluation results for segm" in (tmp_path / "out" / "log.txt").read_text()
    assert (tmp_path / "out" / "log.txt.rank1").is_file()
    assert torch.load(tmp_path / "out" / "model_final.pth", weights_only=True)["iteration"] == 2
    results = json.loads((tmp_path / "out/inference/digits_val/coco_instances_results.json").read_text())
    assert {result["image_id"] for result in results} == {1, 2, 3}


def test_bfloat16_trains_on_the_cpu(train, tmp_path):
    train(overrides=[*SMALL_MODEL, "SOLVER.AMP.ENABLED", "True", "SOLVER.MAX_ITER", "2"])
    assert np.isfinite(metrics(tmp_path / "out")["total_loss"])


@pytest.mark.parametrize(
    ("parameter", "reason"),
    [
        ("roi_heads.box_predictor.cls_score.bias", "The loss is not finite."),
        # It reaches the region proposals, where Detectron2 stops before there is a loss.
        ("backbone.net.operator.coefficients", "Predicted boxes or scores contain Inf/NaN"),
    ],
)
def test_divergence_names_iteration_and_loss_terms_and_keeps_the_last_checkpoint(train, out, parameter, reason):
    good = (out / "model_final.pth").read_bytes()
    checkpoint = torch.load(out / "model_final.pth", weights_only=True)
    checkpoint["model"][parameter].fill_(float("nan"))
    torch.save(checkpoint, out / "poisoned.pth")
    (out / "last_checkpoint").write_text("poisoned.pth")
    # Iteration 3 is the last, after which a run is evaluated.
    done = train("--resume", overrides=[*SMALL_MODEL, "SOLVER.MAX_ITER", "4"], fails=True)
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("error: Training diverged at iteration 3.") and reason in message
    # The first step since the run was resumed.
    assert "of the step before: none." in message
    if "loss is" in reason:
        assert "'loss_cls': nan" in message and "'loss_mask': " in message
    assert (out / "model_final.pth").read_bytes() == good
    assert not (out / "model_0000003.pth").exists()
    assert "Start inference" not in done.stdout


class OwnData:
    """Two classes with ids 3 and 8, four images of which the last has no annotations."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "images").mkdir(parents=True)
        rng = np.random.default_rng(0)
        images, annotations = [], []
        for i in range(1, 5):
            Image.fromarray(rng.integers(0, 255, (50, 80, 3), dtype=np.uint8)).save(folder / "images" / f"{i}.jpg")
            images.append({"id": i, "file_name": f"{i}.jpg", "height": 50, "width": 80})
            if i < 4:
                annotation = {"id": i, "image_id": i, "category_id": 3 if i % 2 else 8, "iscrowd": 0, "area": 600}
                annotation["bbox"] = [10, 10, 30, 20]
                annotation["segmentation"] = [[10, 10, 40, 10, 40, 30, 10, 30]]
                annotations.append(annotation)
        categories = [{"id": 3, "name": "cat"}, {"id": 8, "name": "dog"}]
        self.content = {"images": images, "annotations": annotations, "categories": categories}
        self.write()

    def as_other_tools_write_it(self):
        """Text ids, sizes with a point, equal names and the like; returns the class names and ids that come out."""
        for image in self.content["images"]:
            image.update(id=f"frame/{image['id']}", width=80.0)
        for i, annotation in enumerate(self.content["annotations"]):
            annotation.update(id=i, image_id=f"frame/{annotation['image_id']}", area=None, iscrowd=None)
            annotation["segmentation"] = [[[10, 10], [40, 10], [40, 30], [10, 30]]]
        self.content["annotations"][0]["bbox"] = [40, 30, -30, -20]
        self.content["categories"][0]["name"] = self.content["categories"][1]["name"] = 5
        self.write()
        return {"5 (id 3)", "5 (id 8)"}, {image["id"] for image in self.content["images"]}

    def write(self):
        (self.folder / "own.json").write_text(json.dumps(self.content))

    def overrides(self, num_classes=2):
        json_file, images = str(self.folder / "own.json"), str(self.folder / "images")
        return [
            *("KARAT_DATA.NAMES", "['own_train', 'own_val']", "KARAT_DATA.JSONS", str([json_file, json_file])),
            *("KARAT_DATA.IMAGE_DIRS", str([images, images]), "MODEL.ROI_HEADS.NUM_CLASSES", str(num_classes)),
            *("DATASETS.TRAIN", "('own_train',)", "DATASETS.TEST", "('own_val',)"),
        ]


@pytest.fixture
def own(tmp_path):
    return OwnData(tmp_path / "own")


@pytest.mark.parametrize("filter_empty", ["True", "False"])
def test_your_own_data_trains_and_is_evaluated_under_its_class_names(train, own, tmp_path, filter_empty):
    names, ids = {"cat", "dog"}, {1, 2, 3, 4}
    if filter_empty == "False":
        names, ids = own.as_other_tools_write_it()
    overrides = [*SMALL_MODEL, *own.overrides(), "DATALOADER.FILTER_EMPTY_ANNOTATIONS", filter_empty]
    done = train(overrides=overrides)
    assert {f"segm/AP-{name}" for name in names} <= set(set(metrics(tmp_path / "out")))
    assert ("Removed 1 images with no usable annotations. 3 images left" in done.stdout) == (filter_empty == "True")
    results = json.loads((tmp_path / "out/inference/own_val/coco_instances_results.json").read_text())
    assert {result["category_id"] for result in results} <= {3, 8}
    assert {result["image_id"] for result in results} == ids
    # Back on the images' own size.
    assert {tuple(result["segmentation"]["size"]) for result in results} == {(50, 80)}


def test_an_image_that_is_cut_short_is_named_before_training(train, own):
    path = own.folder / "images" / "2.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    done = train(overrides=[*SMALL_MODEL, *own.overrides(), "SOLVER.MAX_ITER", "20"], fails=True)
    assert "Starting training" not in done.stdout
    assert done.stderr.splitlines()[-2].startswith("error: 1 of the 4 images of")
    assert "Cannot read the image" in done.stderr.splitlines()[-1] and "2.jpg" in done.stderr.splitlines()[-1]


def no_annotations(own):
    own.content["annotations"] = []
    own.write()


def no_image_file(own):
    (own.folder / "images" / "3.jpg").unlink()


def no_image(own):
    (own.folder / "images" / "2.jpg").write_text("no image")


def error_of(*arguments):
    """What train_net.py says as it stops, called in this process."""
    command = runpy.run_path(TRAIN_NET)
    args = default_argument_parser().parse_args(["--config-file", QUICKSTART, *arguments])
    with mock.patch.object(signals, "install"), pytest.raises(SystemExit) as stop:
        run_distributed(command["main"], args, command["check"])
    return stop.value.code


@pytest.mark.parametrize(
    ("break_it", "overrides", "message"),
    [
        (
            None,
            ["MODEL.ROI_HEADS.NUM_CLASSES", "5"],
            "has 2 categories (cat, dog), but MODEL.ROI_HEADS.NUM",
        ),
        (None, ["DATASETS.TRAIN", "('other',)"], "DATASETS.TRAIN names 'other', but there is no such dataset"),
        (None, ["MODEL.WEIGHTS", "nowhere.pth"], "MODEL.WEIGHTS is 'nowhere.pth', but there is no such file"),
        # Two mistakes: the one that is found in seconds comes first.
        (
            no_image_file,
            ["MODEL.VIT.IMG_SIZE", "100"],
            "MODEL.VIT.IMG_SIZE is 100, which MODEL.VIT.PATCH_SIZE, 8, does",
        ),
        (None, ["MODEL.KARAT.RANK", "500"], "MODEL.KARAT.RANK is 500, above N = 196"),
        (None, ["MODEL.KARAT.GRID_SIZE", "0"], "MODEL.KARAT.GRID_SIZE is 0"),
        (None, ["MODEL.KARAT.COLOUR", "red"], "There is no key MODEL.KARAT.COLOUR"),
        (None, ["MODEL.KARAT.GLOBAL_BLOCKS", "softmax"], "no block would have KArAt"),
        (None, ["MODEL.VIT.PATCH_SIZE", "16"], "MODEL.RPN.IN_FEATURES is ['p2', 'p3', 'p4']"),
        (no_annotations, [], "None of the 4 images of DATASETS.TRAIN"),
        (no_image_file, [], "1 of the 4 images of"),
        (no_image, [], "Cannot read the image"),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_mistakes_end_in_one_line_before_anything_is_trained(own, tmp_path, break_it, overrides, message):
    if break_it:
        break_it(own)
    error = error_of(*SMALL_MODEL, *own.overrides(), *overrides, "OUTPUT_DIR", str(tmp_path / "out"))
    assert error.startswith("error: ") and message in error
    assert not list((tmp_path / "out").glob("*.pth"))
    # Without reading the data there is not even a log in which the message would be the last of a thousand lines.
    assert (tmp_path / "out").exists() == bool(break_it and not overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["DATASETS.TEST", "()"], "DATASETS.TEST is empty; --eval-only needs at least one dataset to evaluate on."),
        (["MODEL.VIT.IMG_SIZE", "100"], "MODEL.VIT.IMG_SIZE is 100"),
        ([], "1 of the 4 images of"),
        (["MODEL.WEIGHTS", ""], "MODEL.WEIGHTS names no weights file"),
    ],
)
def test_mistakes_of_eval_only_end_in_one_line_before_anything_is_measured(own, tmp_path, overrides, message):
    no_image_file(own)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "weights.pth")
    weights = ["MODEL.WEIGHTS", str(tmp_path / "weights.pth"), "OUTPUT_DIR", str(tmp_path / "out")]
    error = error_of("--eval-only", *SMALL_MODEL, *own.overrides(), *weights, *overrides)
    assert error.startswith("error: ") and message in error


def test_built_in_data_that_is_not_there_is_missed_before_there_is_a_log(tmp_path):
    coco = ["DATASETS.TRAIN", "('coco_2014_minival',)", "MODEL.ROI_HEADS.NUM_CLASSES", "80"]
    error = error_of(*SMALL_MODEL, *coco, "OUTPUT_DIR", str(tmp_path / "out"))
    assert "DATASETS.TRAIN names the dataset 'coco_2014_minival'" in error and "DETECTRON2_DATASETS" in error
    assert not (tmp_path / "out").exists()


def test_several_gpus_asked_for_where_there_is_none_is_a_warning(train, tmp_path):
    train("--num-gpus", "8", overrides=[*SMALL_MODEL, "SOLVER.MAX_ITER", "1", "DATASETS.TEST", "()"])
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "WARNING: --num-gpus is 8, but no GPU is used: MODEL.DEVICE is cpu" in log


def test_a_mistake_prints_no_stack_trace(train):
    done = train(overrides=["MODEL.KARAT.GRID_SIZE", "0"], fails=True)
    assert done.stderr.strip() == "error: MODEL.KARAT.GRID_SIZE is 0. It must be a whole number, at least 1."


def test_weights_that_do_not_fit_stop_unless_asked(train, trained, own):
    weights = str(trained[0] / "out" / "model_final.pth")
    overrides = [*SMALL_MODEL, *own.overrides(), "MODEL.WEIGHTS", weights, "SOLVER.MAX_ITER", "1"]
    done = train(overrides=overrides, fails=True)
    assert "roi_heads.box_predictor.cls_score.weight: (11, 8) in the file, (3, 8) in the model" in done.stderr
    assert "MODEL.WEIGHTS_STRICT False" in done.stderr
    done = train(overrides=[*overrides, "MODEL.WEIGHTS_STRICT", "False"])
    assert "Left out, since MODEL.WEIGHTS_STRICT is False" in done.stdout
    assert "backbone.net.operator.{coefficients, projector}" in done.stdout


def test_coco_under_its_builtin_names(coco_tiny, tmp_path):
    """The command for the whole of COCO, with a smaller model: crowds, polygons in parts, many image sizes."""
    overrides = [
        *("MODEL.VIT.EMBED_DIM", "48", "MODEL.VIT.DEPTH", "2", "MODEL.VIT.NUM_HEADS", "3"),
        *("MODEL.VIT.WINDOW_BLOCKS", "[0]", "MODEL.FPN.OUT_CHANNELS", "16", "MODEL.ROI_BOX_HEAD.CONV_DIM", "16"),
        *("MODEL.ROI_MASK_HEAD.CONV_DIM", "16", "MODEL.RPN.POST_NMS_TOPK_TEST", "20"),
        *("MODEL.RPN.PRE_NMS_TOPK_TEST", "100"),
        *("SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2", "DATALOADER.NUM_WORKERS", "0"),
        *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "TEST.DETECTIONS_PER_IMAGE", "5"),
    ]
    config = str(ROOT / "configs" / "vitdet_karat.yaml")
    done = run_train_net(coco_tiny, tmp_path, config=config, overrides=overrides)
    # Nothing that it finds by chance counts, but each of the 80 classes was measured.
    assert {"segm/AP-person", "segm/AP-toothbrush"} <= set(metrics(tmp_path / "out")), done.stdout
