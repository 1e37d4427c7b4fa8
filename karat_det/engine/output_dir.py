"""Protects a run's folder: earlier checkpoints are not overwritten, and no other run writes into it."""

import contextlib
import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from detectron2.utils import comm

from ..checkpoint.run_folder import write_whole

logger = logging.getLogger(__name__)

_LOCK = ".lock"
_CONFIG = "config.yaml"
# Descriptors of the locks that this process holds, by folder.
_held: dict[str, int] = {}
# Content of the config.yaml that was there before, by folder, until the run begins.
_config_before: dict[str, bytes] = {}


def check_output_dir(output_dir: str) -> None:
    """Raises ValueError if a folder already holds checkpoints, which a new run would overwrite."""
    if not os.path.isdir(output_dir):
        return
    checkpoints = sorted(name for name in os.listdir(output_dir) if name.endswith(".pth") or name == "last_checkpoint")
    if checkpoints:
        raise ValueError(
            f"OUTPUT_DIR is {output_dir!r}, which holds a run's checkpoints ({', '.join(checkpoints[:3])}"
            f"{', …' if len(checkpoints) > 3 else ''}). Add --resume to go on with that run, or name another "
            "OUTPUT_DIR."
        )


@contextlib.contextmanager
def claims() -> Iterator[None]:
    """A context, or decorator, that releases at its end what `claim` has claimed.

    If the run was refused before it began, the earlier run's config.yaml is restored.
    """
    try:
        yield
    finally:
        for folder, content in _config_before.items():
            write_whole(Path(folder, _CONFIG), lambda path, content=content: Path(path).write_bytes(content))
        _config_before.clear()
        while _held:
            os.close(_held.popitem()[1])


def claim(output_dir: str, patience: float = 0.0) -> None:
    """Makes the folder of a run, and locks it against other runs until `claims` ends or the process dies.

    All processes of a run call it; the main one holds the lock for them.

    Args:
        output_dir: the folder.
        patience: seconds to wait for a run that is ending.

    Raises:
        ValueError: another run has the folder, or it cannot be written to.
    """
    refusal = ""
    if comm.is_main_process() and output_dir not in _held:
        try:
            refusal = _lock(output_dir, time.monotonic() + patience)
        except OSError as error:
            refusal = f"OUTPUT_DIR is {output_dir!r}, which cannot be written to: {error}."
    if refusal := comm.all_gather(refusal)[0]:
        raise ValueError(refusal)


def begin(output_dir: str) -> None:
    """Keeps the config.yaml of a run that was not refused."""
    _config_before.pop(output_dir, None)


def _lock(output_dir: str, deadline: float) -> str:
    """Locks a folder. Returns why it cannot be, or "" if it is."""
    os.makedirs(output_dir, exist_ok=True)
    # The file stays after the run: if it were removed, two runs could each hold a lock of that name.
    descriptor = os.open(os.path.join(output_dir, _LOCK), os.O_RDWR | os.O_CREAT, 0o666)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
                    return (
                        f"OUTPUT_DIR is {output_dir!r}, into which another run writes just now ({holder}). Wait for "
                        "its end, or name another OUTPUT_DIR."
                    )
                time.sleep(0.2)
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
                    raise
                logger.warning("The file system of %s has no locks: nothing keeps other runs out of it.", output_dir)
                break
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        _held[output_dir], descriptor = descriptor, -1
        with contextlib.suppress(FileNotFoundError):
            _config_before[output_dir] = Path(output_dir, _CONFIG).read_bytes()
        return ""
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def _leave_to_parent() -> None:
    """Closes the locks in a forked process, such as a loader's, which must not hold them when its parent is gone."""
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()
    _config_before.clear()


os.register_at_fork(after_in_child=_leave_to_parent)
