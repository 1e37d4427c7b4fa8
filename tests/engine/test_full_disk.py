"""A run on a disk that is full ends in one line. /dev/full is a file on such a disk."""

import errno
import logging
import os
import subprocess
import time
from pathlib import Path

import pytest
from detectron2.engine import TrainerBase
from detectron2.utils.events import JSONWriter
from forked_command import start_command

from karat_det.data.digits import generate_crops
from karat_det.engine.full_disk import Writers, _LogEnds, full_disk_named

ROOT = Path(__file__).parents[2]
needs_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")


@needs_full
def test_a_log_on_a_full_disk_ends_the_run_once(tmp_path):
    log = logging.getLogger("test of a full disk")
    log.setLevel(logging.INFO)
    log.propagate = False
    handler = logging.FileHandler("/dev/full")
    handler.handleError = _LogEnds(handler.stream, str(tmp_path))
    log.addHandler(handler)
    with pytest.raises(OSError, match=r"Cannot write /dev/full: No space left on device\. The disk has .* free"):
        log.info("one")
    log.info("two")
    handler.stream.close()  # has nothing left to write


@needs_full
def test_a_log_that_fails_while_a_run_ends_does_not_hide_why(tmp_path):
    log = logging.getLogger("test of another full disk")
    log.setLevel(logging.INFO)
    log.propagate = False
    handler = logging.FileHandler("/dev/full")
    handler.handleError = _LogEnds(handler.stream, str(tmp_path))
    log.addHandler(handler)
    with pytest.raises(ValueError, match="why"):
        try:
            raise ValueError("why")
        finally:
            log.info("at the end")


class Run(TrainerBase):
    def __init__(self, path, fails=False):
        super().__init__()
        self.fails = fails
        self.register_hooks([Writers([JSONWriter(path)], period=1)])

    def run_step(self):
        self.storage.put_scalar("loss", 1.0)
        if self.fails:
            raise FloatingPointError("why")


@needs_full
def test_metrics_on_a_full_disk_end_the_run_and_do_not_hide_what_has_ended_it(tmp_path):
    full = pytest.raises(OSError, match=rf"Cannot write {tmp_path}: No space left .* there is none")
    with full, full_disk_named(str(tmp_path)):
        Run("/dev/full").train(0, 2)
    with pytest.raises(FloatingPointError, match="why"):
        Run("/dev/full", fails=True).train(0, 2)


def test_other_errors_are_as_they_were(tmp_path):
    for error in (OSError(errno.EACCES, "Permission denied", "here"), RuntimeError("a bug"), OSError("Cannot save")):
        with pytest.raises(type(error)) as caught, full_disk_named(str(tmp_path)):
            raise error
        assert caught.value is error
    torchs = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 697280 vs 697168")
    for error in (torchs, OSError(errno.EDQUOT, "Disk quota exceeded")):
        with pytest.raises(OSError, match=f"Cannot write {tmp_path}"), full_disk_named(str(tmp_path)):
            raise error


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_run_whose_disk_fills_up_ends_in_one_line(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "karat_det_test", str(disk)]).returncode:
        pytest.skip("no disk can be mounted here")
    generate_crops(tmp_path, {"train": 60, "val": 51})
    command = ["pretrain_net", "--config-file", "configs/pretrain/digits.yaml", "--data", tmp_path, "--num-gpus", "0"]
    command += ["MODEL.EMBED_DIM", "24", "MODEL.DEPTH", "2", "SOLVER.EPOCHS", "1000", "SOLVER.IMS_PER_BATCH", "12"]
    command += ["DATALOADER.NUM_WORKERS", "0", "OUTPUT_DIR", disk / "out"]
    try:
        with open(tmp_path / "log", "w") as log, open(tmp_path / "errors", "w") as errors:
            run = start_command(*command, folder=ROOT, output=log, errors=errors)
            while not (disk / "out" / "last_checkpoint").exists() and run.poll() is None:
                time.sleep(0.1)
            with pytest.raises(OSError), open(disk / "fill", "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            assert run.wait(60) == 1
        checkpoints = {path.suffix for path in (disk / "out").iterdir() if path.name.startswith("model")}
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    error = (tmp_path / "errors").read_text()
    assert error.startswith("error: Cannot ") and str(disk) in error and error.count("\n") == 1, error
    assert "MiB" in error and "The last good checkpoint is" in error and "--resume" in error
    assert "Traceback" not in (tmp_path / "log").read_text() and checkpoints == {".pth"}
