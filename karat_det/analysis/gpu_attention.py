"""Checks of the attention on a GPU: errors over float64, time and memory over softmax, torch.compile.

Every check takes a device, so that tests run the same lines on the CPU with small sizes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.modeling import build_model
from torch import Tensor, nn

from ..attention import Bias, KArAtAttention, KArAtConfig, KArAtOperator, backends
from ..attention.module import rel_pos_terms
from ..config import image_size
from ..engine.setup import load_cfg
from .benchmark_attention import SDPA, AttentionCore, AttentionShape
from .check_runner import FAIL, FOR_THE_RECORD, PASS, SKIPPED, Row, ratio
from .measuring import Turns, peak_memory

NO_BIAS, MASK, REL_POS, LEARNED_BIAS = "no bias", "mask", "relative positions", "learned bias"

# Largest errors, over the largest value of a tensor. Products of single TensorFloat-32 factors, instead of the kernels'
# three, have errors of 3e-4 and more. Tensor cores truncate each of a thousand sums at N = 4096: errors up to 6e-5.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
# torch.compile sums in another order, and in bfloat16 keeps float32 where eager mode rounds.
COMPILED_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
# Most float64 scores in memory at a time.
_NUMBERS_AT_ONCE = 2**22


@dataclass(frozen=True)
class AttentionCase:
    """An operator's inputs.

    Attributes:
        grid: (H, W) of the N = H · W tokens.
        grid_size: G.
        dtype: query's, key's and value's; bfloat16 runs under autocast.
        scores: their bias or mask: NO_BIAS, MASK (boolean), REL_POS (decomposed, from learned tables) or
            LEARNED_BIAS (N×N for each head, as Swin's).
        batch_size, num_heads, head_dim, rank: sizes.
    """

    grid: tuple[int, int]
    grid_size: int
    dtype: torch.dtype
    scores: str
    batch_size: int = 2
    num_heads: int = 2
    head_dim: int = 64
    rank: int = 12

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    def __str__(self) -> str:
        return f"N = {self.num_tokens}, G = {self.grid_size}, {name_of(self.dtype)}, {self.scores}"

    def make_operator(self, device: str, triton: bool) -> KArAtOperator:
        torch.manual_seed(0)
        config = KArAtConfig(grid_size=self.grid_size, rank=self.rank, triton=triton)
        return KArAtOperator(self.num_heads, self.num_tokens, config).to(device)

    def make_inputs(self, device: str) -> tuple[dict[str, Tensor], Tensor | None, Tensor]:
        """Learned tensors, the mask, and a gradient of the output; the same on each device."""
        torch.manual_seed(1)
        # Strided as in the output of one layer for all three.
        fused = torch.randn(self.batch_size, self.num_tokens, 3, self.num_heads, self.head_dim).to(device, self.dtype)
        query, key, value = fused.permute(2, 0, 3, 1, 4).unbind()
        learned = {"query": query, "key": key, "value": value}
        if self.scores == REL_POS:
            for name, size in zip(("rel_pos_h", "rel_pos_w"), self.grid, strict=True):
                learned[name] = (0.1 * torch.randn(2 * size - 1, self.head_dim)).to(device)
        if self.scores == LEARNED_BIAS:
            learned["bias"] = torch.randn(self.num_heads, self.num_tokens, self.num_tokens).to(device)
        mask = None
        if self.scores == MASK:
            mask = torch.rand(self.num_tokens, self.num_tokens) < 0.7
            mask = (mask | torch.eye(self.num_tokens, dtype=torch.bool)).to(device)
        gradient = torch.randn(value.shape).to(device, self.dtype)
        return learned, mask, gradient


def check_attention(device: str, case: AttentionCase) -> list[Row]:
    """Output and all gradients of `attend`, by the kernels and by plain PyTorch, beside the equation in float64."""
    _forbid_tf32()
    learned, mask, gradient = case.make_inputs(device)
    exact = attend_exactly(case.make_operator(device, triton=False), learned, mask, gradient)
    plain, worst = largest_error(attend(case.make_operator(device, triton=False), learned, mask, gradient), exact)
    tolerance = TOLERANCES[case.dtype]
    name = f"errors: {case}"
    measured = f"plain PyTorch {plain:.1e} ({worst})"
    result = PASS if plain <= tolerance else FAIL
    grid = case.grid if case.scores == REL_POS else ()
    no_kernels = why_no_kernels(learned["query"], grid, case.grid_size, case.rank)
    if no_kernels:
        measured += f"; no kernels: {no_kernels}"
        result = SKIPPED if result == PASS else result
    else:
        kernels, worst = largest_error(attend(case.make_operator(device, triton=True), learned, mask, gradient), exact)
        measured = f"kernels {kernels:.1e} ({worst}), {measured}"
        result = PASS if max(kernels, plain) <= tolerance else FAIL
    return [Row(name, measured, f"≤ {tolerance:.0e}", result)]


def why_no_kernels(query: Tensor, grid: tuple[int, ...], grid_size: int, rank: int) -> str:
    """Why there are no Triton kernels for such a query, relative positions on a grid, G and r; "" where there are."""
    if backends.triton is None:
        return "Triton is not installed"
    *batch, heads, num_tokens, width = query.shape
    coefficients = torch.empty(heads, 2, grid_size, num_tokens, rank, device="meta")
    bias = Bias(None, *(torch.empty(*batch, heads, num_tokens, side, device="meta") for side in grid))
    if backends.triton.can_run(query, query, coefficients, bias, None, None):
        return ""
    if not query.is_cuda:
        return f"this is a {query.device.type} device"
    if torch.version.cuda is None:
        return "this PyTorch is not built for CUDA"
    capability = torch.cuda.get_device_capability(query.device)
    if capability < (8, 0):
        return "compute capability {}.{}, and they need 8.0".format(*capability)
    return (
        f"they are not made for {width} channels, a grid {grid}, G = {grid_size}, r = {rank} in {name_of(query.dtype)}"
    )


def attend(
    operator: KArAtOperator, learned: dict[str, Tensor], mask: Tensor | None, gradient: Tensor
) -> dict[str, Tensor]:
    """The output of `operator.attend`, and the gradients of inputs and parameters, by name."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in learned.items()}
    query, key, value = leaves["query"], leaves["key"], leaves["value"]
    with autocast(query.device.type, query.dtype):
        output = operator.attend(query, key, value, _bias(leaves), mask=mask)
    leaves |= dict(operator.named_parameters())
    gradients = torch.autograd.grad(output, list(leaves.values()), gradient)
    return {"output": output.detach()} | {
        f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)
    }


def attend_exactly(
    operator: KArAtOperator, learned: dict[str, Tensor], mask: Tensor | None, gradient: Tensor
) -> dict[str, Tensor]:
    """The same by the equation as written, in float64, for some rows of the scores at a time."""
    leaves = {**learned, **dict(operator.named_parameters())}
    leaves = {name: tensor.detach().double().requires_grad_() for name, tensor in leaves.items()}
    batch_size, heads, num_tokens, head_dim = learned["query"].shape
    step = max(1, _NUMBERS_AT_ONCE // (batch_size * heads * num_tokens))
    outputs = []
    for start in range(0, num_tokens, step):
        rows = slice(start, start + step)
        # Formed anew each time: a backward pass frees its graph.
        query, key, value = leaves["query"], leaves["key"], leaves["value"]
        full, vertical, horizontal = (None if term is None else term[..., rows, :] for term in _bias(leaves))
        scores = Bias(full, vertical, horizontal).add_to(query[..., rows, :] @ key.transpose(-2, -1) * head_dim**-0.5)
        seen = 1.0 if mask is None else mask[rows].double()
        coefficients = leaves["coefficients"] * operator.series_scale
        units = 0.0
        for m in range(1, operator.config.grid_size + 1):
            units = units + ((m * scores).cos() * seen) @ coefficients[:, 0, m - 1]
            units = units + ((m * scores).sin() * seen) @ coefficients[:, 1, m - 1]
        activated = units @ (leaves["projector"] * operator.projector_scale).transpose(-2, -1)
        output = (activated * seen) @ value
        output.backward(gradient[..., rows, :].double())
        outputs.append(output.detach())
    gradients = {f"gradient of {name}": tensor.grad for name, tensor in leaves.items()}
    return {"output": torch.cat(outputs, dim=-2), **gradients}


def largest_error(actual: dict[str, Tensor], exact: dict[str, Tensor]) -> tuple[float, str]:
    """The largest error of any tensor over its largest value, and that tensor's name."""
    errors = {}
    for name, tensor in exact.items():
        # For tensors that are all zero.
        error = (actual[name].double() - tensor.double()).abs().max() / tensor.abs().max().clamp(min=1e-30)
        errors[name] = error.item() if error.isfinite() else float("inf")
    worst = max(errors, key=errors.__getitem__)
    return errors[worst], worst


def check_times(device: str, shape: AttentionShape, dtype: torch.dtype, turns: Turns) -> list[Row]:
    """Time and peak memory of forward and backward of attention cores, over scaled_dot_product_attention's."""
    torch.manual_seed(0)
    size = shape.batch_size, shape.num_heads, shape.num_tokens, shape.head_dim
    inputs = [torch.randn(size, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
    names = ("attend, G = 1", "attend, G = 1, residual softmax", "attend, G = 3")
    passes = {name: forward_and_backward(AttentionCore(name, shape).to(device), inputs) for name in (SDPA, *names)}
    seconds = turns.median_seconds(passes)
    peaks = {name: max(1, peak_memory(run, device)) for name, run in passes.items()}
    reason = why_no_kernels(inputs[0], shape.grid if shape.bias == "rel_pos" else (), 3, shape.rank)
    rows = []
    for name in names:
        measured = [
            f"time {ratio(seconds[name], seconds[SDPA], 1e-3)} ms",
            f"memory {ratio(peaks[name], peaks[SDPA], 2**20)} MiB",
            *([f"no kernels: {reason}"] if reason else []),
        ]
        rows.append(Row(f"{name}, over {SDPA}: {shape}, {name_of(dtype)}", ", ".join(measured), FOR_THE_RECORD))
    return rows


def check_compiled_attention(
    device: str, grid: tuple[int, int], dtype: torch.dtype, turns: Turns, backend: str = "inductor"
) -> list[Row]:
    """A layer of attention with relative positions, compiled in one graph, over the same one in eager mode."""
    torch.manual_seed(0)
    num_heads, head_dim = 3, 64
    attention = KArAtAttention(
        num_heads * head_dim,
        num_heads,
        KArAtOperator(num_heads, grid[0] * grid[1], KArAtConfig(grid_size=3)),
        use_rel_pos=True,
        rel_pos_zero_init=False,
        input_size=grid,
    ).to(device)
    x = torch.randn(4, *grid, num_heads * head_dim, device=device, requires_grad=True)
    name = f"torch.compile: attention, N = {grid[0] * grid[1]}, G = 3, {REL_POS}, {name_of(dtype)}"
    return [_check_compiled(name, attention, lambda output: output, x, dtype, turns, backend)]


def check_compiled_backbone(
    device: str, config_file: Path, opts: list[str], dtype: torch.dtype, turns: Turns, backend: str = "inductor"
) -> list[Row]:
    """The backbone of a detector, compiled in one graph, over the same one in eager mode."""
    cfg = load_cfg(str(config_file), [*opts, "MODEL.DEVICE", device], own_data_needed=False)
    torch.manual_seed(0)
    backbone = build_model(cfg).backbone.eval()
    images = torch.randn(2, 3, *image_size(cfg), device=device, requires_grad=True)
    name = f"torch.compile: backbone of {config_file.name}, {name_of(dtype)}"

    def joined(features: dict[str, Tensor]) -> Tensor:
        return torch.cat([feature.float().flatten() for feature in features.values()])

    return [_check_compiled(name, backbone, joined, images, dtype, turns, backend)]


def _check_compiled(
    name: str,
    module: nn.Module,
    joined: Callable[[Any], Tensor],
    x: Tensor,
    dtype: torch.dtype,
    turns: Turns,
    backend: str,
) -> Row:
    """Output, gradients and time of a module with and without torch.compile; `joined` makes its output one tensor."""
    _forbid_tf32()
    leaves = {"input": x, **dict(module.named_parameters())}

    def results(function: Callable[[Tensor], Any]) -> dict[str, Tensor]:
        with autocast(x.device.type, dtype):
            output = joined(function(x))
        torch.manual_seed(1)
        gradients = torch.autograd.grad(output, list(leaves.values()), torch.randn_like(output))
        return {"output": output.detach(), **dict(zip(leaves, gradients, strict=True))}

    functions = {"eager": module, "compiled": torch.compile(module, fullgraph=True, backend=backend)}
    error, worst = largest_error(results(functions["compiled"]), results(module))
    seconds = turns.median_seconds({name: partial(results, function) for name, function in functions.items()})
    tolerance = COMPILED_TOLERANCES[dtype]
    measured = f"error {error:.1e} ({worst}), time {ratio(seconds['compiled'], seconds['eager'], 1e-3)} ms eager"
    return Row(name, measured, f"≤ {tolerance:.0e}", PASS if error <= tolerance else FAIL)


def forward_and_backward(core: AttentionCore, inputs: list[Tensor]) -> Callable[[], Any]:
    """A call that computes the gradients of inputs and parameters."""
    gradient = torch.randn_like(inputs[0])
    leaves = [*inputs, *core.parameters()]

    def run() -> tuple[Tensor, ...]:
        with autocast(gradient.device.type, gradient.dtype):
            output = core(*inputs)
        return torch.autograd.grad(output, leaves, gradient.to(output.dtype))

    return run


def autocast(device_type: str, dtype: torch.dtype) -> torch.autocast:
    """Autocast to bfloat16 for that type, none for float32."""
    return torch.autocast(device_type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bias(leaves: dict[str, Tensor]) -> Bias:
    full = leaves.get("bias")
    if "rel_pos_h" not in leaves:
        return Bias(full)
    return Bias(full, *rel_pos_terms(leaves["query"], leaves["rel_pos_h"], leaves["rel_pos_w"]))


def _forbid_tf32() -> None:
    """Makes products of float32 factors exact: some containers round them to TensorFloat-32 by default."""
    torch.set_float32_matmul_precision("highest")
