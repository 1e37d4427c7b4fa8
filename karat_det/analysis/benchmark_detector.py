"""What a detector with KArAt costs beside the same one with softmax: a training step, and inference.

Training steps are timed in a fresh process that reuses memory freed by tensors, as PyTorch does on CUDA.
"""

import logging
from collections.abc import Callable, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import annotations_to_instances
from detectron2.evaluation import inference_context
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler
from detectron2.structures import Boxes, BoxMode, Instances
from torch import nn

from ..config import image_size
from ..engine.optimizer import build_optimizer
from ..engine.setup import load_cfg
from ..engine.trainer import Step
from .benchmark_report import Comparison
from .measuring import Turns, in_fresh_process, keep_freed_memory, peak_memory

logger = logging.getLogger(__name__)


def compare_steps(config_file: str, opts: Sequence[str], turns: Turns, batch_size: int = 4) -> list[Comparison]:
    """Time and peak memory of a training step of a detector, over the same detector with softmax.

    A step is the trainer's: forward with all losses, backward, clipping, AdamW; in bfloat16 on CUDA if the config says
    so. Weights and images are random, from one seed, and the heads of both get the same proposals. Steps are timed in
    a process that reuses freed memory; on the CPU a run of the trainer, which does not, takes longer with either. The
    memory includes weights, AdamW's state and a step.
    """
    cfgs = with_and_without(config_file, opts, turns.device)
    what = _describe(cfgs["KArAt"], config_file, opts, batch_size)
    logger.info("Training, %s: steps, then their backbones alone, in a process of their own", what)
    step_seconds, backbone_seconds = in_fresh_process(_step_seconds, cfgs, batch_size, turns)
    logger.info("Its peak memory")
    peaks = {name: in_fresh_process(_step_peak, cfg, batch_size) for name, cfg in cfgs.items()}
    return [
        Comparison(f"{label}, {what}", "softmax", values["KArAt"], values["softmax"], unit, goal)
        for label, values, unit, goal in (
            ("training step", step_seconds, "s", 1.0),
            ("forward + backward of the backbone", backbone_seconds, "s", None),
            ("peak memory of training", peaks, "MiB", 1.0),
        )
    ]


def compare_inference(config_file: str, opts: Sequence[str], turns: Turns) -> Comparison:
    """Images a second, one at a time as in evaluation, over those of the same detector with softmax.

    The weights are random, so that there are as many proposals as there can be and hardly any detections.
    """
    cfgs = with_and_without(config_file, opts, turns.device)
    what = _describe(cfgs["KArAt"], config_file, opts, 1)
    logger.info("Inference, %s", what)
    predictions = {}
    for name, cfg in cfgs.items():
        torch.manual_seed(0)
        predictions[name] = _predict(build_model(cfg), synthetic_batch(cfg, 1))
    seconds = turns.median_seconds(predictions)
    label = f"inference (more is better), {what}"
    return Comparison(label, "softmax", 1 / seconds["KArAt"], 1 / seconds["softmax"], "images/s")


def synthetic_batch(cfg: CfgNode, batch_size: int) -> list[dict[str, Any]]:
    """Random images of the model's size, in a mapper's form, each with eight boxes and masks; always the same."""
    rng = np.random.default_rng(0)
    height, width = image_size(cfg)
    batch = []
    for _ in range(batch_size):
        image = torch.from_numpy(rng.integers(0, 256, (3, height, width), dtype=np.uint8))
        annotations = []
        for _ in range(8):
            box_width, box_height = rng.uniform(0.1, 0.5, 2) * (width, height)
            x, y = rng.uniform(0, (width - box_width, height - box_height))
            right, bottom = x + box_width, y + box_height
            annotations.append(
                {
                    "bbox": [x, y, right, bottom],
                    "bbox_mode": BoxMode.XYXY_ABS,
                    "category_id": int(rng.integers(cfg.MODEL.ROI_HEADS.NUM_CLASSES)),
                    "segmentation": [[x, y, right, y, right, bottom, x, bottom]],
                }
            )
        instances = annotations_to_instances(annotations, (height, width), cfg.INPUT.MASK_FORMAT)
        batch.append({"image": image, "height": height, "width": width, "instances": instances})
    return batch


def synthetic_proposals(batch: list[dict[str, Any]], count: int) -> list[Instances]:
    """`count` proposals for each image of a synthetic batch: boxes of its objects, moved.

    A quarter overlaps its object by at least half, so that the heads sample as many positives as they may, as in a
    trained detector.
    """
    generator = torch.Generator().manual_seed(0)
    proposals = []
    for item in batch:
        truth = item["instances"].gt_boxes.tensor
        corners = truth[torch.arange(count) % len(truth)].unflatten(1, (2, 2))
        sizes = corners[:, 1] - corners[:, 0]
        moves = sizes * (torch.rand(count, 2, generator=generator) - 0.5)
        boxes = Boxes((corners + moves.unsqueeze(1)).flatten(1))
        boxes.clip(item["instances"].image_size)
        fields = {"proposal_boxes": boxes, "objectness_logits": torch.zeros(count)}
        proposals.append(Instances(item["instances"].image_size, **fields))
    return proposals


def make_step(cfg: CfgNode, batch_size: int) -> Step:
    """The trainer's step on a detector with random weights, over and over on one synthetic batch.

    The model computes its proposals, but the heads get synthetic ones. The heads take most of a step, and longer for
    more positive proposals. The number of these differs between models with random weights, whatever their attention.
    """
    torch.manual_seed(0)
    model = build_model(cfg)
    batch = synthetic_batch(cfg, batch_size)
    proposals = [item.to(model.device) for item in synthetic_proposals(batch, cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN)]
    model.roi_heads.register_forward_pre_hook(lambda heads, inputs: (*inputs[:2], proposals, *inputs[3:]))
    optimizer = build_optimizer(cfg, model)
    # It sets the rates of the warm-up's first step, which leave the weights nearly as they are.
    build_lr_scheduler(cfg, optimizer)
    return Step(model, repeat(batch), optimizer, cfg)


def _describe(cfg: CfgNode, config_file: str, opts: Sequence[str], batch_size: int) -> str:
    height, width = image_size(cfg)
    images = "1 image" if batch_size == 1 else f"{batch_size} images"
    overrides = f" with {' '.join(opts)}" if opts else ""
    shorthand = f"G{cfg.MODEL.KARAT.GRID_SIZE}{cfg.MODEL.KARAT.SHARING[0].upper()}"
    return f"{Path(config_file).name}{overrides} ({shorthand}), {images} of {height} × {width}"


def with_and_without(config_file: str, opts: Sequence[str], device: str) -> dict[str, CfgNode]:
    fixed = ["MODEL.DEVICE", device, "MODEL.KARAT.ENABLED"]
    return {
        name: load_cfg(config_file, [*opts, *fixed, str(enabled)], own_data_needed=False)
        for name, enabled in (("KArAt", True), ("softmax", False))
    }


def _train(step: Step) -> Callable[[], None]:
    return lambda: step.train(0, 1)


def _backbone_pass(step: Step) -> Callable[[], None]:
    model = step.model
    images = model.preprocess_image(next(iter(step.data_loader))).tensor

    def run() -> None:
        model.zero_grad()
        with torch.autocast(**step.autocast):
            features = model.backbone(images)
        sum(feature.float().mean() for feature in features.values()).backward()

    return run


def _predict(model: nn.Module, batch: list[dict[str, Any]]) -> Callable[[], None]:
    def run() -> None:
        with inference_context(model), torch.no_grad():
            model(batch)

    return run


def _step_seconds(cfgs: dict[str, CfgNode], batch_size: int, turns: Turns) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of the steps of some detectors, and of their backbones alone."""
    keep_freed_memory()
    steps = {name: make_step(cfg, batch_size) for name, cfg in cfgs.items()}
    return (
        turns.median_seconds({name: _train(step) for name, step in steps.items()}),
        turns.median_seconds({name: _backbone_pass(step) for name, step in steps.items()}),
    )


def _step_peak(cfg: CfgNode, batch_size: int) -> int:
    def run() -> None:
        step = make_step(cfg, batch_size)
        # AdamW makes its state in its first step: here without the cost of a forward and backward pass.
        for group in step.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        step.optimizer.step()
        step.optimizer.zero_grad()
        step.train(0, 1)

    return peak_memory(run, cfg.MODEL.DEVICE)
