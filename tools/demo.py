"""Trains, evaluates and shows the quickstart: everything that `make demo` does after the installation.

Makes the embedded dataset, trains configs/quickstart.yaml on it (on one GPU if there is one, else in a process on each
core), draws the predictions on some validation images, and prints box and mask AP. A finished run is not trained again,
and an interrupted one goes on from its last checkpoint.

Usage: python tools/demo.py
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "configs/quickstart.yaml"
OUTPUT = Path("output/quickstart")
WEIGHTS = "model_final.pth"
PICTURES = OUTPUT / "pictures"
DATASET = "digits_val"
NUM_PICTURES = 24


def main() -> None:
    run_step("Making the embedded dataset", "datasets/prepare_digits.py")
    train(CONFIG, OUTPUT)
    run_step(
        f"Drawing the predictions on {NUM_PICTURES} images",
        *("tools/visualize_predictions.py", "--config-file", CONFIG, "--weights", str(OUTPUT / WEIGHTS)),
        *("--dataset", DATASET, "--max-images", str(NUM_PICTURES), "--output", str(PICTURES)),
    )
    box_ap, mask_ap = average_precision(OUTPUT)
    say(f"Done. COCO AP (the mean over IoU 0.50 to 0.95, in percent) on {DATASET}:")
    print(f"      box AP   {box_ap:.1f}")
    print(f"      mask AP  {mask_ap:.1f}")
    print(f"    Pictures, ground truth beside prediction: {ROOT / PICTURES}")


def train(config: str, output: Path, *overrides: str) -> None:
    """Trains and evaluates a detector, unless that is done; an interrupted run goes on."""
    if (ROOT / output / WEIGHTS).is_file() and read_average_precision(output) is not None:
        say(f"{output} holds a finished run: not training again. To train anew, remove that folder.")
        return
    run_training(f"Training and evaluating {config}", "tools/train_net.py", config, output, *overrides)


def run_training(what: str, tool: str, config: str, output: Path, *arguments: str) -> None:
    """Runs a command that trains, on one GPU if there is one, else in a process on each core."""
    gpus = number_of_gpus()
    processes = 1 if gpus else number_of_cpu_processes()
    launcher = []
    if processes > 1:
        # A process a core is a third faster than a thread a core.
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    run_step(
        f"{what} on {'one GPU' if gpus else f'the CPU, in {processes} processes'}",
        *(*launcher, tool, "--config-file", config, "--num-gpus", str(gpus), "--resume"),
        *("OUTPUT_DIR", str(output), *arguments),
    )


def run_step(what: str, *arguments: str) -> None:
    """Runs Python with `arguments` in the project's folder, its output passing through, and says how long it took.

    Raises:
        SystemExit: with the script's exit status, if that is not 0.
    """
    say(what)
    print(f"    python {' '.join(arguments)}", flush=True)
    start = time.monotonic()
    environment = {"OMP_NUM_THREADS": "1", **os.environ} if "torch.distributed.run" in arguments else None
    with subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment) as process:
        try:
            status = process.wait()
        except KeyboardInterrupt:
            # A terminal's Ctrl-C goes to the step too, which saves a checkpoint before it ends.
            try:
                process.wait()
            finally:
                process.kill()
            raise
    if status != 0:
        say(f"Stopped: the step '{what}' failed with exit status {status}. Its message is above.")
        raise SystemExit(status if status > 0 else 128 - status)
    say(f"Done in {time.monotonic() - start:.0f} s")


def say(message: str) -> None:
    print(f"==> {message}", flush=True)


def number_of_gpus() -> int:
    """1 if PyTorch can use a GPU, else 0."""
    code = "import torch; print(int(torch.cuda.is_available()))"
    result = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return int(result.stdout)


def number_of_cpu_processes() -> int:
    """As many as the cores, but a divisor of the config's batch of 4 images."""
    return max(count for count in (1, 2, 4) if count <= (os.cpu_count() or 1))


def average_precision(output: Path) -> tuple[float, float]:
    """As `read_average_precision`; a run without an evaluation ends the command."""
    figures = read_average_precision(output)
    if figures is None:
        raise SystemExit(f"{output / 'metrics.json'} has no evaluation: remove {output} and run this again.")
    return figures


def read_average_precision(output: Path) -> tuple[float, float] | None:
    """Box and mask AP, in percent, of the last evaluation in a run's metrics.json; None if there was none."""
    metrics_file = ROOT / output / "metrics.json"
    if not metrics_file.is_file():
        return None
    figures = None
    for line in metrics_file.read_text(encoding="utf-8", errors="replace").splitlines():
        # A run that was killed may leave half a line.
        with contextlib.suppress(json.JSONDecodeError, TypeError):
            record = json.loads(line)
            if "segm/AP" in record:
                figures = record["bbox/AP"], record["segm/AP"]
    return figures


def run(main: Callable[[], None]) -> None:
    """Runs a demo; an interruption ends it with a word."""
    try:
        main()
    except KeyboardInterrupt:
        say("Interrupted. Run it again to go on from the last checkpoint.")
        raise SystemExit(130) from None


if __name__ == "__main__":
    run(main)
