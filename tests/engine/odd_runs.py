"""Tiny runs of a detector and of a pretraining, each with one key overridden by an odd value."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import get_cfg
from PIL import Image

from karat_det.config import add_karat_config, pretrain_config
from karat_det.engine.config_values import leaves
from karat_det.engine.pretraining import Pretrainer, load_pretrain_cfg
from karat_det.engine.setup import check_model_and_datasets, load_cfg
from karat_det.engine.trainer import Trainer

# Of right and wrong types, as a command line has them.
VALUES = (
    *("None", "", "x", "True", "False", "{}", "nan", "1e999", "-1e999", "0", "1", "2", "3", "7", "-1", "1000000000"),
    *("0.5", "-0.5", "0.0", "1e9", "-1e-9", "1e-9", "[]", "()", "[0]", "[0.0]", "[-1]", "(1, 2)", "(2, 1)"),
    *("(0.5, 0.5)", "(1, 2, 3)", "(1.0, 2.0, 3.0, 4.0)", "('a', 'b')", "['p2']", "['p2', 'p2']", "['p9']", "[[]]"),
    *("[[1.0]]", "[[8], [8]]", "[None]", "'1'", "a b?*[#%ü", "../..", "YUV-BT.601", "mps", "cuda:99", "norm"),
    *("x" * 3_000, "9" * 5_000, "(" * 300),
)
DETECTOR = {
    "MODEL.VIT.IMG_SIZE": 64,
    "MODEL.VIT.EMBED_DIM": 12,
    "MODEL.VIT.DEPTH": 2,
    "MODEL.VIT.NUM_HEADS": 3,
    "MODEL.VIT.WINDOW_SIZE": 2,
    "MODEL.VIT.WINDOW_BLOCKS": [0],
    "MODEL.KARAT.RANK": 3,
    "MODEL.KARAT.SHARING": "blockwise",
    "MODEL.FPN.OUT_CHANNELS": 8,
    "MODEL.FPN.NORM": "LN",
    "MODEL.BACKBONE.NAME": "build_vitdet_karat_backbone",
    "MODEL.DEVICE": "cpu",
    "MODEL.MASK_ON": True,
    "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
    "MODEL.ANCHOR_GENERATOR.SIZES": [[8], [16], [32], [64], [128]],
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 50,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 50,
    "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
    "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
    "MODEL.ROI_HEADS.NUM_CLASSES": 2,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 8,
    "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
    "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 8,
    "MODEL.ROI_BOX_HEAD.CONV_DIM": 8,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 8,
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
    "TEST.DETECTIONS_PER_IMAGE": 5,
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": 2,
    "SOLVER.STEPS": (),
    "DATASETS.TRAIN": ("odd_runs",),
    "DATASETS.TEST": ("odd_runs",),
    "KARAT_DATA.NAMES": ["odd_runs"],
}
PRETRAINING = {
    "MODEL.IMG_SIZE": 16,
    "MODEL.PATCH_SIZE": 8,
    "MODEL.EMBED_DIM": 12,
    "MODEL.DEPTH": 1,
    "MODEL.NUM_HEADS": 2,
    "MODEL.KARAT.RANK": 3,
    "MODEL.DEVICE": "cpu",
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.EPOCHS": 2,
    "SOLVER.WARMUP_EPOCHS": 1,
}


def detector_keys() -> list[str]:
    add_karat_config(cfg := get_cfg())
    return [key for key, _ in leaves(cfg)]


def pretraining_keys() -> list[str]:
    return [key for key, _ in leaves(pretrain_config())]


def detector_values() -> dict[str, Any]:
    """The value of each key in the runs of a detector."""
    add_karat_config(cfg := get_cfg())
    return dict(leaves(cfg)) | DETECTOR


def nearby(value: Any, drawn: random.Random) -> Any:
    """Another value of the same type; the same one where there is none."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return drawn.choice((value + 1, value - 1, 2 * value, value // 2))
    if isinstance(value, float):
        return drawn.choice((2 * value, value / 2, value + 0.1, -value, 1 - value, value / 1000))
    if isinstance(value, list | tuple) and value:
        kind = type(value)
        others = [value[:-1], [*value, value[-1]], value[::-1], [nearby(item, drawn) for item in value]]
        return kind(drawn.choice(others))
    return value


def write_data(folder: Path) -> tuple[Path, Path]:
    """Writes two images with an object of each class in COCO's format, and four in class folders."""
    drawn = np.random.default_rng(0)
    coco, classes = folder / "coco", folder / "classes"
    images, annotations = [], []
    coco.mkdir(parents=True)
    for image in range(2):
        Image.fromarray(drawn.integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(coco / f"{image}.png")
        images.append({"id": image + 1, "file_name": f"{image}.png", "width": 64, "height": 48})
        for category in range(2):
            x, y, w, h = 4 + 24 * category, 8, 20, 24
            annotations.append(
                {"id": 2 * image + category + 1, "image_id": image + 1, "category_id": category + 1}
                | {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
                | {"segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]}
            )
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (coco / "odd.json").write_text(json.dumps(content))
    for split in ("train", "val"):
        for name in ("a", "b"):
            (classes / split / name).mkdir(parents=True)
            for number in range(2):
                pixels = drawn.integers(0, 255, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(classes / split / name / f"{number}.png")
    return coco, classes


def _words(keys: dict) -> list[str]:
    return [str(word) for pair in keys.items() for word in pair]


def run_detector(data: Path, output: str, key: str, value: str) -> None:
    """Does what train_net.py does with an override, for two steps and an evaluation."""
    own = {"KARAT_DATA.JSONS": [str(data / "odd.json")], "KARAT_DATA.IMAGE_DIRS": [str(data)], "OUTPUT_DIR": output}
    cfg = load_cfg("", [*_words(DETECTOR | own), key, value])
    check_model_and_datasets(cfg, training=True)
    Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
    trainer = Trainer(cfg)
    trainer.max_iter = min(trainer.max_iter, 2)
    trainer.train()


def run_pretraining(data: Path, output: str, key: str, value: str) -> None:
    """Does what pretrain_net.py does with an override, for two steps and an evaluation."""
    cfg = load_pretrain_cfg("", [*_words(PRETRAINING | {"OUTPUT_DIR": output, "DATA.ROOT": str(data)}), key, value])
    Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
    trainer = Pretrainer(cfg)
    trainer.max_iter = min(trainer.max_iter, 2)
    trainer.train()


def is_proper(key: str, error: BaseException) -> bool:
    """Whether an error is one that a user may get for an override: of the kinds that are said in a line, by key."""
    if isinstance(error, FloatingPointError):
        return "diverged" in str(error)
    name = key.rpartition(".")[2]
    names = {name, *(["--data"] if key == "DATA.ROOT" else [])}
    return isinstance(error, ValueError | OSError | ImportError) and any(each in str(error) for each in names)
