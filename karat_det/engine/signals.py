"""Signals that ask a command to end: SIGINT, SIGTERM and SIGUSR1, SLURM's warning before a job's time is up.

In training the first one is a request, which the loop answers at its next step with a checkpoint. Elsewhere, and at the
second one, the process ends at once. Either way its exit status is 128 + the signal's number and it prints one
line. A thread reads the signals, since Python's own handlers must wait for a long call of C++, such as a backward pass.

Processes that a launcher has started end when it is gone, and so do those that they start themselves.
"""

import ctypes
import logging
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from detectron2.utils import comm
from torch.utils.data import DataLoader

logger = logging.getLogger(__name__)

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# Environment variable of a process that must end when its launcher is gone.
LAUNCHED = "KARAT_DET_LAUNCHED"
# Seconds for a run's last checkpoint when its launcher is gone.
_WITHOUT_PARENT = 10.0
# A launcher passes on a signal that a terminal or SLURM has sent to all processes already, so that it comes twice. The
# command `timeout` sends its signal twice within a millisecond, to its child and to the child's group.
_TWICE = 1.0
_TWICE_WITHOUT_LAUNCHER = 0.1
_PR_SET_PDEATHSIG = 1


class Stopped(SystemExit):
    """Ends a run after its checkpoint, with exit status 128 + `number`, the signal's."""

    def __init__(self, number: int):
        super().__init__(128 + number)


class _State:
    installed = False
    # Whether a loop looks for requests, so that a signal does not end the process at once.
    awaited = False
    request = 0
    requested_at = 0.0
    # The launcher's process number, in a process that a launcher has started.
    parent = 0
    # Whether this process is such a launcher itself.
    passes_on = False
    # Whether this process has printed its last line.
    said = False
    # torch's handler of SIGCHLD, once there is one, and whether it is due.
    child_handler: Callable[[int, Any], None] | None = None
    child_ended = False
    images_awaited = False


_state = _State()


def install() -> None:
    """Installs the handling of signals in this process; call it in the main thread."""
    if _state.installed:
        return
    _state.installed = True
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    for number in ENDING:
        # Only so that Python writes the number to the pipe, and the system does not end the process.
        signal.signal(number, lambda number, frame: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_become_a_child)
    if {"TORCHELASTIC_RUN_ID", LAUNCHED} & os.environ.keys() or multiprocessing.parent_process():
        _state.parent = os.getppid()
        _end_with_parent(signal.SIGTERM)
    threading.Thread(target=_watch, args=(reader,), name="signals", daemon=True).start()


def requested() -> int:
    """Number of the signal that has asked this process to end; 0 if none has."""
    return _state.request


@contextmanager
def passed_on() -> Iterator[None]:
    """A context in which signals are passed on to processes that this one has started by multiprocessing."""
    _state.passes_on = True
    try:
        with awaited():
            yield
    finally:
        _state.passes_on = False


@contextmanager
def awaited(yes: bool = True) -> Iterator[None]:
    """A context in which the first signal is a request to a loop; if not `yes`, it ends the process at once.

    Args:
        yes: False for a part of a loop without results to save, such as an evaluation.
    """
    before, _state.awaited = _state.awaited, yes
    try:
        if not yes and _state.request:
            end(_state.request)
        yield
    finally:
        _state.awaited = before


@contextmanager
def images_awaited() -> Iterator[None]:
    """A context in which the death of a process that reads images is an error at once; in the rest of a step it waits.

    torch raises that error anywhere, even in the midst of an update; here the run can still be saved.
    """
    _state.images_awaited = True
    try:
        if _state.child_ended:
            _state.child_ended = False
            _state.child_handler(signal.SIGCHLD, None)
        yield
    finally:
        _state.images_awaited = False
        handler = signal.getsignal(signal.SIGCHLD)
        is_torchs = callable(handler) and handler is not _child_ended
        if is_torchs and threading.current_thread() is threading.main_thread():
            _state.child_handler = handler
            signal.signal(signal.SIGCHLD, _child_ended)


def _child_ended(number: int, frame: Any) -> None:
    if _state.awaited and not _state.images_awaited:
        _state.child_ended = True
    else:
        _state.child_handler(number, frame)


def stop(number: int, saved: str) -> None:
    """Raises Stopped, after a line in the main process of a run that its checkpoint is saved."""
    if comm.is_main_process():
        _say(f"Stopped by {signal.Signals(number).name}. Saved {saved}: go on from it with --resume.")
    _state.said = True
    raise Stopped(number)


def end(number: int) -> None:
    """Ends this process at once, without a trace, after a line with the reason in the main process of a run."""
    if comm.is_main_process():
        _say(f"Ended at once by {signal.Signals(number).name}.")
    os._exit(128 + number)


def leave_to_parent(loader: Any) -> Any:
    """Makes the workers of a data loader leave signals to their parent. Returns the loader.

    A terminal and SLURM send them to all processes, and the parent still needs the images for the step that it is in.

    Args:
        loader: torch's, or a wrapper with torch's as `loader` or `dataset`.
    """
    inner = loader
    while not isinstance(inner, DataLoader):
        inner = inner.loader if hasattr(inner, "loader") else inner.dataset
    inner.worker_init_fn = partial(_start_worker, inner.worker_init_fn)
    return loader


def _start_worker(before: Callable[[int], None] | None, worker: int) -> None:
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_for_parent, name="signals", daemon=True).start()
    if before:
        before(worker)


def _end_for_parent() -> None:
    """Ends this process at its parent's SIGTERM, and at no one else's."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _watch(reader: int) -> None:
    while True:
        numbers = os.read(reader, 64) if select.select([reader], [], [], 1.0)[0] else b""
        numbers = [number for number in numbers if number in ENDING]
        if _state.parent and os.getppid() != _state.parent:
            _end_as_orphan(*numbers)
        for number in numbers:
            _take(number)


def _take(number: int) -> None:
    """Handles a signal: a request, the same one passed on, or an order to end."""
    now, twice = time.monotonic(), _TWICE if _state.parent else _TWICE_WITHOUT_LAUNCHER
    if number == _state.request and now - _state.requested_at < twice:
        return
    if _state.request or not _state.awaited:
        end(number)
    _state.request, _state.requested_at = number, now
    for child in multiprocessing.active_children() if _state.passes_on else ():
        os.kill(child.pid, number)
    name = signal.Signals(number).name
    logger.info("%s: the run ends after this step, with a checkpoint. A second signal ends it at once.", name)


def _end_as_orphan(number: int = signal.SIGTERM, *later: int) -> None:
    """Ends this process, whose launcher is gone; in training after some time for the step and a checkpoint."""
    _state.request = _state.request or number
    if _state.awaited:
        time.sleep(_WITHOUT_PARENT)
    _say("Ended, since the process that started this one is gone.")
    os._exit(128 + _state.request)


def _become_a_child() -> None:
    """In a forked process, such as a data loader's worker: no thread reads signals there, and none may reach ours."""
    signal.set_wakeup_fd(-1)
    for number in ENDING:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
    _end_with_parent(signal.SIGKILL)


def _end_with_parent(number: int) -> None:
    """Makes Linux send this process a signal when its parent ends."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number))
        if os.getppid() != parent:  # it is gone already
            os.kill(os.getpid(), number)


def _say(line: str) -> None:
    if not _state.said:
        os.write(2, f"{line}\n".encode())
