"""Measures time and memory.

Variants are timed in one process on the same tensors, in turns, and the median of the turns counts. Peak memory is
measured in a fresh process for each variant: the allocator's on CUDA, the process's resident memory on the CPU, both
beyond what was in use before.
"""

import ctypes
import math
import multiprocessing
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4


@dataclass(frozen=True)
class Turns:
    """How functions are timed.

    Attributes:
        repeats: turns of each function.
        seconds: no turn begins after this time, except the first three: a median needs them.
        device: "cpu", or "cuda" to wait for its kernels.
        turn_seconds: a turn is as many calls as fill this time, since a model runs its own blocks one after the other,
            not in turns with another's.
    """

    repeats: int = 15
    seconds: float = 45.0
    device: str = "cpu"
    turn_seconds: float = 0.02

    def median_seconds(self, functions: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
        """Median seconds of a call of each function. They take turns, after each has run twice."""
        wait = torch.cuda.synchronize if self.device == "cuda" else lambda: None

        def seconds_of(function: Callable[[], Any], calls: int) -> float:
            start = time.perf_counter()
            for _ in range(calls):
                function()
            wait()
            return (time.perf_counter() - start) / calls

        calls = {}
        for name, function in functions.items():
            seconds_of(function, 1)
            calls[name] = max(1, math.ceil(self.turn_seconds / max(seconds_of(function, 1), 1e-6)))
        times = {name: [] for name in functions}
        end = time.perf_counter() + self.seconds
        for turn in range(1, self.repeats + 1):
            for name, function in functions.items():
                times[name].append(seconds_of(function, calls[name]))
            if turn >= 3 and time.perf_counter() > end:
                break
        return {name: statistics.median(measured) for name, measured in times.items()}


def bytes_kept(module: nn.Module, inputs: Sequence[Tensor]) -> int:
    """Bytes of memory that autograd keeps between a module's forward and its backward.

    Every saved storage counts once and whole, inputs, parameters and outputs included.
    """
    storages = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = module(*inputs)  # keeps all storages alive, so that no address comes twice
    del output
    return sum(storages.values())


def multiply_adds(module: nn.Module, inputs: Sequence[Tensor]) -> int:
    """Multiply-adds of a forward pass over the first item of a batch, as fvcore counts them.

    Matrix products count, sines and exponentials do not.
    """
    # fvcore misses the batch dimension of a product whose first factor is broadcast along it, as in Wᵀ V.
    count = FlopCountAnalysis(module, tuple(x[:1] for x in inputs))
    return int(count.unsupported_ops_warnings(False).uncalled_modules_warnings(False).total())


def peak_memory(function: Callable[[], Any], device: str) -> int:
    """Bytes that a call needs at its peak, beyond what was in use before it.

    On the CPU this is the process's resident memory, which Linux counts to some 100 KiB for each core. A process that
    ran something else before may reuse its memory.

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


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function of a module in a new process.

    It is forked from a server that has only imported that module, which is faster than to start an interpreter.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["karat_det.quiet", function.__module__])
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


def keep_freed_memory() -> None:
    """Makes malloc reuse the memory of large tensors, which it otherwise returns to the system and asks for anew.

    A step has millions of page faults, whose time varies by more than the models differ.
    """
    _set_malloc(_M_MMAP_MAX, 0)
    _set_malloc(_M_TRIM_THRESHOLD, -1)


def _set_malloc(option: int, value: int) -> None:
    """Sets an option of glibc's malloc in this process. Other C libraries have no such options."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(option, value)


def _resident(key: str) -> int:
    """Bytes of this process's memory: VmRSS is the current value, VmHWM the peak."""
    return 1024 * int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))[1])
