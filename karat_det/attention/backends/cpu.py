"""The CPU's back end: C++, in fourier.cpp, for float32.

It is compiled once for a processor's instructions and a version of PyTorch, at first use, or before by

    tools/compile_attention.py

and kept where torch.utils.cpp_extension keeps its libraries: TORCH_EXTENSIONS_DIR, or ~/.cache/torch_extensions.
Without a compiler, or if it fails, the log says so once, and the plain back end serves.
"""

import contextlib
import functools
import hashlib
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..bias import Bias

SOURCE = Path(__file__).with_name("fourier.cpp")
# The instructions that PyTorch itself was found to have here, as flags of the compiler.
_INSTRUCTIONS = {
    "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma"],
    "AVX2": ["-mavx2", "-mfma"],
}
CONSEQUENCE = "Attention on the CPU is plain PyTorch instead, which takes about twice as long."
_logger = logging.getLogger(__name__)


def can_run(*tensors: Tensor) -> bool:
    """Whether these are float32 tensors on the CPU and the library is there. The first call may compile it."""
    return all(x.device.type == "cpu" and x.dtype == torch.float32 for x in tensors) and is_available()


@torch.compiler.assume_constant_result
def is_available() -> bool:
    return _load()


@functools.cache
def _load() -> bool:
    """Loads the library, which registers karat_det::fourier_sums and karat_det::project; compiles it if need be."""
    try:
        torch.ops.load_library(str(compile_library()))
    except (OSError, RuntimeError) as error:
        _logger.warning("%s %s", error, CONSEQUENCE)
        return False
    _register_shapes()
    return True


def compile_library() -> Path:
    """Compiles fourier.cpp, unless that is done.

    Returns:
        The library's path.

    Raises:
        RuntimeError: there is no compiler, or it failed; the message names the file with what it said.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    flags = ["-O3", *_INSTRUCTIONS.get(capability, [])]
    if sys.platform == "linux":
        flags.append("-fopenmp")  # ATen's threads are OpenMP's; other systems' compilers may lack it
    made_of = "\n".join([SOURCE.read_text(), torch.__version__, *flags])
    name = f"karat_det_fourier_{hashlib.sha256(made_of.encode()).hexdigest()[:12]}"

    compiler = os.environ.get("CXX", "c++")
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    folder = Path(root) / name
    library = folder / f"{name}.so"
    if library.exists():
        return library
    if shutil.which(compiler) is None:
        raise RuntimeError(f"There is no C++ compiler {compiler!r}: install g++, or name one by CXX.")
    from torch.utils import cpp_extension  # it is slow to import

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _path_of_this_python():
            cpp_extension.load(
                name, [str(SOURCE)], extra_cflags=flags, build_directory=str(folder), is_python_module=False
            )
    except Exception as error:  # whatever a compiler, ninja or a disk may do, attention goes on without
        with tempfile.NamedTemporaryFile("w", prefix=f"{name}_", suffix=".log", delete=False) as log:
            log.write(str(error))
        raise RuntimeError(f"{SOURCE.name} could not be compiled: see {log.name}.") from error
    return library


@contextlib.contextmanager
def _path_of_this_python() -> Iterator[None]:
    """Programs of a virtual environment are found though it is not activated: ninja is one."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{before}"
    try:
        yield
    finally:
        os.environ["PATH"] = before


def fourier_sums(
    query: Tensor,
    key: Tensor,
    coefficients: Tensor,
    scale: float,
    bias: Bias | None = None,
    mask: Tensor | None = None,
    value: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See `backends.fourier_sums`."""
    batch = query.shape[:-3]
    full, vertical, horizontal = bias or Bias()
    full, mask = _one_batch_dimension(full, batch), _one_batch_dimension(mask, batch)
    query, key, vertical, horizontal, value = (_rows_in_memory(x) for x in (query, key, vertical, horizontal, value))
    if mask is not None:
        mask = mask.mT.contiguous()
    if full is not None:
        full = full.float()
    sums, attended = _FourierSums.apply(
        query, key, coefficients.contiguous(), scale, full, vertical, horizontal, mask, value
    )
    sums = sums.reshape(*batch, *sums.shape[1:])
    return sums if value is None else (sums, attended.reshape(*batch, *attended.shape[1:]))


def project(units: Tensor, projector: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """See `backends.project`."""
    batch = value.shape[:-3]
    mask = _one_batch_dimension(mask, batch)
    if mask is not None:
        mask = mask.contiguous()
    units = units.reshape(batch.numel(), *units.shape[-3:])
    output = _Project.apply(units, projector.contiguous(), _rows_in_memory(value), mask)
    return output.reshape(*batch, *output.shape[1:])


def _rows_in_memory(x: Tensor | None) -> Tensor | None:
    """(..., heads, N, *) as float32 (B, heads, N, *), the elements of a row one after the other."""
    if x is None:
        return None
    x = x.float().reshape(x.shape[:-3].numel(), *x.shape[-3:])
    return x if x.stride(-1) == 1 else x.contiguous()


def _one_batch_dimension(x: Tensor | None, batch: torch.Size) -> Tensor | None:
    """A tensor that is broadcastable to (*batch, heads, N, M), with four dimensions, each whole or 1."""
    if x is None:
        return None
    x = x[(None,) * (len(batch) + 3 - x.ndim)]
    if x.shape[:-3].numel() > 1:
        x = x.expand(*batch, *x.shape[-3:])
    return x.reshape(x.shape[:-3].numel(), *x.shape[-3:])


class _FourierSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, coefficients, scale, full, vertical, horizontal, mask, value):
        full_transposed = None if full is None else full.mT.contiguous()
        inputs = query, key, coefficients, scale, full_transposed, vertical, horizontal, mask, value
        sums, attended, log_totals = torch.ops.karat_det.fourier_sums(*inputs)
        ctx.scale = scale
        ctx.save_for_backward(*inputs[:3], full, *inputs[5:], attended, log_totals)
        return sums, attended

    @staticmethod
    @once_differentiable
    def backward(ctx, sums_gradient, attended_gradient):
        query, key, coefficients, full, *others, value, attended, log_totals = ctx.saved_tensors
        if value is None:
            attended_gradient = attended = log_totals = None
        else:
            attended_gradient = _rows_in_memory(attended_gradient)
        with_full = ctx.needs_input_grad[4]
        full_transposed = None if full is None else full.mT.contiguous()
        query, key, coefficients, full_gradient, *terms, value = torch.ops.karat_det.fourier_sums_backward(
            _rows_in_memory(sums_gradient), attended_gradient, query, key, coefficients, ctx.scale, full_transposed,
            *others, value, attended, log_totals, with_full,
        )  # fmt: skip
        full = full_gradient.mT.sum_to_size(full.shape) if with_full else None
        gradients = query, key, coefficients, None, full, *terms, None, value
        return tuple(x if need else None for x, need in zip(gradients, ctx.needs_input_grad, strict=True))


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx, units, projector, value, mask):
        ctx.save_for_backward(units, projector, value, mask)
        return torch.ops.karat_det.project(units, projector, value, mask)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return *torch.ops.karat_det.project_backward(_rows_in_memory(gradient), *ctx.saved_tensors), None


def _register_shapes() -> None:
    """Says what the library's operators return, for torch.compile."""

    @torch.library.register_fake("karat_det::fourier_sums")
    def _(query, key, coefficients, scale, full, vertical, horizontal, mask, value):
        *batch, num_rows, _ = query.shape
        width = 0 if value is None else value.shape[-1]
        if value is None:
            num_rows = 0
        sums = query.new_empty(*batch, coefficients.shape[-1], query.shape[-2]).mT
        return sums, query.new_empty(*batch, num_rows, width), query.new_empty(*batch, num_rows, 1)

    @torch.library.register_fake("karat_det::fourier_sums_backward")
    def _(sums_gradient, attended_gradient, query, key, coefficients, scale, full, vertical, horizontal, mask, value,
          attended, log_totals, with_full):  # fmt: skip
        batch_size, heads, num_rows, _ = query.shape
        num_keys = key.shape[2]
        sides = (0 if x is None else x.shape[-1] for x in (vertical, horizontal))
        return (
            query.new_empty(query.shape),
            key.new_empty(key.shape),
            coefficients.new_empty(coefficients.shape),
            query.new_empty(len(full) if with_full else batch_size, heads, num_keys, num_rows if with_full else 0),
            *(query.new_empty(*query.shape[:3], side) for side in sides),
            key.new_empty(*key.shape[:3], 0 if value is None else value.shape[-1]),
        )

    @torch.library.register_fake("karat_det::project")
    def _(units, projector, value, mask):
        batch_size, heads, num_rows, _ = units.shape
        return units.new_empty(batch_size, num_rows, heads, value.shape[-1]).transpose(1, 2)

    @torch.library.register_fake("karat_det::project_backward")
    def _(gradient, units, projector, value, mask):
        return tuple(x.new_empty(x.shape) for x in (units, projector, value))
