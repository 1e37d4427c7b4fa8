"""tools/pretrain_net.py as a user runs it: as processes, on small models and real files."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forked_command import run_command
from PIL import Image

from karat_det.backbones.classifiers import build_classifier
from karat_det.data.digits import generate_crops
from karat_det.engine.pretraining import load_pretrain_cfg

ROOT = Path(__file__).parents[2]
PRETRAIN_NET = str(ROOT / "tools" / "pretrain_net.py")
CONFIGS = ROOT / "configs" / "pretrain"
DIGITS = str(CONFIGS / "digits.yaml")
SMALL = [
    *("MODEL.EMBED_DIM", "24", "MODEL.DEPTH", "2", "SOLVER.EPOCHS", "2", "SOLVER.IMS_PER_BATCH", "12"),
    *("DATALOADER.NUM_WORKERS", "0"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    generate_crops(root, {"train": 60, "val": 51})
    return root


def run(data, folder, *arguments, config=DIGITS, fresh=False, fails=False, **how):
    """Runs pretrain_net.py in `folder`, with OUTPUT_DIR its subfolder out; in a fork, or with all imports anew."""
    options = ["--config-file", config, "--data", str(data), *arguments, "OUTPUT_DIR", str(folder / "out")]
    if fresh:
        command = [sys.executable, PRETRAIN_NET, *options]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    else:
        done = run_command("pretrain_net", *options, folder=folder, **how)
    assert bool(done.returncode) == fails, done.stdout + done.stderr
    return done


def figures(text):
    """The last top-1, top-5 and loss in a log."""
    return re.findall(r"top-1 (\S+)  top-5 (\S+)  validation loss (\S+)", text)[-1]


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    return folder, run(data, folder, *SMALL, fresh=True)


def test_a_run_trains_evaluates_and_saves_without_a_warning(trained):
    folder, done = trained
    log = done.stdout + done.stderr
    for word in ("Warning", "WARNING", "warn(", "Traceback"):
        assert word not in log, log
    assert "60 images of 10 classes to train on, 51 to validate on; 2 epochs of 5 steps of 12 images." in log
    assert re.search(r"epoch 2/2  step 5/5  loss \d\.\d+  grad norm \S+  lr \S+  [\d.]+ images/s  eta 0:00:00", log)
    names = {path.name for path in (folder / "out").iterdir()}
    assert {"config.yaml", "metrics.json", "model_best.pth", "model_last.pth", "log.txt", "last_checkpoint"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)


def test_eval_only_measures_the_best_checkpoint_or_a_file(data, trained, tmp_path):
    folder, done = trained
    best = folder / "out" / "model_best.pth"
    again = run(data, folder, "--eval-only", *SMALL)
    assert f"{best}: top-1" in again.stdout
    named = run(data, tmp_path, "--eval-only", "--init-from", str(best), *SMALL)
    assert figures(named.stdout) == figures(again.stdout)
    assert figures(again.stdout)[0] == max(re.findall(r"top-1 (\S+)", done.stdout), key=float)


def test_a_finished_run_is_not_overwritten_without_a_word(data, trained):
    folder, _ = trained
    before = (folder / "out" / "model_last.pth").read_bytes()
    refused = run(data, folder, *SMALL, fails=True)
    assert refused.stderr.strip().splitlines()[-1].startswith("error: OUTPUT_DIR is") and "--resume" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert (folder / "out" / "model_last.pth").read_bytes() == before


def test_torchrun_trains_and_resumes_in_two_processes(data, tmp_path):
    how = {"torchrun": ("--nproc-per-node", "2")}
    done = run(data, tmp_path, *SMALL, **how)
    # Each of the 51 images is counted, once.
    assert "51 to validate on" in done.stdout
    correct = float(figures(done.stdout)[0]) * 51 / 100
    assert correct == pytest.approx(round(correct), abs=0.01)
    checkpoint = torch.load(tmp_path / "out" / "model_last.pth", weights_only=True)
    assert checkpoint["trainer"]["iteration"] == 9
    # One process measures the same.
    alone = run(data, tmp_path, "--eval-only", "--init-from", str(tmp_path / "out" / "model_last.pth"), *SMALL)
    assert figures(alone.stdout) == figures(done.stdout)
    resumed = run(data, tmp_path, "--resume", *SMALL, "SOLVER.EPOCHS", "3", **how)
    assert "Going on after epoch 2." in resumed.stdout and "epoch 3/3" in resumed.stdout
    assert torch.load(tmp_path / "out" / "model_last.pth", weights_only=True)["epoch"] == 3


def error_of(*arguments):
    """What pretrain_net.py says as it stops before a run, as a process that is no process of its own."""
    main = runpy.run_path(PRETRAIN_NET)
    with pytest.raises(SystemExit) as stop:
        main["main"](main["parse_arguments"](["--config-file", DIGITS, *arguments]))
    return stop.value.code


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["DATA.NAME", "folder"], "--data is not given. Name the folder that holds the data (DATA.NAME folder)."),
        (["--data", "nowhere", "DATA.NAME", "CIFAR10"], "--data is 'nowhere', but there is no such folder"),
        (["--init-from", "nowhere.pth"], "--init-from is 'nowhere.pth', but there is no such file"),
        (["--eval-only"], "model_best.pth', but there is no such file"),
        (["DATA.NAME", "CIFAR11"], "DATA.NAME is 'CIFAR11', which is unknown. Did you mean CIFAR10 or CIFAR100"),
        (["DATA.COLOUR", "red"], "There is no key DATA.COLOUR"),
        (["MODEL.NAME", "vit_huge"], "MODEL.NAME is 'vit_huge', a model that timm"),
        (["MODEL.KARAT.RANK", "500"], "MODEL.KARAT.RANK is 500, above N = 26"),
        (["DATA.NUM_CLASSES", "11"], "has 10 classes, but DATA.NUM_CLASSES is 11"),
    ],
)
def test_mistakes_end_in_one_line_before_anything_is_trained(data, tmp_path, arguments, message):
    keys = [] if "--data" in arguments or "folder" in arguments else ["--data", str(data)]
    options = [word for word in arguments if word.startswith("--")]
    flags = arguments[: 2 * len(options) - ("--eval-only" in options)] if options else []
    error = error_of(*keys, *flags, *SMALL, *arguments[len(flags) :], "OUTPUT_DIR", str(tmp_path / "out"))
    assert error.startswith("error: ") and message in error
    assert not list((tmp_path / "out").glob("*.pth"))


def test_a_broken_image_is_named_before_anything_is_trained(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(tmp_path / split / "a" / "1.png")
    (tmp_path / "train/a/2.png").write_text("no image")
    keys = ["DATA.NAME", "folder", "DATA.NUM_CLASSES", "0", "OUTPUT_DIR", str(tmp_path / "out")]
    error = error_of("--data", str(tmp_path), *keys)
    assert "2.png" in error and "no more than 1 in 1000 may be skipped" in error


LEAVES = sorted(path for path in CONFIGS.glob("*.yaml") if "base" not in path.stem)


@pytest.mark.parametrize("path", LEAVES, ids=lambda path: path.stem)
def test_every_leaf_builds_its_model_and_has_the_papers_recipe(path):
    cfg = load_pretrain_cfg(str(path), [])
    num_classes = cfg.DATA.NUM_CLASSES
    with torch.device("meta"):
        model = build_classifier(cfg, num_classes)
    assert model.num_classes == num_classes
    operators = {name for name, _ in model.named_parameters() if name.endswith("operator.coefficients")}
    if path.stem == "digits":
        return
    name, _, dataset = path.stem.rpartition("_")
    # ConViT's first ten blocks are gated.
    assert len(operators) == {"convit_tiny": 2}.get(name, 12)
    assert num_classes == {"imagenet": 1000, "cifar10": 10, "cifar100": 100}[dataset]
    assert (128 if dataset == "imagenet" else 32) == cfg.SOLVER.IMS_PER_BATCH
    assert (1 if name == "vit_base" else 3) == cfg.MODEL.KARAT.GRID_SIZE and cfg.MODEL.KARAT.SHARING == "blockwise"
    hierarchical = name in ("convit_tiny", "swin_tiny")
    assert ((1e-8, 0) if hierarchical else (1e-6, 0.99992)) == (cfg.SOLVER.EPS, cfg.SOLVER.EMA_DECAY)
    assert ("rand-m9-mstd0.5-inc1" if hierarchical else "rand-m15-n2-mstd1.0-inc1") == cfg.AUG.RAND_AUGMENT
    assert (0.3 if name == "swin_tiny" else 0.4) == cfg.AUG.COLOR_JITTER
    assert (cfg.SOLVER.EPOCHS, cfg.SOLVER.WARMUP_EPOCHS, cfg.SOLVER.BASE_LR) == (100, 5, 0.0005)
    assert str(path.stem) in cfg.OUTPUT_DIR


def test_the_digits_config_has_the_quickstarts_backbone(configs):
    from karat_det.engine.setup import load_cfg

    classifier, detector = load_pretrain_cfg(DIGITS, []).MODEL, load_cfg(str(configs / "quickstart.yaml"), []).MODEL
    for key in ("PATCH_SIZE", "EMBED_DIM", "DEPTH", "NUM_HEADS", "DROP_PATH_RATE"):
        assert classifier[key] == detector.VIT[key]
    assert dict(classifier.KARAT) == {key: value for key, value in detector.KARAT.items() if key != "GLOBAL_BLOCKS"}
