"""Checks for a user with a GPU: all that cannot be tested without one, in under ten minutes.

Errors of the attention, training, resuming, several processes, torch.compile, and times; one Markdown table of it all.
"""

import platform
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from ..attention import backends
from ..checkpoint.publishing import working_commit
from .benchmark_attention import GRIDS, AttentionShape
from .check_runner import FAIL, PASS, Check, Row, run_checks, table
from .gpu_attention import (
    LEARNED_BIAS,
    MASK,
    NO_BIAS,
    REL_POS,
    AttentionCase,
    check_attention,
    check_compiled_attention,
    check_compiled_backbone,
    check_times,
    name_of,
)
from .gpu_training import check_processes, check_resume, check_training
from .measuring import Turns

MACHINE = "machine"
DTYPES = (torch.float32, torch.bfloat16)
# N = 49, 196, 1024, 4096: windows of Swin and of ViTDet, and all of an image of 512 and of 1024 pixels.
CHECKED_GRIDS = tuple(grid for grid in GRIDS if grid != (20, 20))


def run_gpu_check(root: Path, output_dir: Path, device: str = "cuda", seconds: float = 570.0) -> tuple[str, bool]:
    """Makes all checks, logs the rows of each, and writes table.md.

    Args:
        root: the working copy, with configs and tools.
        output_dir: for the table, logs and traces; made if missing.
        device: "cuda".
        seconds: time for all checks; those that have not ended by then are left out.

    Returns:
        The report in Markdown, and whether no row failed.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    groups = gpu_checks(root, output_dir, device)
    total = sum(map(len, groups.values()))
    print(f"{total} checks; logs and traces of errors are in {output_dir}", flush=True)
    rows, start, report = [], time.monotonic(), ""
    for row in run_checks(groups, output_dir, seconds):
        taken = time.monotonic() - start
        print(f"{taken:4.0f} s: {row.result}: {row.name}: {row.measured}", flush=True)
        rows.append(row)
        # After each, so that an interruption loses nothing.
        report = f"{make_report(rows)}\nIt took {taken:.0f} s.\n"
        (output_dir / "table.md").write_text(report, encoding="utf-8")
    return report, all(row.result != FAIL for row in rows)


def make_report(rows: Sequence[Row]) -> str:
    """A line on the machine, if its row is among those given and passed, and the table of the others."""
    machines = [row for row in rows if row.name == MACHINE and row.result == PASS]
    head = machines[0].measured if machines else "a machine that could not be described"
    return f"GPU check of karat_det on {head}.\n\n{table([row for row in rows if row not in machines])}"


def gpu_checks(root: Path, output_dir: Path, device: str = "cuda") -> dict[str, list[Check]]:
    """All checks, in groups that run one after the other, each in a process of its own.

    Args:
        root: of the working copy.
        output_dir: for what runs write.
        device: "cuda" or "cpu".
    """
    configs = root / "configs"
    turns = Turns(repeats=20, seconds=3.0, device=device)
    errors = [
        Check(f"errors: {case}", check_attention, {"device": device, "case": case})
        for case in (
            AttentionCase(grid, grid_size, dtype, scores)
            for grid in CHECKED_GRIDS
            for grid_size in (1, 3)
            for dtype in DTYPES
            for scores in (NO_BIAS, MASK, REL_POS, LEARNED_BIAS)
        )
    ]
    training = [
        Check(
            f"training: {name}",
            check_training,
            {"device": device, "config_file": configs / name, "opts": (), "batch_sizes": batch_sizes},
        )
        for name, batch_sizes in (("vitdet_karat.yaml", (8, 4, 2, 1)), ("vitdet_b_1024_karat.yaml", (2, 1)))
    ]
    runs = {"device": device, "root": root, "opts": (), "folder": output_dir}
    processes = [Check("resume", check_resume, runs), Check("2 processes", check_processes, runs)]
    compiled = [
        Check(
            f"torch.compile: attention, {name_of(dtype)}",
            check_compiled_attention,
            {"device": device, "grid": (14, 14), "dtype": dtype, "turns": turns},
        )
        for dtype in DTYPES
    ]
    backbone = {"device": device, "config_file": configs / "quickstart.yaml", "opts": (), "turns": turns}
    compiled.append(Check("torch.compile: backbone", check_compiled_backbone, {**backbone, "dtype": torch.float32}))
    # As many windows or images as keep a GPU busy, and whose bias, written out for softmax, fits the memory.
    batch_sizes = dict(zip(CHECKED_GRIDS, (256, 64, 8, 1), strict=True))
    times = [
        Check(
            f"times: {shape}, {name_of(dtype)}",
            check_times,
            {"device": device, "shape": shape, "dtype": dtype, "turns": turns},
        )
        for bias in ("none", "rel_pos")
        for dtype in DTYPES
        for shape in (AttentionShape(batch_sizes[grid], grid=grid, bias=bias) for grid in CHECKED_GRIDS)
    ]
    return {
        "errors": [Check(MACHINE, describe_machine, {"root": root}), *errors],
        "training": training,
        "processes": processes,
        "compile": compiled,
        "times": times,
    }


def describe_machine(root: Path) -> list[Row]:
    """One row: GPU and driver, PyTorch, CUDA and Triton, and the commit."""
    parts = [*_gpus(), f"PyTorch {torch.__version__}"]
    parts += [f"CUDA {torch.version.cuda}"] if torch.version.cuda else []
    parts += [f"ROCm {torch.version.hip}"] if torch.version.hip else []
    parts.append("no Triton" if backends.triton is None else f"Triton {backends.triton.triton.__version__}")
    parts += [
        f"Python {platform.python_version()}",
        f"{platform.system()} {platform.machine()}",
        f"commit {working_commit()}",
    ]
    return [Row(MACHINE, ", ".join(parts))]


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return ["no GPU"]
    found = torch.cuda.get_device_properties(0)
    memory = f"{found.total_memory / 2**30:.1f} GiB, compute capability {found.major}.{found.minor}"
    count = torch.cuda.device_count()
    return [found.name + (f" (the first of {count})" if count > 1 else ""), memory, f"driver {_driver()}"]


def _driver() -> str:
    """Version of NVIDIA's driver, which PyTorch does not know."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if shutil.which(query[0]) is None:
        return "unknown (there is no nvidia-smi)"
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown ({error})"
    lines = done.stdout.split("\n")
    return lines[0].strip() if done.returncode == 0 and lines[0].strip() else "unknown (nvidia-smi failed)"
