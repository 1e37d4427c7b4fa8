"""The CPU's back end: C++, in fourier.cpp, for float32.

It is compiled once for a processor's instructions and a version of PyTorch, at first use, or before by

    tools/compile_attention.py

and kept where torch.utils.cpp_extension keeps its libraries: TORCH_EXTENSIONS_DIR, or ~/.cache/torch_extensions.
Without a compiler, or if it fails, the log says so once, and the plain back end replaces it.
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

from ..bias import Bias

SOURCE = Path(__file__).with_name("fourier.cpp")
# The processor's instruction sets, as PyTorch reports them, and the compiler's flags for them.
_INSTRUCTIONS = {
    "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma"],
    "AVX2": ["-mavx2", "-mfma"],
}
CONSEQUENCE = "Attention on the CPU is plain PyTorch instead, which takes about twice as long."
_logger = logging.getLogger(__name__)


def can_run(*tensors: Tensor) -> bool:
    """Whether these are float32 tensors on the CPU and the library is there. The first call may compile it."""
    return all(x.is_cpu and x.dtype == torch.float32 for x in tensors) and is_available()


@torch.compiler.assume_constant_result
def is_available() -> bool:
    return _load()


@functools.cache
def _load() -> bool:
    """Loads the library, which registers karat_det::fourier_attention; compiles it if need be."""
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
    sources = [SOURCE.read_text(), SOURCE.with_name("matrices.h").read_text()]
    made_of = "\n".join([*sources, torch.__version__, *flags])
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
    """A context in which programs of a virtual environment, such as ninja, are found though it is not activated."""
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
    inputs = query, key, coefficients, scale, bias, mask, value
    units, attended = _run(*inputs, None, 1.0, value is not None)
    return units.mT if value is None else (units.mT, attended)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coefficients: Tensor,
    projector: Tensor,
    factor: float,
    scale: float,
    bias: Bias | None = None,
    mask: Tensor | None = None,
    residual: bool = False,
) -> Tensor:
    """See `backends.attend`."""
    inputs = query, key, coefficients, scale, bias, mask, value
    return _run(*inputs, projector.contiguous(), factor, residual)[1]


def _run(query, key, coefficients, scale, bias, mask, value, projector, factor, residual) -> tuple[Tensor, Tensor]:
    """S and the output of fourier.cpp, (..., heads, r, N) and (..., heads, N, v)."""
    batch = query.shape[:-3]
    full, vertical, horizontal = bias or Bias()
    full, mask = _one_batch_dimension(full, batch), _one_batch_dimension(mask, batch)
    full = None if full is None else full.float()
    query, key, vertical, horizontal, value = (_rows_in_memory(x) for x in (query, key, vertical, horizontal, value))
    scores = query, key, coefficients.contiguous(), scale, full, vertical, horizontal, mask
    units, output, _ = torch.ops.karat_det.fourier_attention(*scores, value, projector, factor, residual)
    if len(batch) == 1:
        return units, output
    return units.reshape(*batch, *units.shape[1:]), output.reshape(*batch, *output.shape[1:])


def _rows_in_memory(x: Tensor | None) -> Tensor | None:
    """(..., heads, N, *) as float32 (B, heads, N, *), the elements of a row one after the other."""
    if x is None:
        return None
    x = x.float()
    if x.ndim != 4:
        x = x.reshape(x.shape[:-3].numel(), *x.shape[-3:])
    return x if x.stride(-1) == 1 else x.contiguous()


def _one_batch_dimension(x: Tensor | None, batch: torch.Size) -> Tensor | None:
    """A tensor that is broadcastable to (*batch, heads, N, M), with four dimensions, each whole or 1."""
    if x is None:
        return None
    x = x[(None,) * (len(batch) + 3 - x.ndim)]
    if x.shape[:-3].numel() > 1:
        x = x.expand(*batch, *x.shape[-3:])
    return x.reshape(x.shape[:-3].numel(), *x.shape[-3:])


def _register_shapes() -> None:
    """Registers the shapes of the library's ops for torch.compile."""

    @torch.library.register_fake("karat_det::fourier_attention")
    def _(query, key, coefficients, scale, full, vertical, horizontal, mask, value, projector, factor, residual):
        batch_size, heads, num_rows, _ = query.shape
        width = 0 if value is None else value.shape[-1]
        output = query.new_empty(batch_size, 0 if value is None else num_rows, heads, width)
        log_totals = query.new_empty(batch_size, heads, num_rows if residual else 0, 1)
        return query.new_empty(batch_size, heads, coefficients.shape[-1], num_rows), output.transpose(1, 2), log_totals

    @torch.library.register_fake("karat_det::fourier_attention_backward")
    def _(units_gradient, output_gradient, query, key, coefficients, scale, full, vertical, horizontal, mask, value,
          projector, factor, residual, units, output, log_totals, with_full):  # fmt: skip
        batch_size, heads, num_rows, _ = query.shape
        num_keys, rank = key.shape[2], coefficients.shape[-1]
        sides = (0 if x is None else x.shape[-1] for x in (vertical, horizontal))
        return (
            query.new_empty(query.shape),
            key.new_empty(key.shape),
            coefficients.new_empty(coefficients.shape),
            query.new_empty(len(full) if with_full else batch_size, heads, num_keys, num_rows if with_full else 0).mT,
            *(query.new_empty(*query.shape[:3], side) for side in sides),
            key.new_empty(*key.shape[:3], 0 if value is None else value.shape[-1]),
            key.new_empty(heads, 0 if projector is None else num_keys, rank),
        )
