"""Ends a run at the first write to a full disk, with a line that names a path and the room that is needed."""

import errno
import logging
import os
import re
import sys
import threading
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.engine.hooks import PeriodicWriter
from detectron2.utils import comm
from detectron2.utils.events import JSONWriter
from detectron2.utils.logger import setup_logger

from ..checkpoint.run_folder import say_last_good, say_room, write_whole

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# torch.save's messages, which omit the reason.
_TORCH = re.compile("PytorchStreamWriter|unexpected pos|file write failed")


@contextmanager
def full_disk_named(folder: str) -> Iterator[None]:
    """A context that turns errors by a full disk into an OSError with a path and the room that is needed.

    Args:
        folder: the run's, for errors that name no file.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not is_full(error):
            raise
        raise _full(getattr(error, "filename", None) or folder, folder, error) from error


def is_full(error: BaseException) -> bool:
    """Whether an error says that a disk, or a share of it, is full."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    return isinstance(error, RuntimeError) and bool(_TORCH.search(str(error)))


def start_log(cfg: CfgNode, args: Namespace) -> None:
    """Starts the log of a run in OUTPUT_DIR, and writes its config.yaml, as Detectron2's `default_setup` does.

    With --eval-only the config.yaml of a run that is there stays.

    Args:
        cfg, args: as for `default_setup`.

    Raises:
        OSError: the disk is full. Later it is the log that raises it.
    """
    config = Path(cfg.OUTPUT_DIR, "config.yaml")
    keeps = args.eval_only and comm.is_main_process() and config.is_file()
    of_run = config.read_bytes() if keeps else b""
    with full_disk_named(cfg.OUTPUT_DIR):
        default_setup(cfg, args)
        if keeps:
            write_whole(config, lambda path: Path(path).write_bytes(of_run))
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="karat_det")
    for name in ("karat_det", "detectron2", "fvcore"):
        for handler in logging.getLogger(name).handlers:
            path = getattr(getattr(handler, "stream", None), "name", "")
            if isinstance(path, str) and path.startswith(cfg.OUTPUT_DIR):
                handler.handleError = _LogEnds(handler.stream, cfg.OUTPUT_DIR)
    threading.excepthook = _tell_of_thread


class _LogEnds:
    """A log handler's reaction to a failed write: ends the log, and the run unless it is ending already."""

    def __init__(self, stream: IO[str], folder: str):
        self.stream = stream
        self.folder = folder

    def __call__(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        _forsake(self.stream)
        if isinstance(error, OSError) and error.__context__ is None:
            raise _full(self.stream.name, self.folder, error) from error


class Writers(PeriodicWriter):
    """Detectron2's, but a failed write at the end of a run does not hide why the run ends."""

    def after_train(self) -> None:
        ends_by, failure = sys.exc_info()[1], None
        for writer in self._writers:
            try:
                writer.write()
                writer.close()
            except OSError as error:
                failure = failure or error
                if isinstance(writer, JSONWriter):
                    _forsake(writer._file_handle)
        if failure and not ends_by:
            raise failure


def _full(path: str, folder: str, error: Exception) -> OSError:
    reason = getattr(error, "strerror", None) or "No space left on device"
    return OSError(f"Cannot write {path}: {reason}. {say_room(folder)} {say_last_good(folder)} Go on with --resume.")


def _forsake(stream: IO[str]) -> None:
    """Empties the buffer of a file that cannot be written, which Python would try to write at its end."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _tell_of_thread(args: threading.ExceptHookArgs) -> None:
    """Reports what has ended a thread, except a full disk, which TensorBoard's writer raises again."""
    if not is_full(args.exc_value):
        threading.__excepthook__(args)
