"""Checks of the values in a config, of detectors and of pretraining, before anything is built."""

import os
import re
from fnmatch import fnmatchcase

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.utils import comm
from timm.data.auto_augment import rand_augment_transform

from ..config import add_karat_config, image_size, pretrain_config
from ..data.mapper import build_augmentation
from .config_values import leaves, shown
from .ranges import check_ranges

# Bytes of a file's name, on every common file system.
_MAX_NAME = 255
# Detectron2 keys without effect here, and why. A user who sets one expects an effect.
_WITHOUT_EFFECT = (
    ("SOLVER.MOMENTUM SOLVER.NESTEROV SOLVER.BIAS_LR_FACTOR SOLVER.WEIGHT_DECAY_*", "the optimiser is AdamW"),
    ("SOLVER.NUM_DECAYS", "it is for a schedule that is not offered"),
    ("TEST.AUG.*", "each image is evaluated once, as INPUT.RESIZE says"),
    ("MODEL.KEYPOINT_ON MODEL.ROI_KEYPOINT_HEAD.* TEST.KEYPOINT_OKS_SIGMAS", "keypoints are not read"),
    ("MODEL.LOAD_PROPOSALS", "proposals are made, and not read from files, which could run code"),
    ("MODEL.SEM_SEG_HEAD.* MODEL.PANOPTIC_FPN.*", "there is no semantic segmentation"),
    ("GLOBAL.HACK", "nothing reads it"),
)


def check_detector_config(cfg: CfgNode) -> None:
    """Checks the keys that no builder checks before the datasets have been read or hours have passed.

    Raises:
        ValueError: a value is not allowed. The message names the key, its value and what is allowed.
    """
    defaults = get_cfg()
    add_karat_config(defaults)
    check_ranges(cfg, defaults)
    _check_without_effect(cfg, defaults)
    _check_device(cfg)
    _check_output_dir(cfg)
    _check_lists_that_belong_together(cfg)
    build_augmentation(cfg, is_train=True)
    if cfg.SOLVER.LAYER_DECAY != 1 and cfg.MODEL.BACKBONE.NAME != "build_vitdet_karat_backbone":
        raise ValueError(
            f"SOLVER.LAYER_DECAY is {cfg.SOLVER.LAYER_DECAY}, which is for build_vitdet_karat_backbone. With "
            f"MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME} it must be 1.0."
        )
    world_size = comm.get_world_size()
    if cfg.SOLVER.IMS_PER_BATCH % world_size:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}, which the {world_size} processes do not divide."
        )
    tasks = ("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",)
    metrics = [f"{task}/{metric}" for task in tasks for metric in ("AP", "AP50", "AP75", "APs", "APm", "APl")]
    if cfg.TEST.BEST_METRIC not in ("", *metrics):
        raise ValueError(
            f"TEST.BEST_METRIC is {cfg.TEST.BEST_METRIC!r}. With MODEL.MASK_ON {cfg.MODEL.MASK_ON} it must be "
            f"empty or one of {', '.join(metrics)}."
        )


def check_pretrain_config(cfg: CfgNode) -> None:
    """Checks the keys that no builder checks before the data has been read or hours have passed.

    Raises:
        ValueError: a value is not allowed. The message names the key, its value and what is allowed.
    """
    check_ranges(cfg, pretrain_config())
    _check_device(cfg)
    _check_output_dir(cfg)
    world_size = comm.get_world_size()
    solver, aug = cfg.SOLVER, cfg.AUG
    if solver.IMS_PER_BATCH % world_size:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {solver.IMS_PER_BATCH}. It must be at least 1, and a multiple of the number of "
            f"processes, {world_size}."
        )
    if mixes_labels(cfg) and solver.IMS_PER_BATCH // world_size % 2:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {solver.IMS_PER_BATCH}, {solver.IMS_PER_BATCH // world_size} for each of "
            f"{world_size} processes. Mixup and cutmix pair images, so it must be even; or set AUG.MIX_PROB 0.0."
        )
    if solver.WARMUP_EPOCHS >= solver.EPOCHS:
        raise ValueError(
            f"SOLVER.WARMUP_EPOCHS is {solver.WARMUP_EPOCHS}. It must be below SOLVER.EPOCHS, {solver.EPOCHS}."
        )
    for key in ("MEAN", "STD"):
        values = tuple(cfg.DATA[key])
        if len(values) != 3 or (key == "STD" and min(values) <= 0):
            raise ValueError(
                f"DATA.{key} is {values}. It must have a number for each of red, green and blue, of values from 0 to 1"
                f"{', above 0' if key == 'STD' else ''}."
            )
    for key in ("SCALE", "RATIO"):
        bounds = tuple(aug[key])
        if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1]:
            raise ValueError(f"AUG.{key} is {bounds}. It must be (smallest, largest), both above 0.")
    if aug.RAND_AUGMENT:
        try:
            rand_augment_transform(aug.RAND_AUGMENT)
        except (AssertionError, ValueError) as error:  # what timm raises
            raise ValueError(
                f"AUG.RAND_AUGMENT is {aug.RAND_AUGMENT!r}. It must be '' or RandAugment in timm's words, such as "
                f"'rand-m9-mstd0.5-inc1'. {error}".rstrip()
            ) from error


def mixes_labels(cfg: CfgNode) -> bool:
    """Whether pretraining mixes images, and with them their labels."""
    return cfg.AUG.MIX_PROB > 0 and (cfg.AUG.MIXUP > 0 or cfg.AUG.CUTMIX > 0)


def _check_without_effect(cfg: CfgNode, defaults: CfgNode) -> None:
    by_default = dict(leaves(defaults))
    for key, value in leaves(cfg):
        for patterns, reason in _WITHOUT_EFFECT:
            if value != by_default[key] and any(fnmatchcase(key, pattern) for pattern in patterns.split()):
                raise ValueError(
                    f"{key} is {shown(value)}, which would have no effect: {reason}. Leave it at its default, "
                    f"{shown(by_default[key])}."
                )


def _check_output_dir(cfg: CfgNode) -> None:
    if not cfg.OUTPUT_DIR.strip():
        raise ValueError(f"OUTPUT_DIR is {cfg.OUTPUT_DIR!r}. It must be the path of a folder.")
    if "://" in cfg.OUTPUT_DIR:
        raise ValueError(f"OUTPUT_DIR is {shown(cfg.OUTPUT_DIR)}. It must be the path of a folder on this machine.")
    if any(len(os.fsencode(part)) > _MAX_NAME for part in cfg.OUTPUT_DIR.split("/")):
        raise ValueError(f"OUTPUT_DIR is {shown(cfg.OUTPUT_DIR)}. A folder's name has at most {_MAX_NAME} bytes.")


def _check_device(cfg: CfgNode) -> None:
    device = cfg.MODEL.DEVICE
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", device):
        raise ValueError(f"MODEL.DEVICE is {shown(device)}. It must be cpu, cuda, or cuda:1 for the second GPU.")
    count = torch.cuda.device_count()
    if device.startswith("cuda:") and int(device[5:]) >= count:
        raise ValueError(f"MODEL.DEVICE is {device}, but this machine has {count} GPUs, from cuda:0.")


def _check_lists_that_belong_together(cfg: CfgNode) -> None:
    """Checks the keys of a detector whose values must fit each other, and that no builder checks."""
    model, solver, crop = cfg.MODEL, cfg.SOLVER, cfg.INPUT.CROP
    channels = 1 if cfg.INPUT.FORMAT == "L" else 3
    for key in ("PIXEL_MEAN", "PIXEL_STD"):
        if len(model[key]) != channels:
            raise ValueError(
                f"MODEL.{key} is {shown(model[key])}. It must have {channels} numbers, with INPUT.FORMAT "
                f"{cfg.INPUT.FORMAT}."
            )
    for name in ("RPN", "ROI_HEADS", "RETINANET"):
        thresholds, labels = model[name].IOU_THRESHOLDS, model[name].IOU_LABELS
        if list(thresholds) != sorted(thresholds) or len(labels) != len(thresholds) + 1:
            raise ValueError(
                f"MODEL.{name}.IOU_THRESHOLDS is {shown(thresholds)}, IOU_LABELS {shown(labels)}. The thresholds must "
                "rise, and there must be one label more: below the first, between two, above the last."
            )
    cascade = model.ROI_BOX_CASCADE_HEAD
    if len(cascade.IOUS) != len(cascade.BBOX_REG_WEIGHTS):
        raise ValueError(
            f"MODEL.ROI_BOX_CASCADE_HEAD.IOUS is {shown(cascade.IOUS)}, BBOX_REG_WEIGHTS "
            f"{shown(cascade.BBOX_REG_WEIGHTS)}. Both must have an item for each stage."
        )
    if 0 in model.RPN.CONV_DIMS:
        raise ValueError(f"MODEL.RPN.CONV_DIMS is {model.RPN.CONV_DIMS}. Each must be -1, or at least 1.")
    ratios = model.ANCHOR_GENERATOR.ASPECT_RATIOS
    head = "RETINANET" if model.META_ARCHITECTURE == "RetinaNet" else "RPN"
    if len(ratios) not in (1, len(model[head].IN_FEATURES)):
        raise ValueError(
            f"MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS is {shown(ratios)}. It must have one list of ratios, or one for "
            f"each of MODEL.{head}.IN_FEATURES, {model[head].IN_FEATURES}."
        )
    sizes = model.ANCHOR_GENERATOR.SIZES
    if len({len(of_level) for of_level in sizes}) > 1 or len({len(of_level) for of_level in ratios}) > 1:
        raise ValueError(
            f"MODEL.ANCHOR_GENERATOR.SIZES is {shown(sizes)}, ASPECT_RATIOS {shown(ratios)}. All levels must have as "
            "many sizes and as many ratios, since one head predicts for all."
        )
    for name in ("RPN", "ROI_HEADS", "RETINANET"):
        levels = model[name].IN_FEATURES
        if len(set(levels)) < len(levels):
            raise ValueError(f"MODEL.{name}.IN_FEATURES is {shown(levels)}. It must name each level once.")
    box_head = model.ROI_BOX_HEAD
    if box_head.USE_FED_LOSS and not (
        box_head.USE_SIGMOID_CE and all("class_image_count" in MetadataCatalog.get(each) for each in cfg.DATASETS.TRAIN)
    ):
        raise ValueError(
            "MODEL.ROI_BOX_HEAD.USE_FED_LOSS is True. It needs USE_SIGMOID_CE True, and datasets that say how many "
            f"images each class is in, as LVIS does; DATASETS.TRAIN is {cfg.DATASETS.TRAIN}."
        )
    height, width = image_size(cfg)
    scale = cfg.INPUT.LSJ_SCALE
    if cfg.INPUT.RESIZE == "lsj" and len(scale) == 2 and min(height, width) > 0 and scale[0] * min(height, width) < 4:
        raise ValueError(
            f"INPUT.LSJ_SCALE is {cfg.INPUT.LSJ_SCALE}, the model's IMG_SIZE and IMG_WIDTH {height} × {width}: the "
            "smallest images would have a side of less than 4 pixels. Raise one of these."
        )
    if cfg.DATALOADER.SAMPLER_TRAIN == "RandomSubsetTrainingSampler" and "RANDOM_SUBSET_RATIO" not in cfg.DATALOADER:
        raise ValueError(
            "DATALOADER.SAMPLER_TRAIN is RandomSubsetTrainingSampler. It needs DATALOADER.RANDOM_SUBSET_RATIO, a key "
            "that this Detectron2 does not have."
        )
    if list(solver.STEPS) != sorted(set(solver.STEPS)):
        raise ValueError(f"SOLVER.STEPS is {solver.STEPS}. It must rise.")
    if sum(step <= solver.MAX_ITER for step in solver.STEPS) >= solver.MAX_ITER:
        raise ValueError(
            f"SOLVER.STEPS is {solver.STEPS}. There must be fewer of them than iterations, SOLVER.MAX_ITER "
            f"{solver.MAX_ITER}."
        )
    if solver.RESCALE_INTERVAL and solver.WARMUP_ITERS >= solver.MAX_ITER:
        raise ValueError(
            f"SOLVER.RESCALE_INTERVAL is True, which leaves SOLVER.WARMUP_ITERS, {solver.WARMUP_ITERS}, out of the "
            f"schedule: it must be below SOLVER.MAX_ITER, {solver.MAX_ITER}."
        )
    if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range" and len(cfg.INPUT.MIN_SIZE_TRAIN) != 2:
        raise ValueError(
            f"INPUT.MIN_SIZE_TRAIN is {cfg.INPUT.MIN_SIZE_TRAIN}. With INPUT.MIN_SIZE_TRAIN_SAMPLING range it must be "
            "(smallest, largest)."
        )
    if solver.BASE_LR_END > solver.BASE_LR:
        raise ValueError(
            f"SOLVER.BASE_LR_END is {solver.BASE_LR_END}. It must be at most SOLVER.BASE_LR, {solver.BASE_LR}."
        )
    if solver.REFERENCE_WORLD_SIZE and solver.IMS_PER_BATCH % solver.REFERENCE_WORLD_SIZE:
        raise ValueError(
            f"SOLVER.REFERENCE_WORLD_SIZE is {solver.REFERENCE_WORLD_SIZE}. It must divide SOLVER.IMS_PER_BATCH, "
            f"{solver.IMS_PER_BATCH}, or be 0."
        )
    if crop.ENABLED and crop.TYPE.startswith("relative") and max(crop.SIZE) > 1:
        raise ValueError(f"INPUT.CROP.SIZE is {crop.SIZE}. With TYPE {crop.TYPE} it must be above 0 and at most 1.")
    if crop.ENABLED and crop.TYPE.startswith("absolute") and not all(x >= 1 and x == int(x) for x in crop.SIZE):
        raise ValueError(f"INPUT.CROP.SIZE is {crop.SIZE}. With TYPE {crop.TYPE} it must be whole pixels, at least 1.")
    for row in cfg.TEST.EXPECTED_RESULTS:
        kinds = [type(item) for item in row] if isinstance(row, list | tuple) else []
        if kinds[:2] != [str, str] or len(kinds) != 4 or not set(kinds[2:]) <= {int, float}:
            raise ValueError(
                f"TEST.EXPECTED_RESULTS is {shown(cfg.TEST.EXPECTED_RESULTS)}. Each item must be [task, metric, value, "
                "tolerance], such as ['bbox', 'AP', 38.5, 0.2]."
            )


def check_classes(what: str, theirs: list[str], ours: list[str]) -> None:
    """Raises ValueError if the classes or their order differ: a label would mean another class."""
    if len(theirs) != len(ours):
        raise ValueError(
            f"{what} was trained on {len(theirs)} classes, and the data has {len(ours)}. Name the data that it was "
            "trained on (--data, DATA.NAME)."
        )
    different = [(label, *names) for label, names in enumerate(zip(theirs, ours, strict=True)) if len(set(names)) > 1]
    if different:
        raise ValueError(
            "{} was trained on other classes: number {} is {!r} there and {!r} in the data. Name the data that it was "
            "trained on (--data, DATA.NAME).".format(what, *different[0])
        )
