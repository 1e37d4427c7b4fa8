"""Signals that ask a command to end: SIGINT, SIGTERM and SIGUSR1, SLURM's warning before a job's time is up.

In training the first one is a request, which the loop answers at its next step by a checkpoint; anywhere else, and at
the second one, the process ends at once. Either way its exit status is 128 + the signal's number and it prints one
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
from collections.abc import Iterator
from contextlib import contextmanager

from detectron2.utils import comm

logger = logging.getLogger(__name__)

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# Seconds that a run has for its last checkpoint when its launcher is gone.
_WITHOUT_PARENT = 10.0
# A launcher passes on what a terminal or SLURM has sent to all processes already: one signal, that comes twice.
_TWICE = 1.0
_PR_SET_PDEATHSIG = 1


class Stopped(SystemExit):
    """Ends a run after its checkpoint, with exit status 128 + `number`, that of the signal that asked for it."""

    def __init__(self, number: int):
        super().__init__(128 + number)


class _State:
    installed = False
    # Whether a loop looks for requests, so that a signal is no order to end at once.
    awaited = False
    request = 0
    requested_at = 0.0
    # Of a process that a launcher has started, the launcher's number.
    parent = 0
    # Whether this process is such a launcher itself.
    passes_on = False
    # Whether the line that this process ends with is said.
    said = False


_state = _State()


def install() -> None:
    """Has this module look after the signals of this process; call it in the main thread."""
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
    if "TORCHELASTIC_RUN_ID" in os.environ or multiprocessing.parent_process():
        _state.parent = os.getppid()
        _end_with_parent(signal.SIGTERM)
    threading.Thread(target=_watch, args=(reader,), name="signals", daemon=True).start()


def requested() -> int:
    """Number of the signal that has asked this process to end; 0 if none has."""
    return _state.request


@contextmanager
def passed_on() -> Iterator[None]:
    """Within it signals go on to the processes that this one has started by multiprocessing."""
    _state.passes_on = True
    try:
        with awaited():
            yield
    finally:
        _state.passes_on = False


@contextmanager
def awaited(yes: bool = True) -> Iterator[None]:
    """Within it the first signal is a request, for a loop to answer; if not `yes`, it ends the process at once.

    Args:
        yes: False where a loop has a part that it need not save, as an evaluation.
    """
    before, _state.awaited = _state.awaited, yes
    try:
        if not yes and _state.request:
            end(_state.request)
        yield
    finally:
        _state.awaited = before


def stop(number: int, saved: str) -> None:
    """Raises Stopped, saying in the main process of a run that its checkpoint is saved."""
    if comm.is_main_process():
        _say(f"Stopped by {signal.Signals(number).name}. Saved {saved}: go on from it with --resume.")
    _state.said = True
    raise Stopped(number)


def end(number: int) -> None:
    """Ends this process at once, without a trace, saying in the main process of a run why."""
    if comm.is_main_process():
        _say(f"Ended at once by {signal.Signals(number).name}.")
    os._exit(128 + number)


def leave_to_parent(worker: int) -> None:
    """Has a data loader's worker leave signals to its parent: a `worker_init_fn`, or a part of one.

    A terminal and SLURM send them to all processes, and the parent still needs the images for the step that it is in.
    torch ends its workers when it is done with them; so that none stays that is stuck then, it ends itself in time.
    """

    def end_later(number: int, frame: object) -> None:
        signal.alarm(30)

    signal.signal(signal.SIGALRM, lambda number, frame: os._exit(0))
    signal.signal(signal.SIGTERM, end_later)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _watch(reader: int) -> None:
    while True:
        for number in os.read(reader, 64) if select.select([reader], [], [], 1.0)[0] else b"":
            if number in ENDING and not _orphaned():
                _take(number)
        if _orphaned():
            _end_as_orphan()


def _take(number: int) -> None:
    """Takes a signal: as a request, as the same one passed on, or as an order to end."""
    now = time.monotonic()
    if _state.parent and number == _state.request and now - _state.requested_at < _TWICE:
        return
    if _state.request or not _state.awaited:
        end(number)
    _state.request, _state.requested_at = number, now
    for child in multiprocessing.active_children() if _state.passes_on else ():
        os.kill(child.pid, number)
    name = signal.Signals(number).name
    logger.info("%s: the run ends after this step, with a checkpoint. A second signal ends it at once.", name)


def _orphaned() -> bool:
    return _state.parent and os.getppid() != _state.parent


def _end_as_orphan() -> None:
    """Gives the run a while for its last step and checkpoint, if it is in training."""
    if _state.awaited:
        _state.request = _state.request or signal.SIGTERM
        deadline = time.monotonic() + _WITHOUT_PARENT
        while _state.awaited and time.monotonic() < deadline:
            time.sleep(0.1)
    _say("Ended, since the process that started it is gone.")
    os._exit(128 + (_state.request or signal.SIGTERM))


def _become_a_child() -> None:
    """In a forked process, such as a data loader's worker: no thread reads signals there, and none may reach ours."""
    signal.set_wakeup_fd(-1)
    for number in ENDING:
        signal.signal(number, lambda number, frame: os._exit(128 + number))
    _end_with_parent(signal.SIGKILL)


def _end_with_parent(number: int) -> None:
    """Has Linux send this process a signal when its parent ends."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number))
        if os.getppid() != parent:  # It has gone meanwhile.
            os.kill(os.getpid(), number)


def _say(line: str) -> None:
    if not _state.said:
        os.write(2, f"{line}\n".encode())
