"""Checks of training on a GPU: steps of ViTDet with softmax and with KArAt, resuming, and several processes.

Images are synthetic, or the embedded digits, so that no dataset is needed. Every check takes a device, so that tests
run the same lines on the CPU with small sizes.
"""

import gc
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from detectron2.config import CfgNode
from torch import Tensor

from ..checkpoint.files import read_weights
from ..checkpoint.run_folder import read_metrics
from ..config import image_size
from ..data.digits import generate_digits
from ..engine.setup import load_cfg
from .benchmark_detector import make_step
from .check_runner import FAIL, FOR_THE_RECORD, PASS, Row, Skip, ratio
from .measuring import peak_memory

# Largest relative difference of KArAt's loss to softmax's after a few steps from random weights.
CLOSE = 0.2
# Largest difference of a resumed run's weights to the unbroken run's, over their change since the checkpoint: one step
# after it, when only the order of atomic additions differs, and at the end, when that has led to other proposals.
ONE_STEP, AT_THE_END = 0.01, 0.2
RESUMED_AT, NUM_STEPS = 4, 8


@dataclass(frozen=True)
class Steps:
    """Some training steps: the loss of each, images a second in the second half of them, bytes at the peak."""

    losses: list[float]
    images_per_second: float
    peak_bytes: int


def check_training(
    device: str, config_file: Path, opts: Sequence[str], batch_sizes: Sequence[int], num_steps: int = 20
) -> list[Row]:
    """Training steps in bfloat16 from random weights: the same seed, images and proposals with softmax and with KArAt.

    Args:
        device: "cuda" or "cpu".
        config_file, opts: the detector with KArAt; softmax's is the same with MODEL.KARAT.ENABLED False.
        batch_sizes: images a step; the first with which both fit the memory is used.
        num_steps: at least 2.

    Raises:
        Skip: there is not enough memory for the last of batch_sizes.
        RuntimeError: there is no such device.
    """
    _check_device(device)
    fixed = ["MODEL.DEVICE", device, "SOLVER.AMP.ENABLED", "True", "SOLVER.WARMUP_ITERS", "0"]
    cfgs = {
        name: load_cfg(str(config_file), [*opts, *fixed, "MODEL.KARAT.ENABLED", enabled], own_data_needed=False)
        for name, enabled in (("softmax", "False"), ("KArAt", "True"))
    }
    for batch_size in batch_sizes:
        try:
            softmax, karat = (take_steps(cfg, batch_size, num_steps) for cfg in cfgs.values())
        except torch.OutOfMemoryError:
            print(f"{config_file.name}: {batch_size} images a step are too many for the memory", flush=True)
            continue
        return _rows_of_training(cfgs["KArAt"], config_file, batch_size, softmax, karat)
    images = "1 image" if batch_sizes[-1] == 1 else f"{batch_sizes[-1]} images"
    raise Skip(f"a step of {images} needs more memory than this GPU's {_memory(device) / 2**30:.1f} GiB")


def _check_device(device: str) -> None:
    """Raises RuntimeError where there is no such device: configs and commands would quietly take the CPU."""
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("PyTorch finds no GPU in the process of this check, though one was there when all began.")


def _memory(device: str) -> int:
    return torch.cuda.get_device_properties(device).total_memory


def _rows_of_training(cfg: CfgNode, config_file: Path, batch_size: int, softmax: Steps, karat: Steps) -> list[Row]:
    size = " × ".join(map(str, image_size(cfg)))
    what = f"training: {config_file.name}, {size}, bfloat16, {batch_size} images a step"
    losses = {"softmax": softmax.losses, "KArAt": karat.losses}
    finite = all(math.isfinite(loss) for of_model in losses.values() for loss in of_model)
    curves = ", ".join(f"{name} {of_model[0]:.4g} to {of_model[-1]:.4g}" for name, of_model in losses.items())
    last = max(1, len(karat.losses) // 4)
    ends = mean(karat.losses[-last:]), mean(softmax.losses[-last:])
    close = finite and abs(ends[0] / ends[1] - 1) <= CLOSE
    return [
        Row(f"{what}: loss", f"{curves}, in {len(karat.losses)} steps", "finite", PASS if finite else FAIL),
        Row(
            f"{what}: KArAt's loss over softmax's, last {last} steps",
            ratio(*ends, 1),
            f"{1 - CLOSE:.2f} to {1 + CLOSE:.2f}",
            PASS if close else FAIL,
        ),
        Row(
            f"{what}: images a second, KArAt over softmax",
            ratio(karat.images_per_second, softmax.images_per_second, 1),
            FOR_THE_RECORD,
        ),
        Row(
            f"{what}: peak memory, KArAt over softmax",
            f"{ratio(karat.peak_bytes, softmax.peak_bytes, 2**20)} MiB",
            FOR_THE_RECORD,
        ),
    ]


def take_steps(cfg: CfgNode, batch_size: int, num_steps: int) -> Steps:
    """Builds a detector and takes steps with it; the peak memory is that of both."""
    wait = torch.cuda.synchronize if cfg.MODEL.DEVICE == "cuda" else lambda: None
    losses, seconds = [], []
    gc.collect()  # what an attempt with more images has left
    if cfg.MODEL.DEVICE == "cuda":
        torch.cuda.empty_cache()

    def run() -> None:
        step = make_step(cfg, batch_size)
        for index in range(num_steps):
            wait()
            start = time.perf_counter()
            step.train(index, index + 1)
            wait()
            seconds.append(time.perf_counter() - start)
            # The trainer keeps no loss of a step that it skipped because something was not finite.
            losses.append(sum(step.last_losses.values()) if step.updated else math.nan)

    peak = peak_memory(run, cfg.MODEL.DEVICE)
    timed = seconds[num_steps // 2 :]
    return Steps(losses, batch_size * len(timed) / sum(timed), max(1, peak))


def check_resume(device: str, root: Path, opts: Sequence[str], folder: Path) -> list[Row]:
    """tools/train_net.py for 8 steps, and with --resume for the last 4 of them from its own checkpoint.

    Args:
        device: "cuda" or "cpu".
        root: the working copy.
        opts: overrides of configs/quickstart.yaml.
        folder: an existing one, for files that are removed again.

    Raises:
        RuntimeError: there is no such device, or the command failed.
    """
    _check_device(device)
    with tempfile.TemporaryDirectory(dir=folder) as runs:
        return _resume(device, root, opts, Path(runs))


def _resume(device: str, root: Path, opts: Sequence[str], folder: Path) -> list[Row]:
    opts = [*opts, "SOLVER.CHECKPOINT_PERIOD", "1"]
    unbroken, resumed = folder / "unbroken", folder / "resumed"
    train_net(device, root, opts, folder, unbroken)
    # The state of a run that was stopped at this step.
    resumed.mkdir()
    checkpoint = f"model_{RESUMED_AT - 1:07d}.pth"
    (resumed / checkpoint).write_bytes((unbroken / checkpoint).read_bytes())
    (resumed / "last_checkpoint").write_text(checkpoint, encoding="utf-8")
    train_net(device, root, opts, folder, resumed, "--resume")

    start, rows = weights_of(unbroken, RESUMED_AT), []
    for when, num_steps, tolerance in (
        ("one step later", RESUMED_AT + 1, ONE_STEP),
        (f"{NUM_STEPS - RESUMED_AT} steps later", NUM_STEPS, AT_THE_END),
    ):
        expected, actual = weights_of(unbroken, num_steps), weights_of(resumed, num_steps)
        difference = ((actual - expected).norm() / (expected - start).norm()).item()
        what = f"resume: weights of a resumed and an unbroken run, {when}"
        measured = f"they differ by {difference:.1e} of what changed since the checkpoint"
        rows.append(Row(what, measured, f"≤ {tolerance:g}", PASS if difference <= tolerance else FAIL))
    return rows


def check_processes(device: str, root: Path, opts: Sequence[str], folder: Path, num_processes: int = 2) -> list[Row]:
    """tools/train_net.py in several processes: under torchrun, and on GPUs with --num-gpus, too.

    Args:
        device, root, opts, folder: as for `check_resume`.
        num_processes: with nccl on a GPU each, or with gloo on the CPU.

    Raises:
        Skip: there are fewer GPUs.
    """
    if device == "cuda" and torch.cuda.device_count() < num_processes:
        raise Skip(f"needs {num_processes} GPUs, and PyTorch finds {torch.cuda.device_count()} here")
    with tempfile.TemporaryDirectory(dir=folder) as runs:
        return list(_in_processes(device, root, opts, Path(runs), num_processes))


def _in_processes(device: str, root: Path, opts: Sequence[str], folder: Path, num_processes: int) -> Iterator[Row]:
    backend = "nccl" if device == "cuda" else "gloo"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    launchers = {"torchrun": (torchrun, [])}
    if device == "cuda":
        launchers["--num-gpus"] = ([], ["--num-gpus", str(num_processes)])
    for name, (launcher, arguments) in launchers.items():
        output = folder / name.strip("-")
        start = time.perf_counter()
        train_net(device, root, opts, folder, output, *arguments, launcher=launcher)
        taken = time.perf_counter() - start
        losses = losses_of(output)
        finite = bool(losses) and all(map(math.isfinite, losses))
        measured = f"loss {losses[-1]:.4g} after {NUM_STEPS} steps, {taken:.0f} s in all" if losses else "no loss"
        what = f"{num_processes} processes by {backend}, {name}"
        yield Row(what, measured, "finite", PASS if finite else FAIL)


def train_net(
    device: str,
    root: Path,
    opts: Sequence[str],
    folder: Path,
    output: Path,
    *arguments: str,
    launcher: Sequence[str] = (),
) -> None:
    """Runs tools/train_net.py with the quickstart config on a few scenes of digits in `folder`.

    Raises:
        RuntimeError: its status is not 0.
    """
    generate_digits(folder / "datasets", {"train": 8, "val": 1})
    opts = [*opts, "SOLVER.MAX_ITER", str(NUM_STEPS), "SOLVER.WARMUP_ITERS", "0", "DATASETS.TEST", "()"]
    opts += ["OUTPUT_DIR", str(output)]
    if device == "cpu":
        arguments = (*arguments, "--num-gpus", "0")
    command = [sys.executable, *launcher, str(root / "tools" / "train_net.py")]
    command += ["--config-file", str(root / "configs" / "quickstart.yaml"), *arguments, *opts]
    environment = {**os.environ, "DETECTRON2_DATASETS": str(folder / "datasets")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    status = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL).returncode
    if status:
        raise RuntimeError(f"tools/train_net.py ended with status {status}: {' '.join([*arguments, *opts])}")


def weights_of(run: Path, num_steps: int) -> Tensor:
    """All floating point weights of a run after a number of steps, in one row of float64."""
    checkpoint = run / f"model_{num_steps - 1:07d}.pth"
    state = read_weights(str(checkpoint if checkpoint.exists() else run / "model_final.pth"))["model"]
    return torch.cat([state[name].double().flatten() for name in sorted(state) if state[name].is_floating_point()])


def losses_of(output: Path) -> list[float]:
    """The losses in a run's metrics.json."""
    return [record["total_loss"] for record in read_metrics(output / "metrics.json") if "total_loss" in record]
