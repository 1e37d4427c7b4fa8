import argparse
import os
import re
import signal
import sys
import time

import pytest
import torch
from torch.multiprocessing import ProcessRaisedException, start_processes

from karat_det.data.broken_images import TooManyBroken
from karat_det.engine import processes, signals
from karat_det.engine.output_dir import claims
from karat_det.engine.processes import RunFailed, goes_on, run_distributed, take_folder


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_any_number_of_gpus_is_one_process_on_the_cpu(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(signals, "install", lambda: None)
    calls = []
    run_distributed(calls.append, argparse.Namespace(num_gpus=8, num_machines=1))
    assert len(calls) == 1
    with pytest.raises(SystemExit, match=r"error: --num-machines is 2.*torchrun"):
        run_distributed(calls.append, argparse.Namespace(num_gpus=1, num_machines=2))


@pytest.fixture
def alone(monkeypatch):
    """Nothing in this process's environment says that a launcher has started it."""
    for name in ("LOCAL_RANK", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(signals, "install", lambda: None)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("SEED is -1."), "error: SEED is -1."),
        (FloatingPointError("Training diverged"), "error: Training diverged"),
        (RunFailed("The evaluation failed."), "error: The evaluation failed."),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            r"error: A process that reads images has died\. DataLoader worker \(pid 7\).*NUM_WORKERS",
        ),
    ],
)
def test_what_ends_a_run_is_told_in_one_line(alone, error, line):
    def fail(args):
        raise error

    with pytest.raises(SystemExit, match=line):
        run_distributed(fail, argparse.Namespace(num_gpus=0, num_machines=1))


class Broken(torch.utils.data.Dataset):
    """One image, which cannot be read."""

    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 1

    def __getitem__(self, index):
        try:
            raise OSError("ValueError: no header")
        except OSError as error:
            raise self.error from error


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (TooManyBroken("a.png: ValueError: no header.\nAnd b.png."), "a.png: ValueError: no header.\nAnd b.png."),
        (FileNotFoundError("a.png is gone"), "a.png is gone"),
        (MemoryError(), "There is not enough memory for the run: MemoryError. Lower SOLVER.IMS_PER_BATCH"),
    ],
)
def test_an_error_of_a_process_that_reads_images_is_told_without_its_trace(alone, error, line):
    def read(args):
        images = iter(torch.utils.data.DataLoader(Broken(error), num_workers=1))
        try:
            next(images)
        finally:
            images._shutdown_workers()  # as garbage in a cycle they would take five seconds

    with pytest.raises(SystemExit, match=rf"^error: {re.escape(line)}"):
        run_distributed(read, argparse.Namespace(num_gpus=0, num_machines=1))


@pytest.fixture
def two_gpus(alone, monkeypatch):
    """Detectron2's launcher starts two processes as on two GPUs, but on the CPU and apart from each other."""

    def launch(main, num_gpus, num_machines, machine_rank, dist_url, args):
        start_processes(_on_rank, args=(main, args), nprocs=num_gpus, start_method="fork")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(processes, "launch", launch)
    return argparse.Namespace(num_gpus=2, num_machines=1, machine_rank=0, dist_url="auto")


def _on_rank(rank, main, args):
    work, options = args
    main(work, argparse.Namespace(**vars(options), rank=rank))


def _mistaken(args):
    raise ValueError("SEED is -1.\nIt must be at least 0.")


def _mistaken_in_one(args):
    if args.rank == 0:
        time.sleep(60)
    sys.exit("error: DATASETS.TRAIN is empty.")


def _wrong(args):
    raise KeyError("a fault of the program")


def _killed(args):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("work", "line"),
    [
        (_mistaken, "error: SEED is -1.\nIt must be at least 0."),
        (_mistaken_in_one, "error: DATASETS.TRAIN is empty."),
        (_killed, r"error: process \d terminated with signal SIGKILL"),
    ],
)
def test_what_ends_one_of_several_processes_is_told_once(two_gpus, capfd, work, line):
    with pytest.raises(SystemExit, match=rf"^{line}$"):
        run_distributed(work, two_gpus)
    assert capfd.readouterr().err == ""


def test_an_error_of_the_program_in_one_of_several_processes_keeps_its_trace(two_gpus):
    with pytest.raises(ProcessRaisedException, match=r"(?s)in _wrong.*KeyError: 'a fault of the program'"):
        run_distributed(_wrong, two_gpus)


def test_an_error_of_the_program_keeps_its_trace(alone):
    def fail(args):
        raise RuntimeError("Connection closed by peer")  # of whom, where there is one process?

    with pytest.raises(RuntimeError, match="Connection closed"):
        run_distributed(fail, argparse.Namespace(num_gpus=0, num_machines=1))


def test_a_run_that_torchrun_starts_again_goes_on_in_the_folder_that_it_began(alone, tmp_path, monkeypatch):
    own, other, empty = str(tmp_path / "own"), tmp_path / "other", str(tmp_path / "empty")
    other.mkdir()
    (other / "model_0000001.pth").touch()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with claims():
        assert not goes_on(own, resume=False)
        take_folder(own)
        (tmp_path / "own" / "model_0000001.pth").touch()
        with pytest.raises(ValueError, match="--resume"):
            goes_on(own, resume=False)  # another torchrun's first attempt
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        assert goes_on(own, resume=False) and not goes_on(empty, resume=False)
        # What the first attempt was refused, the second one is not given.
        with pytest.raises(ValueError, match="--resume"):
            goes_on(str(other), resume=False)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried …"), None])
def test_a_lack_of_memory_ends_a_run_in_a_line_that_says_what_to_lower(alone, error):
    def main(args):
        if error is None:
            torch.empty(2**55)
        raise error

    with pytest.raises(SystemExit, match=r"^error: There is not enough memory for the run: .*IMS_PER_BATCH"):
        run_distributed(main, argparse.Namespace(num_gpus=0, num_machines=1))
