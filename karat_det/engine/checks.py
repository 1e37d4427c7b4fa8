"""Checks of the values in a config, of detectors and of pretraining, before anything is built."""

import math

from detectron2.config import CfgNode
from detectron2.utils import comm
from timm.data.auto_augment import rand_augment_transform

from ..data.mapper import build_augmentation
from .divergence import ACTIONS
from .optimizer import FULL_MODEL


def check_detector_config(cfg: CfgNode) -> None:
    """Checks the keys that no builder checks before the datasets have been read or hours have passed.

    Raises:
        ValueError: a value is not allowed. The message names the key, its value and what is allowed.
    """
    clip = cfg.SOLVER.CLIP_GRADIENTS
    for key, value, allowed in (
        ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", clip.CLIP_TYPE, (FULL_MODEL, "norm", "value")),
        ("SOLVER.LR_SCHEDULER_NAME", cfg.SOLVER.LR_SCHEDULER_NAME, ("WarmupMultiStepLR", "WarmupCosineLR")),
        ("INPUT.MASK_FORMAT", cfg.INPUT.MASK_FORMAT, ("polygon", "bitmask")),
        ("INPUT.CROP.TYPE", cfg.INPUT.CROP.TYPE, ("relative", "relative_range", "absolute", "absolute_range")),
    ):
        if value not in allowed:
            raise ValueError(f"{key} is {value!r}, which is unknown. Known: {', '.join(allowed)}.")
    build_augmentation(cfg, is_train=True)
    for key in ("MAX_ITER", "IMS_PER_BATCH", "CHECKPOINT_PERIOD"):
        if cfg.SOLVER[key] < 1:
            raise ValueError(f"SOLVER.{key} is {cfg.SOLVER[key]}. It must be at least 1.")
    _check_faults(cfg)
    if cfg.SOLVER.KEEP_CHECKPOINTS < 0:
        raise ValueError(f"SOLVER.KEEP_CHECKPOINTS is {cfg.SOLVER.KEEP_CHECKPOINTS}. It must be at least 0.")
    if not 0 < cfg.SOLVER.LAYER_DECAY <= 1:
        raise ValueError(f"SOLVER.LAYER_DECAY is {cfg.SOLVER.LAYER_DECAY}. It must be above 0 and at most 1.")
    if cfg.SOLVER.LAYER_DECAY != 1 and cfg.MODEL.BACKBONE.NAME != "build_vitdet_karat_backbone":
        raise ValueError(
            f"SOLVER.LAYER_DECAY is {cfg.SOLVER.LAYER_DECAY}, which is for build_vitdet_karat_backbone. With "
            f"MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME} it must be 1.0."
        )
    if not cfg.SOLVER.OPERATOR_LR_FACTOR > 0:
        raise ValueError(f"SOLVER.OPERATOR_LR_FACTOR is {cfg.SOLVER.OPERATOR_LR_FACTOR}. It must be above 0.")
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
    world_size = comm.get_world_size()
    solver, aug = cfg.SOLVER, cfg.AUG
    if solver.IMS_PER_BATCH < 1 or solver.IMS_PER_BATCH % world_size:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {solver.IMS_PER_BATCH}. It must be at least 1, and a multiple of the number of "
            f"processes, {world_size}."
        )
    if mixes_labels(cfg) and solver.IMS_PER_BATCH // world_size % 2:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {solver.IMS_PER_BATCH}, {solver.IMS_PER_BATCH // world_size} for each of "
            f"{world_size} processes. Mixup and cutmix pair images, so it must be even; or set AUG.MIX_PROB 0.0."
        )
    _check_faults(cfg)
    for key, value, least in (
        ("SOLVER.EPOCHS", solver.EPOCHS, 1),
        ("SOLVER.WARMUP_EPOCHS", solver.WARMUP_EPOCHS, 0),
        ("TEST.EVAL_PERIOD", cfg.TEST.EVAL_PERIOD, 1),
        ("DATA.NUM_CLASSES", cfg.DATA.NUM_CLASSES, 0),
        ("DATALOADER.NUM_WORKERS", cfg.DATALOADER.NUM_WORKERS, 0),
        ("SEED", cfg.SEED, 0),
        ("AUG.MIXUP", aug.MIXUP, 0),
        ("AUG.CUTMIX", aug.CUTMIX, 0),
        ("AUG.COLOR_JITTER", aug.COLOR_JITTER, 0),
        ("SOLVER.WEIGHT_DECAY", solver.WEIGHT_DECAY, 0),
    ):
        if value < least:
            raise ValueError(f"{key} is {value}. It must be at least {least}.")
    for key in ("BASE_LR", "WARMUP_LR", "MIN_LR", "EPS"):
        if not solver[key] > 0:
            raise ValueError(f"SOLVER.{key} is {solver[key]}. It must be above 0.")
    if solver.WARMUP_EPOCHS >= solver.EPOCHS:
        raise ValueError(
            f"SOLVER.WARMUP_EPOCHS is {solver.WARMUP_EPOCHS}. It must be below SOLVER.EPOCHS, {solver.EPOCHS}."
        )
    for key, value in (
        ("AUG.FLIP", aug.FLIP),
        ("AUG.MIX_PROB", aug.MIX_PROB),
        ("AUG.CUTMIX_PROB", aug.CUTMIX_PROB),
        ("AUG.LABEL_SMOOTHING", aug.LABEL_SMOOTHING),
        ("SOLVER.EMA_DECAY", solver.EMA_DECAY),
        ("TEST.CROP_RATIO", cfg.TEST.CROP_RATIO),
    ):
        may_be_1 = key not in ("AUG.LABEL_SMOOTHING", "SOLVER.EMA_DECAY")
        if not 0 <= value <= 1 or (value == 1 and not may_be_1):
            raise ValueError(f"{key} is {value}. It must be from 0 to {'1' if may_be_1 else 'below 1'}.")
    if not cfg.TEST.CROP_RATIO:
        raise ValueError("TEST.CROP_RATIO is 0. It must be above 0 and at most 1.")
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
    known = (FULL_MODEL, "norm", "value")
    if solver.CLIP_GRADIENTS.CLIP_TYPE not in known:
        raise ValueError(
            f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE is {solver.CLIP_GRADIENTS.CLIP_TYPE!r}. Known: {', '.join(known)}."
        )


def mixes_labels(cfg: CfgNode) -> bool:
    """Whether pretraining mixes images, and with them their labels."""
    return cfg.AUG.MIX_PROB > 0 and (cfg.AUG.MIXUP > 0 or cfg.AUG.CUTMIX > 0)


def _check_faults(cfg: CfgNode) -> None:
    """Checks what detectors and classifiers have against faults."""
    minutes = cfg.SOLVER.CHECKPOINT_MINUTES
    if not 0 <= minutes < math.inf:
        raise ValueError(f"SOLVER.CHECKPOINT_MINUTES is {minutes}. It must be a number of minutes, or 0 for never.")
    if cfg.SOLVER.ON_DIVERGENCE not in ACTIONS:
        raise ValueError(
            f"SOLVER.ON_DIVERGENCE is {cfg.SOLVER.ON_DIVERGENCE!r}, which is unknown. Known: {', '.join(ACTIONS)}."
        )
    for key in ("MAX_SKIPPED_STEPS", "MAX_ROLLBACKS"):
        if cfg.SOLVER[key] < 0:
            raise ValueError(f"SOLVER.{key} is {cfg.SOLVER[key]}. It must be at least 0.")
    if not 1 < cfg.SOLVER.SPIKE_FACTOR < math.inf:
        raise ValueError(f"SOLVER.SPIKE_FACTOR is {cfg.SOLVER.SPIKE_FACTOR}. It must be above 1.")
