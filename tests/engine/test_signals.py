"""Signals and deaths of processes, as a user's runs meet them: on small models and real files."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from forked_command import run_command, start_command

from karat_det.data.digits import generate_crops, generate_digits

ROOT = Path(__file__).parents[2]
TRAIN = [
    *("train_net", "--config-file", "configs/quickstart.yaml", "--num-gpus", "0"),
    *("MODEL.VIT.EMBED_DIM", "24", "MODEL.VIT.DEPTH", "2", "MODEL.FPN.OUT_CHANNELS", "8"),
    *("MODEL.ROI_BOX_HEAD.CONV_DIM", "8", "MODEL.ROI_BOX_HEAD.FC_DIM", "8", "MODEL.ROI_MASK_HEAD.CONV_DIM", "8"),
    *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "100000", "SOLVER.CHECKPOINT_PERIOD", "100000"),
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "TEST.EVAL_PERIOD", "0"),
]
PRETRAIN = [
    *("pretrain_net", "--config-file", "configs/pretrain/digits.yaml", "--num-gpus", "0", "--data", "DATA"),
    *("MODEL.EMBED_DIM", "24", "MODEL.DEPTH", "2", "SOLVER.EPOCHS", "1000", "SOLVER.IMS_PER_BATCH", "12"),
]
TWO = ("--nproc-per-node", "2")
STEP = r"iter: \d+ |step \d+/5 "


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    generate_digits(root, {"train": 8, "val": 3})
    generate_crops(root, {"train": 60, "val": 51})
    return root


class Run:
    """A command that has been started, in a session of its own; in a fork, as the processes of torchrun."""

    def __init__(self, data, folder, command, *overrides, **how):
        self.out = folder / "out"
        self.log, self.errors = folder / "log", folder / "errors"
        words = [data if word == "DATA" else word for word in command]
        words += [*overrides, "OUTPUT_DIR", self.out]
        environment = {"DETECTRON2_DATASETS": str(data)}
        with open(self.log, "w") as log, open(self.errors, "w") as errors:
            how |= {"output": log, "errors": errors, "folder": ROOT, "environment": environment}
            self.process = start_command(*words, prepare=os.setsid, **how)

    def wait_for(self, pattern, count=1):
        """Waits until the log has a pattern so often."""
        deadline = time.monotonic() + 90
        while len(re.findall(pattern, self.log.read_text())) < count:
            assert time.monotonic() < deadline and self.process.poll() is None, self.told()
            time.sleep(0.05)

    def status(self):
        """The exit status; by then no process of the run lives on, and none has printed a trace."""
        status = self.process.wait(60)
        deadline = time.monotonic() + 20
        while self.processes():
            assert time.monotonic() < deadline, f"{self.processes()} live on: {self.told()}"
            time.sleep(0.1)
        return status

    def processes(self):
        """Numbers of the run's processes, workers included."""
        found = subprocess.run(["pgrep", "-s", str(self.process.pid)], capture_output=True, text=True).stdout
        return sorted(map(int, found.split()))

    def children(self):
        """Numbers of the processes that torchrun has started."""
        found = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True).stdout
        return sorted(map(int, found.split()))

    def told(self):
        return self.log.read_text() + self.errors.read_text()

    def saved(self):
        """Iteration of the checkpoint that last_checkpoint names."""
        last = self.out / (self.out / "last_checkpoint").read_text()
        return torch.load(last, weights_only=True)["trainer"]["iteration"]


@pytest.mark.parametrize(
    ("command", "number", "to_all"),
    [
        (TRAIN, signal.SIGTERM, True),  # as SLURM sends it, the workers too
        (PRETRAIN, signal.SIGUSR1, False),
    ],
)
def test_a_signal_ends_training_with_a_checkpoint_in_one_line(data, tmp_path, command, number, to_all):
    run = Run(data, tmp_path, command, "DATALOADER.NUM_WORKERS", "2")
    run.wait_for(STEP)
    os.killpg(run.process.pid, number) if to_all else run.process.send_signal(number)
    assert run.status() == 128 + number
    assert re.fullmatch(
        rf"Stopped by {number.name}\. Saved .*out.* go on from it with --resume\.\n", run.errors.read_text()
    )
    assert "Traceback" not in run.told() and run.saved() > 0


def test_a_signal_ends_an_evaluation_at_once_and_costs_no_step(data, tmp_path):
    run = Run(data, tmp_path, TRAIN, "TEST.EVAL_PERIOD", "3", "DATALOADER.NUM_WORKERS", "2")
    run.wait_for("Start inference")
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.status() == 128 + signal.SIGINT
    assert run.errors.read_text() == "Ended at once by SIGINT.\n" and "Traceback" not in run.told()
    assert run.saved() == 2


def test_a_signal_ends_a_start_at_once(tmp_path):
    command = [sys.executable, "tools/train_net.py", "--config-file", "configs/quickstart.yaml", "--num-gpus", "0"]
    command += ["OUTPUT_DIR", str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    run = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, **pipes)
    time.sleep(1)
    run.send_signal(signal.SIGUSR1)
    assert run.communicate(timeout=60) == (b"", b"Ended at once by SIGUSR1.\n")
    assert run.returncode == 128 + signal.SIGUSR1


def test_a_second_signal_ends_at_once_what_the_first_has_asked_to_end(tmp_path):
    code = """
import os, signal, time
from karat_det.engine import signals
signals.install()
with signals.awaited():
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(0.5)
    print(signals.requested(), flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""
    (tmp_path / "code.py").write_text(code)
    done = run_command(tmp_path / "code", folder=ROOT)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, f"{int(signal.SIGUSR1)}\n")
    assert done.stderr == "Ended at once by SIGTERM.\n"


def test_a_signal_that_timeout_sends_twice_is_one_request(tmp_path):
    code = """
import os, signal, time
from karat_det.engine import signals
signals.install()
with signals.awaited():
    for wait in (0.01, 0.5, 60):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(wait)
        print("goes on", flush=True)
"""
    (tmp_path / "code.py").write_text(code)
    done = run_command(tmp_path / "code", folder=ROOT)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "goes on\n" * 2)
    assert done.stderr == "Ended at once by SIGTERM.\n"


def test_a_run_under_torchrun_outlives_a_worker_and_no_process_outlives_torchrun(data, tmp_path):
    periods = ("SOLVER.CHECKPOINT_PERIOD", "10", "DATALOADER.NUM_WORKERS", "1")
    run = Run(data, tmp_path, TRAIN, *periods, torchrun=(*TWO, "--max-restarts", "3"))
    run.wait_for("iter: 19 ")
    saved = run.saved()
    os.kill(run.children()[1], signal.SIGKILL)
    run.wait_for("Starting training from iteration", 2)
    start = int(re.findall(r"Starting training from iteration (\d+)", run.log.read_text())[1])
    assert start > saved >= 9
    run.wait_for(rf"iter: {start // 20 * 20 + 19} ")
    os.kill(run.process.pid, signal.SIGKILL)
    assert run.status() == -signal.SIGKILL
    assert run.saved() > start


def test_a_process_that_reads_images_and_dies_costs_no_step(data, tmp_path):
    run = Run(data, tmp_path, TRAIN, "DATALOADER.NUM_WORKERS", "1", torchrun=TWO)
    run.wait_for("iter: 19 ")
    reader = subprocess.run(["pgrep", "-P", str(run.children()[1])], capture_output=True, text=True).stdout.split()[-1]
    os.kill(int(reader), signal.SIGKILL)
    assert run.status() == 1
    errors = run.errors.read_text()
    assert errors.count("error: A process that reads images has died.") == 1
    assert errors.count("error: Another process has no images") == 1
    assert "Traceback" not in run.log.read_text() and run.saved() >= 19


def test_a_signal_to_one_of_two_processes_ends_both_with_a_checkpoint(data, tmp_path):
    run = Run(data, tmp_path, PRETRAIN, "DATALOADER.NUM_WORKERS", "0", torchrun=TWO)
    run.wait_for(STEP)
    os.kill(run.children()[1], signal.SIGUSR1)
    assert run.status() == 1
    errors = run.errors.read_text()
    # Beside what torchrun itself has to say.
    assert errors.count("Stopped by SIGUSR1. Saved ") == 1 and "Ended" not in errors
    assert "exitcode  : 138" in errors and run.saved() > 0
