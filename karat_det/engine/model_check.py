"""Builds a detector without memory, to check its config in a moment, and whether it fits the memory.

Its tensors are on torch's meta device: they have shapes and no data, so that a terabyte costs nothing.
"""

import os
import re
import traceback
from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import (
    ANCHOR_GENERATOR_REGISTRY,
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    build_model,
)
from detectron2.modeling.proposal_generator import RPN_HEAD_REGISTRY
from torch import nn
from torch.overrides import TorchFunctionMode

from ..config import image_size
from .config_values import leaves, shown

_REGISTRIES = {
    "MODEL.META_ARCHITECTURE": META_ARCH_REGISTRY,
    "MODEL.BACKBONE.NAME": BACKBONE_REGISTRY,
    "MODEL.PROPOSAL_GENERATOR.NAME": PROPOSAL_GENERATOR_REGISTRY,
    "MODEL.ANCHOR_GENERATOR.NAME": ANCHOR_GENERATOR_REGISTRY,
    "MODEL.RPN.HEAD_NAME": RPN_HEAD_REGISTRY,
    "MODEL.ROI_HEADS.NAME": ROI_HEADS_REGISTRY,
    "MODEL.ROI_BOX_HEAD.NAME": ROI_BOX_HEAD_REGISTRY,
    "MODEL.ROI_MASK_HEAD.NAME": ROI_MASK_HEAD_REGISTRY,
}
# Detectron2 names that need unsupported data or results: segments of things that are no objects, boxes with angles,
# proposals from files, or results that are no objects.
_UNFIT = {
    *("SemanticSegmentor", "PanopticFPN", "ProposalNetwork"),
    *("RRPN", "RROIHeads", "RotatedAnchorGenerator", "PrecomputedProposals"),
}
_NORMS = ("", "GN", "LN", "BN", "FrozenBN", "SyncBN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")
_CANNOT = "The model of this config cannot be built: "
# Weights, their gradients and AdamW's two averages, in float32.
_BYTES_TRAINED = 16


class _OnMeta(TorchFunctionMode):
    """Makes uninitialised tensors on the meta device; torch.device("meta") would also move values that are read."""

    _MAKING = frozenset((torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn))

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self._MAKING and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def check_model(cfg: CfgNode, training: bool, num_processes: int = 1) -> None:
    """Builds a detector without memory.

    Args:
        cfg: a config of `load_cfg`.
        training: whether it will be trained, else only evaluated.
        num_processes: how many processes share the images of a step.

    Raises:
        ValueError: its parts do not fit each other, or it, or the images of a step, need more memory than there is.
    """
    _check_names(cfg)
    own = cfg.clone()
    own.defrost()
    try:
        try:
            own.MODEL.DEVICE = "meta"
            with _OnMeta():
                model = build_model(own)
        except Exception as error:
            if "meta" not in str(error).lower():
                raise
            # A user's own model may read values of its tensors, or combine them with others.
            own.MODEL.DEVICE = "cpu"
            model = build_model(own)
    except Exception as error:  # Detectron2 and torch raise many kinds of errors for impossible sizes
        if isinstance(error, ValueError | OSError) and re.search(r"[A-Z]\.[A-Z_]{2}", str(error)):
            raise
        raise ValueError(_CANNOT + _with_likely_keys(cfg, error)) from error
    check_room(cfg, model, training)
    height, width = image_size(cfg)
    num_images = cfg.SOLVER.IMS_PER_BATCH // num_processes if training else 1
    needed, room, place = num_images * height * width * len(cfg.MODEL.PIXEL_MEAN) * 4, *_memory(cfg)
    if needed > room:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}: the images of a step, of {height} × {width} pixels, "
            f"take {needed / 1e9:,.0f} GB, and {place} has {room / 1e9:,.0f} GB. Lower it, or the model's IMG_SIZE."
        )


def check_room(cfg: CfgNode, model: nn.Module, training: bool) -> None:
    """Checks that a model, on any device, fits the memory of MODEL.DEVICE.

    Args:
        cfg: a detector's config, or a pretraining's.
        model: built from it.
        training: whether it will be trained.

    Raises:
        ValueError: it does not fit.
    """
    sizes = {name: tensor.numel() for name, tensor in model.named_parameters()}
    count, (room, place) = sum(sizes.values()), _memory(cfg)
    needed = count * (_BYTES_TRAINED if training else 4)
    if needed > room:
        largest = max(sizes, key=sizes.get)
        raise ValueError(
            f"The model of this config has {count / 1e6:,.0f} million weights, which take {needed / 1e9:,.0f} GB, and "
            f"{place} has {room / 1e9:,.0f} GB. Its largest tensor is {largest}, of shape "
            f"{tuple(model.get_parameter(largest).shape)}. Lower the sizes that make it: {_large_sizes(cfg)}."
        )


def _large_sizes(cfg: CfgNode) -> str:
    sizes = {
        key: value
        for key, value in leaves(cfg)
        if key.startswith("MODEL.") and type(value) is int and re.search(r"DIM|DEPTH|SIZE|NUM|CHANNELS|RANK", key)
    }
    return ", ".join(f"{key} is {sizes[key]}" for key in sorted(sizes, key=sizes.get, reverse=True)[:4])


def _memory(cfg: CfgNode) -> tuple[float, str]:
    """Bytes of memory of MODEL.DEVICE, and the device's name."""
    device = torch.device(cfg.MODEL.DEVICE)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory, "the GPU"
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine"


def _check_names(cfg: CfgNode) -> None:
    values = dict(leaves(cfg))
    if cfg.MODEL.META_ARCHITECTURE not in ("GeneralizedRCNN", "RetinaNet"):
        used = {"MODEL.META_ARCHITECTURE"}
    elif cfg.MODEL.META_ARCHITECTURE == "RetinaNet":
        used = {"MODEL.BACKBONE.NAME", "MODEL.ANCHOR_GENERATOR.NAME"}
    else:
        heads = cfg.MODEL.ROI_HEADS.NAME
        unused = {"MODEL.ROI_BOX_HEAD.NAME"} if heads == "Res5ROIHeads" else set()
        unused |= {"MODEL.ROI_MASK_HEAD.NAME"} if not cfg.MODEL.MASK_ON else set()
        used = set(_REGISTRIES) - unused
    for key in sorted(used):
        known = [name for name, _ in _REGISTRIES[key] if name not in _UNFIT]
        if values[key] not in known:
            raise ValueError(f"{_CANNOT}{key} is {shown(values[key])}. Known: {', '.join(sorted(known))}.")
    box_head = cfg.MODEL.ROI_BOX_HEAD
    if "MODEL.ROI_BOX_HEAD.NAME" in used and not box_head.NUM_CONV + box_head.NUM_FC:
        raise ValueError(f"{_CANNOT}MODEL.ROI_BOX_HEAD.NUM_CONV and NUM_FC are 0. One of them must be at least 1.")
    for key, value in values.items():
        if key.endswith(".NORM") and value not in _NORMS:
            raise ValueError(f"{_CANNOT}{key} is {value!r}. Known: {', '.join(map(repr, _NORMS))}.")
        if key.endswith(".NORM") and value in ("SyncBN", "nnSyncBN") and cfg.MODEL.DEVICE == "cpu":
            raise ValueError(f"{_CANNOT}{key} is {value!r}, which is for GPUs, and MODEL.DEVICE is cpu.")


def _with_likely_keys(cfg: CfgNode, error: Exception) -> str:
    """An error's message, with the keys whose values are in it."""
    # A bare assert has no message but its own line.
    text = " ".join(str(error).split()) or traceback.extract_tb(error.__traceback__)[-1].line or type(error).__name__
    words = set(re.findall(r"[\w.]+", text))
    likely = [
        f"{key} is {shown(value)}" for key, value in leaves(cfg) if key.startswith("MODEL.") and _is_in(value, words)
    ]
    return text + (f" Most likely of: {'; '.join(likely[:8])}." if likely else "")


def _is_in(value: Any, words: set[str]) -> bool:
    if isinstance(value, list | tuple):
        return any(_is_in(item, words) for item in value)
    return not isinstance(value, bool) and value not in ("", 0, 1, 2, 3, 4, None) and str(value) in words
