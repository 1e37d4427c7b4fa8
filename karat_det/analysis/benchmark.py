"""What KArAt costs on this machine, in time and memory, beside softmax and beside its equation as written.

Whatever is compared runs in one process on the same tensors, the variants taking turns, and the median of the turns
counts. Peak memory is measured in a fresh process for each variant: on CUDA it is the allocator's, on the CPU the peak
of the process's resident memory, both beyond what was held before. Training steps are timed in a fresh process, too, in
which the CPU's memory that tensors free is used again, as PyTorch does on CUDA.
"""

import ctypes
import logging
import multiprocessing
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import annotations_to_instances
from detectron2.evaluation import inference_context
from detectron2.modeling import build_model
from detectron2.modeling.backbone.utils import get_rel_pos
from detectron2.solver import build_lr_scheduler
from detectron2.structures import Boxes, BoxMode, Instances
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn
from torch.nn import functional as F

from ..attention import Bias, KArAtConfig, KArAtOperator
from ..attention.module import rel_pos_terms
from ..config import image_size
from ..engine.optimizer import build_optimizer
from ..engine.setup import load_cfg
from ..engine.trainer import Step
from .benchmark_report import Comparison, Results, ScalingPoint

logger = logging.getLogger(__name__)

PARTS = ("core", "step", "inference", "scaling")
# Token grids of the scaling part, N = 49 to 4096.
GRIDS = ((7, 7), (14, 14), (20, 20), (32, 32), (64, 64))


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of an attention core: windows or images, heads, (H, W) of the N = H · W tokens, d, rank r.

    `rel_pos` adds decomposed relative positions to the scores.
    """

    batch_size: int = 8
    num_heads: int = 12
    grid: tuple[int, int] = (14, 14)
    head_dim: int = 64
    rank: int = 12
    rel_pos: bool = False

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    def __str__(self) -> str:
        sizes = f"{self.batch_size} × {self.num_heads} heads, N = {self.num_tokens}, d = {self.head_dim}"
        return f"{sizes}, r = {self.rank}" + (", relative positions" if self.rel_pos else "")


# Attention cores: how they are evaluated, and fields of the operator's config.
SDPA = "scaled_dot_product_attention"
SOFTMAX = "softmax written out"
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    SDPA: ("fused", {}),
    SOFTMAX: ("written out", {}),
    "attend, G = 1": ("attend", {"grid_size": 1}),
    "attend, G = 3": ("attend", {"grid_size": 3}),
    "attend, G = 1, residual softmax": ("attend", {"grid_size": 1, "residual": "softmax"}),
    "direct, G = 1": ("direct", {"grid_size": 1}),
    "direct, G = 3": ("direct", {"grid_size": 3}),
    "activate, G = 3": ("activate", {"grid_size": 3}),
}
# Matrices of the scores' size that a forward and backward holds at a time, roughly.
_MATRICES = {"fused": 0, "attend": 0, "written out": 4, "activate": 8, "direct": 12}
# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4


class AttentionCore(nn.Module):
    """From query, key and value to the attended values, each (B, heads, N, d), without the linear layers around it.

    "direct" is equation 2 as written: features of all harmonics in one tensor, Φ̂[A], the activated N×N matrix W Φ̂[A],
    and its product with the values, all kept by autograd. "activate" is KArAtOperator.activate and that product, which
    keeps no features. Relative positions are added to softmax's scores by
    Detectron2's formula, as a bias that is written out; scaled_dot_product_attention takes them in no other way.

    Args:
        variant: a key of VARIANTS.
        shape: sizes.
    """

    def __init__(self, variant: str, shape: AttentionShape):
        super().__init__()
        self.evaluation, fields = VARIANTS[variant]
        self.grid = shape.grid
        self.operator = None
        if fields:
            self.operator = KArAtOperator(shape.num_heads, shape.num_tokens, KArAtConfig(rank=shape.rank, **fields))
        self.rel_pos_h = self.rel_pos_w = None
        if shape.rel_pos:
            self.rel_pos_h, self.rel_pos_w = (
                nn.Parameter(0.02 * torch.randn(2 * size - 1, shape.head_dim)) for size in shape.grid
            )

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scale = query.shape[-1] ** -0.5
        if self.evaluation == "fused":
            return F.scaled_dot_product_attention(query, key, value, attn_mask=self._bias(query))
        if self.evaluation == "written out":
            scores = (query * scale) @ key.transpose(-2, -1)
            bias = self._bias(query)
            return (scores if bias is None else scores + bias).softmax(dim=-1) @ value
        bias = Bias()
        if self.rel_pos_h is not None:
            bias = Bias(None, *rel_pos_terms(query, self.rel_pos_h, self.rel_pos_w))
        if self.evaluation == "attend":
            return self.operator.attend(query, key, value, bias)
        scores = bias.add_to((query * scale) @ key.transpose(-2, -1))
        activated = self.operator.activate(scores) if self.evaluation == "activate" else self._direct(scores)
        return activated @ value

    def _direct(self, scores: Tensor) -> Tensor:
        operator = self.operator
        harmonics = torch.arange(1, operator.config.grid_size + 1, device=scores.device)
        phases = scores.unsqueeze(-1) * harmonics
        features = torch.cat([phases.cos(), phases.sin()], dim=-1).flatten(-2)  # (B, heads, N, N · 2G)
        coefficients = operator.coefficients.permute(0, 3, 1, 2, 4).flatten(1, 3) * operator.series_scale
        units = features @ coefficients
        return units @ (operator.projector * operator.projector_scale).transpose(-2, -1)

    def _bias(self, query: Tensor) -> Tensor | None:
        """Of shape (B, heads, N, N). Detectron2's add_decomposed_rel_pos wants the scores to add it to."""
        if self.rel_pos_h is None:
            return None
        height, width = self.grid
        on_grid = query.unflatten(2, self.grid)
        rows = torch.einsum("bnhwd,hkd->bnhwk", on_grid, get_rel_pos(height, height, self.rel_pos_h))
        columns = torch.einsum("bnhwd,wkd->bnhwk", on_grid, get_rel_pos(width, width, self.rel_pos_w))
        return (rows[..., :, None] + columns[..., None, :]).flatten(4, 5).flatten(2, 3)


@dataclass(frozen=True)
class Turns:
    """How functions are timed.

    Attributes:
        repeats: turns that each takes.
        seconds: no turn begins after so many, except the first three: a median wants them.
        device: "cpu", or "cuda" to wait for what was started there.
    """

    repeats: int = 15
    seconds: float = 45.0
    device: str = "cpu"

    def median_seconds(self, functions: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
        """Median seconds of each of some functions that take turns, after each has run once."""
        wait = torch.cuda.synchronize if self.device == "cuda" else lambda: None
        times = {name: [] for name in functions}
        for function in functions.values():
            function()
        wait()
        end = time.perf_counter() + self.seconds
        for turn in range(1, self.repeats + 1):
            for name, function in functions.items():
                start = time.perf_counter()
                function()
                wait()
                times[name].append(time.perf_counter() - start)
            if turn >= 3 and time.perf_counter() > end:
                break
        return {name: statistics.median(measured) for name, measured in times.items()}


def run_benchmark(
    parts: Sequence[str],
    config_file: str,
    opts: Sequence[str] = (),
    turns: Turns = Turns(),
    max_memory: float = 8 * 2.0**30,
) -> Iterator[Results]:
    """Measures some parts, with a line in the log for each comparison begun, and yields all results after each.

    Args:
        parts: some of PARTS.
        config_file: YAML of the detector with KArAt, for "step" and "inference".
        opts: overrides of its keys, KEY VALUE.
        turns: of the variants of each comparison, and the device that they run on.
        max_memory: "scaling" leaves out what would need more bytes.

    Raises:
        ValueError, OSError: the config is not valid, or the system does not tell a process's peak memory.
        RuntimeError: a process died, most likely for want of memory.
    """
    if {"step", "inference"} & set(parts):
        _with_and_without(config_file, opts, turns.device)  # a mistake shows before minutes have passed
    results = Results(describe_machine(turns.device))
    logger.info("On %s", results.machine)
    if "core" in parts:
        for shape in (AttentionShape(), AttentionShape(rel_pos=True)):
            logger.info("Attention core, %s", shape)
            results.comparisons += compare_cores(shape, turns)
        long = AttentionShape(batch_size=1, grid=GRIDS[-1])
        logger.info("Attention core, peak memory at %s", long)
        results.comparisons.append(compare_peaks(long, turns.device))
        yield results
    if "step" in parts:
        results.comparisons += compare_steps(config_file, opts, turns)
        yield results
    if "inference" in parts:
        results.comparisons.append(compare_inference(config_file, opts, turns))
        yield results
    if "scaling" in parts:
        for grid in GRIDS:
            shape = AttentionShape(batch_size=1, grid=grid)
            logger.info("Scaling, %s", shape)
            results.scaling += measure_scaling(shape, replace(turns, seconds=turns.seconds / len(GRIDS)), max_memory)
        yield results


def compare_cores(shape: AttentionShape, turns: Turns) -> list[Comparison]:
    """Time of forward and backward, bytes that autograd keeps, and multiply-adds, of attention cores at one size."""
    torch.manual_seed(0)
    inputs = _inputs(shape, turns.device)
    cores = {variant: AttentionCore(variant, shape).to(turns.device) for variant in VARIANTS}
    # Written-out softmax is there for its multiply-adds: fvcore does not look into fused attention.
    timed = {name: _pass(core, inputs) for name, core in cores.items() if name not in (SOFTMAX, "direct, G = 1")}
    seconds = turns.median_seconds(timed)
    kept = {name: bytes_kept(core, inputs) for name, core in cores.items()}
    rows = []
    for variant, over, goal in (
        ("attend, G = 1", SDPA, 1.25),
        ("attend, G = 1, residual softmax", SDPA, None),
        ("attend, G = 3", SDPA, None),
        ("attend, G = 3", "direct, G = 3", 0.35),
        ("attend, G = 3", "activate, G = 3", None),
    ):
        label = f"{variant}: forward + backward, {shape}"
        rows.append(Comparison(label, over, seconds[variant], seconds[over], "ms", goal))
    for variant, over, goal in (
        ("attend, G = 1", SDPA, 1.0),
        ("attend, G = 1, residual softmax", SDPA, None),
        ("attend, G = 3", SDPA, 1.0),
        ("attend, G = 3", "direct, G = 3", None),
    ):
        label = f"{variant}: bytes autograd keeps, {shape}"
        rows.append(Comparison(label, over, kept[variant], kept[over], "MiB", goal))
    softmax_adds = multiply_adds(cores[SOFTMAX], inputs)
    for variant, goal in (("attend, G = 1", 0.8), ("attend, G = 1, residual softmax", None)):
        label = f"{variant}: multiply-adds counted by fvcore for one of the batch, {shape}"
        adds = multiply_adds(cores[variant], inputs)
        rows.append(Comparison(label, SOFTMAX, adds, softmax_adds, "million multiply-adds", goal))
    return rows


def compare_peaks(shape: AttentionShape, device: str = "cpu") -> Comparison:
    """Memory that forward and backward of `attend` add at their peak, over that of softmax written out."""
    peaks = {name: _in_fresh_process(_core_peak, name, shape, device) for name in ("attend, G = 1", SOFTMAX)}
    label = f"attend, G = 1: peak memory added by forward + backward, {shape}"
    return Comparison(label, SOFTMAX, peaks["attend, G = 1"], peaks[SOFTMAX], "MiB", 0.1)


def compare_steps(config_file: str, opts: Sequence[str], turns: Turns, batch_size: int = 4) -> list[Comparison]:
    """Time and peak memory of a training step of a detector, over the same detector with softmax.

    A step is the trainer's: forward with all losses, backward, clipping, AdamW; in bfloat16 on CUDA if the config says
    so. Weights and images are random, from one seed, and the heads of both get the same proposals. Steps are timed in
    a process that uses freed memory again: on the CPU a run of the trainer, which does not, takes longer with either.
    The memory is all that weights, AdamW's state and a step need.
    """
    cfgs = _with_and_without(config_file, opts, turns.device)
    what = _describe(cfgs["KArAt"], config_file, opts, batch_size)
    logger.info("Training, %s: steps, then their backbones alone, in a process of their own", what)
    step_seconds, backbone_seconds = _in_fresh_process(_step_seconds, cfgs, batch_size, turns)
    logger.info("Its peak memory")
    peaks = {name: _in_fresh_process(_step_peak, cfg, batch_size) for name, cfg in cfgs.items()}
    return [
        Comparison(f"{label}, {what}", "softmax", values["KArAt"], values["softmax"], unit, goal)
        for label, values, unit, goal in (
            ("training step", step_seconds, "s", 1.05),
            ("forward + backward of the backbone", backbone_seconds, "s", None),
            ("peak memory of training", peaks, "MiB", 1.0),
        )
    ]


def compare_inference(config_file: str, opts: Sequence[str], turns: Turns) -> Comparison:
    """Images a second, one at a time as in evaluation, over those of the same detector with softmax.

    The weights are random, so that there are as many proposals as there can be and hardly any detections.
    """
    cfgs = _with_and_without(config_file, opts, turns.device)
    what = _describe(cfgs["KArAt"], config_file, opts, 1)
    logger.info("Inference, %s", what)
    predictions = {}
    for name, cfg in cfgs.items():
        torch.manual_seed(0)
        predictions[name] = _predict(build_model(cfg), synthetic_batch(cfg, 1))
    seconds = turns.median_seconds(predictions)
    label = f"inference (more is better), {what}"
    return Comparison(label, "softmax", 1 / seconds["KArAt"], 1 / seconds["softmax"], "images/s")


def measure_scaling(shape: AttentionShape, turns: Turns, max_memory: float) -> list[ScalingPoint]:
    """Time and peak memory of forward and backward of attention cores at one number of tokens.

    Cores that would need more than `max_memory` bytes are left out.
    """
    torch.manual_seed(0)
    inputs = _inputs(shape, turns.device)
    matrix = 4 * shape.batch_size * shape.num_heads * shape.num_tokens**2
    variants = [
        name
        for name, (evaluation, fields) in VARIANTS.items()
        if fields.get("grid_size") != 3 and _MATRICES[evaluation] * matrix <= max_memory
    ]
    passes = {name: _pass(AttentionCore(name, shape).to(turns.device), inputs) for name in variants}
    seconds = turns.median_seconds(passes)
    peaks = {name: _in_fresh_process(_core_peak, name, shape, turns.device) for name in variants}
    return [ScalingPoint(name, shape.num_tokens, seconds[name], peaks[name]) for name in variants]


def bytes_kept(module: nn.Module, inputs: Sequence[Tensor]) -> int:
    """Bytes of memory that autograd keeps between a module's forward and its backward.

    Every storage that is saved counts, once and whole: inputs, parameters and outputs too.
    """
    storages = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = module(*inputs)  # holds what is kept, so that no address comes twice
    del output
    return sum(storages.values())


def multiply_adds(module: nn.Module, inputs: Sequence[Tensor]) -> int:
    """Multiply-adds of a forward pass over the first item of a batch, as fvcore counts them.

    Those of matrix products count, sines and exponentials do not.
    """
    # fvcore misses the batch dimension of a product whose first factor is broadcast along it, as Wᵀ is to meet V.
    count = FlopCountAnalysis(module, tuple(x[:1] for x in inputs))
    return int(count.unsupported_ops_warnings(False).uncalled_modules_warnings(False).total())


def peak_memory(function: Callable[[], Any], device: str) -> int:
    """Bytes that a call needs at its peak, beyond what was held before it.

    On the CPU it is the process's resident memory that counts, which Linux knows to some 100 KiB for each core; a
    process that ran something else before may have memory left over that it uses again.

    Raises:
        OSError: the device is the CPU, and the system is not Linux or does not let a process reset its peak.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    except OSError as error:
        raise OSError(f"Peak memory on the CPU is measured on Linux alone: {error}. Try --device cuda.") from None
    before = _resident("VmRSS")
    function()
    return max(0, _resident("VmHWM") - before)


def synthetic_batch(cfg: CfgNode, batch_size: int) -> list[dict[str, Any]]:
    """Random images of the model's size, as a mapper gives them, each with eight boxes and masks; always the same."""
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
    """So many proposals for each image of a synthetic batch, all of them its objects' boxes moved.

    A quarter overlaps its object by half and more, so that the heads sample as many positives as they may, as in a
    detector that has learned.
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

    Its proposals are computed, but the heads get synthetic ones: the heads take most of a step, more so the more
    proposals are positive, and that differs between models with random weights, whatever their attention is.
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


def describe_machine(device: str) -> str:
    """Processor, threads, GPU if one is used, and PyTorch's version."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
        processor = name[1] if name else processor
    threads = torch.get_num_threads()
    machine = f"{processor}, {threads} thread{'s' if threads > 1 else ''}"
    if device == "cuda":
        machine = f"{torch.cuda.get_device_name()}, {machine}"
    return f"{machine}, PyTorch {torch.__version__}"


def _describe(cfg: CfgNode, config_file: str, opts: Sequence[str], batch_size: int) -> str:
    height, width = image_size(cfg)
    images = "1 image" if batch_size == 1 else f"{batch_size} images"
    overrides = f" with {' '.join(opts)}" if opts else ""
    shorthand = f"G{cfg.MODEL.KARAT.GRID_SIZE}{cfg.MODEL.KARAT.SHARING[0].upper()}"
    return f"{Path(config_file).name}{overrides} ({shorthand}), {images} of {height} × {width}"


def _with_and_without(config_file: str, opts: Sequence[str], device: str) -> dict[str, CfgNode]:
    fixed = ["MODEL.DEVICE", device, "MODEL.KARAT.ENABLED"]
    return {
        name: load_cfg(config_file, [*opts, *fixed, str(enabled)], own_data_needed=False)
        for name, enabled in (("KArAt", True), ("softmax", False))
    }


def _inputs(shape: AttentionShape, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """query, key and value."""
    size = (shape.batch_size, shape.num_heads, shape.num_tokens, shape.head_dim)
    return tuple(torch.randn(size, device=device, requires_grad=True) for _ in range(3))


def _pass(core: AttentionCore, inputs: tuple[Tensor, Tensor, Tensor]) -> Callable[[], Any]:
    """Forward and backward, for the gradients of inputs and parameters."""
    gradient = torch.randn_like(inputs[0])
    leaves = [*inputs, *core.parameters()]
    return lambda: torch.autograd.grad(core(*inputs), leaves, gradient)


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


def _core_peak(variant: str, shape: AttentionShape, device: str) -> int:
    small = replace(shape, grid=(4, 4))
    _pass(AttentionCore(variant, small).to(device), _inputs(small, device))()  # libraries get what they need
    run = _pass(AttentionCore(variant, shape).to(device), _inputs(shape, device))
    return peak_memory(run, device)


def _step_seconds(cfgs: dict[str, CfgNode], batch_size: int, turns: Turns) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of the steps of some detectors, and of their backbones alone."""
    _keep_freed_memory()
    steps = {name: make_step(cfg, batch_size) for name, cfg in cfgs.items()}
    return (
        turns.median_seconds({name: _train(step) for name, step in steps.items()}),
        turns.median_seconds({name: _backbone_pass(step) for name, step in steps.items()}),
    )


def _step_peak(cfg: CfgNode, batch_size: int) -> int:
    def run() -> None:
        step = make_step(cfg, batch_size)
        # AdamW makes its state in the first of all steps: here without the cost of a forward and backward.
        for group in step.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        step.optimizer.step()
        step.optimizer.zero_grad()
        step.train(0, 1)

    return peak_memory(run, cfg.MODEL.DEVICE)


def _in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function of this module in a new process.

    It is forked from a server that has only imported this module, which is faster than to start an interpreter.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, mp_context=context, initializer=_prepare, initargs=(torch.get_num_threads(),)) as pool:
        try:
            return pool.submit(function, *args).result()
        except BrokenProcessPool:
            raise RuntimeError(
                "A process that measured was killed, most likely since the machine has too little memory. "
                "In scaling lower --max-memory; else name --parts without this one."
            ) from None


def _prepare(threads: int) -> None:
    torch.set_num_threads(threads)
    _set_malloc(_M_MMAP_THRESHOLD, 2**16)  # larger tensors are pages of their own, which go back when they are freed


def _keep_freed_memory() -> None:
    """Lets malloc use again what large tensors leave, where as it is it gives them back and asks for pages anew.

    Those are millions of page faults a step, whose time varies by more than the models differ.
    """
    _set_malloc(_M_MMAP_MAX, 0)
    _set_malloc(_M_TRIM_THRESHOLD, -1)


def _set_malloc(option: int, value: int) -> None:
    """Sets an option of glibc's malloc in this process. Other C libraries have none, and are left as they are."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(option, value)


def _resident(key: str) -> int:
    """Bytes of this process's memory: VmRSS is now, VmHWM the peak."""
    return 1024 * int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))[1])
