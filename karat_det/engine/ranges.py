"""The allowed values of each key: a range for numbers, choices for words, a length for lists.

A pattern is for all keys that it matches, in detectors and in pretraining, so that similar keys have the same range.
The upper bounds are far above any real run; a larger number would take all memory, or never end.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from detectron2.config import CfgNode

from .config_values import leaves, shown
from .divergence import ACTIONS
from .optimizer import FULL_MODEL
from .order import SAMPLERS


@dataclass(frozen=True)
class _Range:
    """Numbers from `least` to `most`, which are excluded if `open_below` or `open_above`."""

    least: float
    most: float
    open_below: bool = False
    open_above: bool = False

    def has(self, value: float) -> bool:
        above = value > self.least if self.open_below else value >= self.least
        return above and (value < self.most if self.open_above else value <= self.most)

    def __str__(self) -> str:
        if self.least == -math.inf:
            return f"at most {self.most:g}"
        if self.open_below or self.most > 1:
            most = "" if self.most == math.inf else f" and {'below' if self.open_above else 'at most'} {self.most:g}"
            return f"{'above' if self.open_below else 'at least'} {self.least:g}{most}"
        return f"from {self.least:g} to {'below ' if self.open_above else ''}{self.most:g}"


def _at_most(most: float) -> _Range:
    """A range for keys whose lower bound the model's builder checks."""
    return _Range(-math.inf, most)


def _above_0(most: float) -> _Range:
    return _Range(0, most, open_below=True)


_UNIT = _Range(0, 1)
_BELOW_1 = _Range(0, 1, open_above=True)
_COUNT = 2**31 - 1
# The first pattern that matches a key decides.
_RANGES = (
    # The model
    ("*.IMG_SIZE *.PRETRAIN_IMG_SIZE *.IMG_WIDTH", _at_most(16_384)),
    ("*.PATCH_SIZE *.VIT.WINDOW_SIZE", _at_most(1_024)),
    ("*.EMBED_DIM", _at_most(65_536)),
    ("*.CONV_DIM *.FC_DIM *.OUT_CHANNELS *.CONVS_DIM", _Range(1, 65_536)),
    ("*_OUT_CHANNELS *.WIDTH_PER_GROUP *.ROI_KEYPOINT_HEAD.CONV_DIMS", _Range(1, 65_536)),
    ("MODEL.RPN.CONV_DIMS", _Range(-1, 65_536)),
    ("*.NUM_GROUPS *.NUM_KEYPOINTS", _Range(1, 1_000)),
    ("*.DEPTH *.DEPTHS *.BLOCKS *.WINDOW_BLOCKS", _at_most(1_000)),
    ("*.NUM_HEADS *.NUM_KARAT_HEADS", _at_most(4_096)),
    ("MODEL.SWIN.WINDOW_SIZE", _at_most(64)),
    ("*.MLP_RATIO", _above_0(64)),
    ("*.SCALE_FACTORS", _above_0(64)),
    ("*.DROP_PATH_RATE", _BELOW_1),
    ("MODEL.KARAT.GRID_SIZE", _at_most(1_024)),
    ("MODEL.KARAT.RANK", _at_most(2**24)),
    ("MODEL.KARAT.SPLINE_ORDER", _at_most(32)),
    ("MODEL.KARAT.SPLINE_RANGE", _at_most(1e6)),
    ("DATA.NUM_CLASSES", _Range(0, 1_000_000)),
    ("*.NUM_CLASSES", _Range(1, 100_000)),
    ("*.NUM_CONVS", _Range(1, 64)),
    ("*.NUM_CONV *.NUM_FC", _Range(0, 64)),
    ("*.POOLER_RESOLUTION", _Range(1, 512)),
    ("*.POOLER_SAMPLING_RATIO", _Range(0, 64)),
    ("*.FREEZE_AT", _Range(0, 5)),
    ("*.PIXEL_MEAN DATA.MEAN", _Range(-1e6, 1e6)),
    ("*.PIXEL_STD", _above_0(1e6)),
    # Anchors, proposals and losses
    ("*.ANCHOR_GENERATOR.SIZES", _above_0(1e5)),
    ("*.ANCHOR_GENERATOR.ASPECT_RATIOS", _above_0(1e3)),
    ("*.ANCHOR_GENERATOR.ANGLES", _Range(-360, 360)),
    ("*.ANCHOR_GENERATOR.OFFSET", _BELOW_1),
    ("*.IOU_LABELS", _Range(-1, 1)),
    ("*.IOU_THRESHOLDS *.IOUS", _above_0(1)),
    ("*.NMS_THRESH *.NMS_THRESH_TEST *.SCORE_THRESH_TEST *.POSITIVE_FRACTION", _UNIT),
    ("*.FOCAL_LOSS_ALPHA *.REPEAT_THRESHOLD", _UNIT),
    ("*.BOUNDARY_THRESH", _Range(-1, 1e9)),
    ("*.PRIOR_PROB", _Range(0, 1, open_below=True, open_above=True)),
    ("*.FOCAL_LOSS_GAMMA *.FED_LOSS_FREQ_WEIGHT_POWER", _Range(0, 100)),
    ("*.FED_LOSS_NUM_CLASSES *.BATCH_SIZE_PER_IMAGE", _Range(1, 1_000_000)),
    ("*_TOPK_* *.TOPK_*", _Range(1, 10_000_000)),
    ("*LOSS_WEIGHT *BETA", _Range(0, 1e6)),
    ("*.BBOX_REG_WEIGHTS", _above_0(1e6)),
    ("MODEL.PROPOSAL_GENERATOR.MIN_SIZE", _Range(0, 100_000)),
    # Images and data
    ("INPUT.LSJ_SCALE", _above_0(16)),
    ("INPUT.CROP.SIZE", _above_0(16_384)),
    ("AUG.SCALE", _above_0(1)),
    ("AUG.RATIO", _above_0(100)),
    ("AUG.FLIP AUG.MIX_PROB AUG.CUTMIX_PROB", _UNIT),
    ("AUG.LABEL_SMOOTHING", _BELOW_1),
    ("AUG.MIXUP AUG.CUTMIX AUG.COLOR_JITTER", _Range(0, 100)),
    ("DATALOADER.NUM_WORKERS", _Range(0, 1_024)),
    # The run
    ("SOLVER.BASE_LR SOLVER.MIN_LR SOLVER.WARMUP_LR", _above_0(1e3)),
    ("SOLVER.BASE_LR_END", _Range(0, 1e3)),
    ("SOLVER.WEIGHT_DECAY", _Range(0, 100)),
    ("SOLVER.BETAS SOLVER.EMA_DECAY", _BELOW_1),
    ("SOLVER.EPS", _above_0(1)),
    ("SOLVER.GAMMA SOLVER.LAYER_DECAY", _above_0(1)),
    ("SOLVER.OPERATOR_LR_FACTOR", _above_0(1e6)),
    ("SOLVER.WARMUP_FACTOR", _UNIT),
    ("SOLVER.MAX_ITER SOLVER.CHECKPOINT_PERIOD SOLVER.STEPS", _Range(1, _COUNT)),
    ("SOLVER.EPOCHS", _Range(1, 1_000_000)),
    ("SOLVER.IMS_PER_BATCH", _Range(1, 1_000_000)),
    ("SOLVER.REFERENCE_WORLD_SIZE", _Range(0, 1_000_000)),
    ("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", _above_0(math.inf)),
    ("SOLVER.CLIP_GRADIENTS.NORM_TYPE", _Range(1, math.inf)),
    ("SOLVER.WARMUP_ITERS SOLVER.WARMUP_EPOCHS *.KEEP_CHECKPOINTS VIS_PERIOD", _Range(0, _COUNT)),
    ("SOLVER.CHECKPOINT_MINUTES", _Range(0, 1e6)),
    ("SOLVER.MAX_SKIPPED_STEPS SOLVER.MAX_ROLLBACKS", _Range(0, _COUNT)),
    ("SOLVER.SPIKE_FACTOR", _Range(1, 1e9, open_below=True)),
    ("TEST.CROP_RATIO", _Range(0.05, 1)),
    ("TEST.DETECTIONS_PER_IMAGE TEST.PRECISE_BN.NUM_ITER", _Range(1, 1_000_000)),
)
# A run that evaluates every epoch at most, or never; a seed of its own or none.
_OF_DETECTORS = (("TEST.EVAL_PERIOD", _Range(0, _COUNT)), ("SEED", _Range(-_COUNT, _COUNT)))
_OF_PRETRAINING = (("TEST.EVAL_PERIOD", _Range(1, _COUNT)), ("SEED", _Range(0, _COUNT)))

_LOSSES = ("smooth_l1", "giou", "diou", "ciou")
_CHOICES = (
    ("VERSION", (2,)),
    ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", (FULL_MODEL, "norm", "value")),
    ("SOLVER.LR_SCHEDULER_NAME", ("WarmupMultiStepLR", "WarmupCosineLR")),
    ("SOLVER.WARMUP_METHOD", ("linear", "constant")),
    ("SOLVER.ON_DIVERGENCE", ACTIONS),
    ("INPUT.MASK_FORMAT", ("polygon", "bitmask")),
    ("INPUT.CROP.TYPE", ("relative", "relative_range", "absolute", "absolute_range")),
    ("INPUT.FORMAT", ("BGR", "RGB", "L")),
    ("INPUT.MIN_SIZE_TRAIN_SAMPLING", ("choice", "range")),
    ("DATALOADER.SAMPLER_TRAIN", SAMPLERS),
    ("*.BBOX_REG_LOSS_TYPE", _LOSSES),
    ("*.POOLER_TYPE", ("ROIAlignV2", "ROIAlign", "ROIPool")),
    ("*.FUSE_TYPE", ("sum", "avg")),
)
_LENGTHS = (
    ("SOLVER.BETAS INPUT.CROP.SIZE", 2),
    ("*.BBOX_REG_WEIGHTS", 4),
)
# Lists that may be empty, besides those with an empty default.
_MAY_BE_EMPTY = ("SOLVER.STEPS", "MODEL.VIT.WINDOW_BLOCKS", "MODEL.KARAT.BLOCKS")


def check_ranges(cfg: CfgNode, defaults: CfgNode) -> None:
    """Checks each value of a config separately.

    Args:
        cfg: its values have the types of the defaults.
        defaults: the config before anything was merged into it.

    Raises:
        ValueError: a value is out of its range. The message names the key, its value and what is allowed.
    """
    by_default = dict(leaves(defaults))
    ranges = (_OF_PRETRAINING if "DATA" in defaults else _OF_DETECTORS) + _RANGES
    for key, value in leaves(cfg):
        allowed = _first(key, _CHOICES)
        if allowed and value not in allowed:
            known = ", ".join(map(str, allowed))
            raise ValueError(f"{key} is {value!r}. Known: {known}.")
        is_list = isinstance(value, list | tuple)
        may_be_empty = not by_default[key] or key in _MAY_BE_EMPTY
        if is_list and ((not value and not may_be_empty) or [] in value or () in value):
            raise ValueError(
                f"{key} is {shown(value)}. It must have an item at least, as {shown(by_default[key])} has."
            )
        length = _first(key, _LENGTHS)
        for row in value if is_list and value and isinstance(value[0], list | tuple) else [value]:
            if length and len(row) != length:
                raise ValueError(f"{key} is {shown(value)}. It must have {length} numbers.")
        bounds = _first(key, ranges)
        for number in _numbers(value):
            if bounds is None:
                if not abs(number) <= 1e9:
                    raise ValueError(f"{key} is {shown(value)}. It must be from -1e9 to 1e9.")
            elif not bounds.has(number):
                each = "Each of them" if is_list else "It"
                raise ValueError(f"{key} is {shown(value)}. {each} must be {bounds}.")


@functools.cache
def _first(key: str, table: tuple) -> Any:
    return next((rule for patterns, rule in table if any(fnmatchcase(key, each) for each in patterns.split())), None)


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value
