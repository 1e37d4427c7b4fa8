"""What KArAt's attention costs beside softmax's: query, key and value in, attended values out."""

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from detectron2.modeling.backbone.utils import get_rel_pos
from torch import Tensor, nn
from torch.nn import functional as F

from ..attention import Bias, KArAtConfig, KArAtOperator
from ..attention.module import rel_pos_terms
from ..attention.window import window_regions
from .benchmark_report import Comparison, ScalingPoint
from .measuring import Turns, bytes_kept, in_fresh_process, multiply_adds, peak_memory

logger = logging.getLogger(__name__)

# Token grids of the scaling part, N = 49 to 4096.
GRIDS = ((7, 7), (14, 14), (20, 20), (32, 32), (64, 64))


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of an attention core.

    Attributes:
        batch_size: number of windows or images.
        num_heads: number of heads.
        grid: (H, W) of the N = H · W tokens.
        head_dim: d.
        rank: r.
        bias: "none"; "rel_pos", decomposed relative positions as in ViTDet; or "swin", a learned bias of N × N and the
            mask of shifted windows of a feature map of 8 × 8 windows.
    """

    batch_size: int = 8
    num_heads: int = 12
    grid: tuple[int, int] = (14, 14)
    head_dim: int = 64
    rank: int = 12
    bias: str = "none"

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    def __str__(self) -> str:
        sizes = f"{self.batch_size} × {self.num_heads} heads, N = {self.num_tokens}, d = {self.head_dim}"
        return sizes + {"none": "", "rel_pos": ", relative positions", "swin": ", Swin's bias and mask"}[self.bias]


WINDOWS = AttentionShape()
REL_POS = AttentionShape(bias="rel_pos")
SDPA = "scaled_dot_product_attention"
SOFTMAX = "softmax written out"
# Attention cores to time: variant, what it is timed over, sizes, and the largest allowed ratio on two cores of a CPU,
# for forward and backward, and for forward alone.
TIMED = (
    *(
        ("attend, G = 1", SDPA, shape, 1.0, 1.1)
        for shape in (
            WINDOWS,
            AttentionShape(batch_size=1),
            AttentionShape(256, 3, (7, 7), 32),
            AttentionShape(4, 24, (7, 7), 32),
            AttentionShape(batch_size=1, grid=(32, 32)),
            AttentionShape(batch_size=1, grid=(64, 64)),
        )
    ),
    ("attend, G = 3", SDPA, WINDOWS, 1.4, None),
    ("attend, G = 1, residual softmax", SDPA, WINDOWS, 1.35, None),
    ("attend, G = 1", SDPA, REL_POS, 1.0, None),
    ("attend, G = 1", SDPA, AttentionShape(256, 3, (7, 7), 32, bias="swin"), 1.0, None),
    ("attend, G = 1, plain PyTorch", SDPA, WINDOWS, 2.5, None),
    ("attend, G = 3", "direct, G = 3", WINDOWS, 0.35, None),
)

# Attention cores: how they are evaluated, and fields of the operator's config.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    SDPA: ("fused", {}),
    SOFTMAX: ("written out", {}),
    "attend, G = 1": ("attend", {"grid_size": 1}),
    "attend, G = 3": ("attend", {"grid_size": 3}),
    "attend, G = 1, residual softmax": ("attend", {"grid_size": 1, "residual": "softmax"}),
    "attend, G = 1, plain PyTorch": ("plain", {"grid_size": 1}),
    "direct, G = 1": ("direct", {"grid_size": 1}),
    "direct, G = 3": ("direct", {"grid_size": 3}),
}
# Roughly how many matrices of the scores' size a forward and backward pass needs at a time.
_MATRICES = {"fused": 0, "attend": 0, "plain": 0, "written out": 4, "direct": 12}


class AttentionCore(nn.Module):
    """From query, key and value to the attended values, each (B, heads, N, d), without the linear layers around it.

    "direct" is equation 2 as written: features of all harmonics in one tensor, Φ̂[A], the activated N×N matrix W Φ̂[A],
    and its product with the values, all kept by autograd. Relative positions are added to softmax's scores by
    Detectron2's formula, as a bias that is written out, the only form that scaled_dot_product_attention takes.

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
        self.rel_pos_h = self.rel_pos_w = self.table = None
        if shape.bias == "rel_pos":
            self.rel_pos_h, self.rel_pos_w = (
                nn.Parameter(0.02 * torch.randn(2 * size - 1, shape.head_dim)) for size in shape.grid
            )
        mask = None
        if shape.bias == "swin":
            side = shape.grid[0]
            self.table = nn.Parameter(0.02 * torch.randn(shape.num_heads, shape.num_tokens, shape.num_tokens))
            regions = window_regions((8 * side, 8 * side), side, side // 2)
            mask = (regions.unsqueeze(1) == regions.unsqueeze(2)).repeat(shape.batch_size // len(regions), 1, 1)
            mask = mask.unsqueeze(1)  # (B, 1, N, N)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.evaluation == "fused":
            return F.scaled_dot_product_attention(query, key, value, attn_mask=self._bias(query))
        terms = () if self.rel_pos_h is None else rel_pos_terms(query, self.rel_pos_h, self.rel_pos_w)
        bias = Bias(self.table, *terms)
        if self.evaluation == "attend":
            return self.operator.attend(query, key, value, bias, mask=self.mask)
        if self.evaluation == "plain":
            with mock.patch.dict(os.environ, KARAT_BACKEND="plain"):
                return self.operator.attend(query, key, value, bias, mask=self.mask)
        scale = query.shape[-1] ** -0.5
        if self.evaluation == "written out":
            scores = (query * scale) @ key.transpose(-2, -1)
            bias = self._bias(query)
            return (scores if bias is None else scores + bias).softmax(dim=-1) @ value
        return self._direct(bias.add_to((query * scale) @ key.transpose(-2, -1))) @ value

    def _direct(self, scores: Tensor) -> Tensor:
        operator = self.operator
        harmonics = torch.arange(1, operator.config.grid_size + 1, device=scores.device)
        phases = scores.unsqueeze(-1) * harmonics
        features = torch.cat([phases.cos(), phases.sin()], dim=-1).flatten(-2)  # (B, heads, N, N · 2G)
        if self.mask is not None:
            features = features * self.mask.repeat_interleave(2 * len(harmonics), dim=-1)
        coefficients = operator.coefficients.permute(0, 3, 1, 2, 4).flatten(1, 3) * operator.series_scale
        units = features @ coefficients
        activated = units @ (operator.projector * operator.projector_scale).transpose(-2, -1)
        return activated if self.mask is None else activated * self.mask

    def _bias(self, query: Tensor) -> Tensor | None:
        """The bias of softmax's scores, (B, heads, N, N). Detectron2's add_decomposed_rel_pos needs the scores."""
        if self.mask is not None:
            return self.table.masked_fill(~self.mask, -torch.inf)
        if self.rel_pos_h is None:
            return None
        height, width = self.grid
        on_grid = query.unflatten(2, self.grid)
        rows = torch.einsum("bnhwd,hkd->bnhwk", on_grid, get_rel_pos(height, height, self.rel_pos_h))
        columns = torch.einsum("bnhwd,wkd->bnhwk", on_grid, get_rel_pos(width, width, self.rel_pos_w))
        return (rows[..., :, None] + columns[..., None, :]).flatten(4, 5).flatten(2, 3)


def compare_times(turns: Turns) -> Iterator[Comparison]:
    """The rows of TIMED."""
    for variant, over, shape, goal, forward_goal in TIMED:
        logger.info("Attention, %s over %s, %s", variant, over, shape)
        qkv = _projections(shape, turns.device)
        cores = {name: _core(name, shape, turns.device) for name in (variant, over)}
        passes = [("forward + backward", goal, {name: _pass(core, qkv) for name, core in cores.items()})]
        if forward_goal is not None:
            passes.append(("forward", forward_goal, {name: _forward(core, qkv) for name, core in cores.items()}))
        for what, most, functions in passes:
            seconds = turns.median_seconds(functions)
            yield Comparison(f"{variant}: {what}, {shape}", over, seconds[variant], seconds[over], "ms", most)


def compare_memory(shape: AttentionShape, device: str = "cpu") -> list[Comparison]:
    """Rows on bytes that autograd keeps, and on multiply-adds, at one size."""
    inputs = _projections(shape, device).unbind(0)
    rows = []
    for variant, goal in (("attend, G = 1", 1.0), ("attend, G = 1, residual softmax", None), ("attend, G = 3", 1.0)):
        kept, reference = (bytes_kept(_core(name, shape, device), inputs) for name in (variant, SDPA))
        rows.append(Comparison(f"{variant}: bytes autograd keeps, {shape}", SDPA, kept, reference, "MiB", goal))
    # fvcore does not count fused attention.
    for variant, goal in (("attend, G = 1", 0.8), ("attend, G = 1, residual softmax", None)):
        label = f"{variant}: multiply-adds counted by fvcore for one of the batch, {shape}"
        adds, reference = (multiply_adds(_core(name, shape, device), inputs) for name in (variant, SOFTMAX))
        rows.append(Comparison(label, SOFTMAX, adds, reference, "million multiply-adds", goal))
    return rows


def compare_peaks(shape: AttentionShape, device: str = "cpu") -> Comparison:
    """Memory that forward and backward of `attend` add at their peak, over that of softmax written out."""
    peaks = {name: in_fresh_process(_core_peak, name, shape, device) for name in ("attend, G = 1", SOFTMAX)}
    label = f"attend, G = 1: peak memory added by forward + backward, {shape}"
    return Comparison(label, SOFTMAX, peaks["attend, G = 1"], peaks[SOFTMAX], "MiB", 0.1)


def measure_scaling(shape: AttentionShape, turns: Turns, max_memory: float) -> list[ScalingPoint]:
    """Time and peak memory of forward and backward of attention cores at one number of tokens.

    Cores that would need more than `max_memory` bytes are left out.
    """
    qkv = _projections(shape, turns.device)
    matrix = 4 * shape.batch_size * shape.num_heads * shape.num_tokens**2
    variants = [
        name
        for name, (evaluation, fields) in VARIANTS.items()
        if fields.get("grid_size") != 3 and _MATRICES[evaluation] * matrix <= max_memory
    ]
    seconds = turns.median_seconds({name: _pass(_core(name, shape, turns.device), qkv) for name in variants})
    peaks = {name: in_fresh_process(_core_peak, name, shape, turns.device) for name in variants}
    return [ScalingPoint(name, shape.num_tokens, seconds[name], peaks[name]) for name in variants]


def _core(variant: str, shape: AttentionShape, device: str) -> AttentionCore:
    torch.manual_seed(0)
    return AttentionCore(variant, shape).to(device)


def _projections(shape: AttentionShape, device: str) -> Tensor:
    """query, key and value, (3, B, heads, N, d): views of one projection's output, as in a model."""
    torch.manual_seed(0)
    sizes = shape.batch_size, shape.num_tokens, 3, shape.num_heads, shape.head_dim
    return torch.randn(sizes, device=device).permute(2, 0, 3, 1, 4).requires_grad_()


def _pass(core: AttentionCore, qkv: Tensor) -> Callable[[], Any]:
    """Forward and backward, for the gradients of inputs and parameters."""
    gradient = torch.randn_like(qkv[0].transpose(1, 2)).transpose(1, 2)
    leaves = [qkv, *core.parameters()]
    return lambda: torch.autograd.grad(core(*qkv.unbind(0)), leaves, gradient)


def _forward(core: AttentionCore, qkv: Tensor) -> Callable[[], Any]:
    """Forward alone, as in inference."""

    def run() -> None:
        with torch.no_grad():
            core(*qkv.unbind(0))

    return run


def _core_peak(variant: str, shape: AttentionShape, device: str) -> int:
    small = replace(shape, grid=(4, 4))
    _pass(_core(variant, small, device), _projections(small, device))()  # libraries get what they need
    return peak_memory(_pass(_core(variant, shape, device), _projections(shape, device)), device)
