"""Runs groups of checks, each group in its own process and all within a time limit, and makes one table of their rows.

A check that fails affects only its own row. An exception becomes the row, its trace a file. A process that dies, for
example of an illegal address on the GPU, or is silent for too long, is replaced by one that goes on after the check
that it was at. Checks that the time did not suffice for are in the table by name.
"""

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import re
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

PASS, FAIL, SKIPPED = "pass", "**fail**", "skipped"
# The goal of a measurement without one.
FOR_THE_RECORD = "for the record"
_LONGEST_MESSAGE = 300
# A fork of a process that has used CUDA cannot use it.
_CONTEXT = multiprocessing.get_context("spawn")


class Skip(Exception):
    """A check cannot be made on this machine; the message says why."""


@dataclass(frozen=True)
class Row:
    """One row of the table: its name, the figures, their goal, and PASS, FAIL or SKIPPED."""

    name: str
    measured: str
    goal: str = ""
    result: str = PASS


@dataclass(frozen=True)
class Check:
    """One check.

    Args:
        name: its row's, or the check's if it has several rows; unique.
        function: a module's, since another process calls it. It returns its rows, or raises Skip.
        arguments: by name.
    """

    name: str
    function: Callable[..., Iterable[Row]]
    arguments: Mapping[str, Any] = field(default_factory=dict)


def run_checks(
    groups: Mapping[str, Sequence[Check]], output_dir: str | Path, seconds: float = 570.0, patience: float = 240.0
) -> Iterator[Row]:
    """Yields the rows of all checks, in their order.

    Args:
        groups: checks by the name of their group; the output of a group's process goes to `<group>.log`.
        output_dir: an existing folder, for these logs and for the trace of each check that raised an exception.
        seconds: time for all checks; those that have not ended by then are skipped.
        patience: seconds for one check.
    """
    end = time.monotonic() + seconds
    for group, checks in groups.items():
        left = deque(checks)
        (Path(output_dir) / f"{group}.log").unlink(missing_ok=True)  # an earlier run's
        while left:
            if time.monotonic() >= end:
                yield Row(left.popleft().name, f"left out: the time, {seconds:g} s, was over", result=SKIPPED)
            else:
                yield from _run_until_it_breaks(group, left, Path(output_dir), end, patience)


def _run_until_it_breaks(
    group: str, left: deque[Check], output_dir: Path, end: float, patience: float
) -> Iterator[Row]:
    """Runs checks in one new process and removes them from `left`, until none is left or the process is gone."""
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_work, args=(list(left), group, str(output_dir), sender))
    process.start()
    sender.close()
    try:
        while left:
            start = time.monotonic()
            if not receiver.poll(max(0.0, min(patience, end - start))):
                name, taken = left.popleft().name, f"{time.monotonic() - start:.0f} s"
                if time.monotonic() < end:
                    yield Row(name, f"no end after {taken}; {group}.log may say more", f"≤ {patience:g} s", FAIL)
                else:
                    yield Row(name, f"left out: the time was over, {taken} after its start", result=SKIPPED)
                return
            try:
                rows, goes_on = receiver.recv()
            except EOFError:
                process.join(10)
                yield Row(left.popleft().name, f"{_end_of(process.exitcode)}; {group}.log may say more", result=FAIL)
                return
            left.popleft()
            yield from rows
            if not goes_on:
                return
        process.join(10)
    finally:
        receiver.close()
        _end_with_children(process)


def _end_of(status: int | None) -> str:
    if status is not None and status < 0:
        with contextlib.suppress(ValueError):
            return f"its process was ended by {signal.Signals(-status).name}"
    return f"its process ended with status {status}"


def _end_with_children(process: multiprocessing.process.BaseProcess) -> None:
    """Ends a process of `_work` and its child processes."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()  # it may not lead a group yet
    process.join(10)


def _work(checks: Sequence[Check], group: str, output_dir: str, sender: Connection) -> None:
    """Makes checks one by one in this process, and sends their rows."""
    os.setsid()  # so that all that a check starts can be ended with it
    log = open(Path(output_dir) / f"{group}.log", "a", buffering=1, encoding="utf-8")  # noqa: SIM115  to the very end
    for descriptor in (1, 2):  # of libraries, and of the processes that a check starts
        os.dup2(log.fileno(), descriptor)
    sys.stdout = sys.stderr = log
    faulthandler.enable(log)
    for check in checks:
        print(f"--- {check.name}")
        rows = rows_of(check, output_dir)
        for row in rows:
            print(f"{row.result}: {row.name}: {row.measured}")
        goes_on = _frees_memory()
        sender.send((rows, goes_on))
        if not goes_on:
            return


def rows_of(check: Check, output_dir: str | Path) -> list[Row]:
    """Makes one check in this process. An exception becomes a row; its trace is written to `output_dir`."""
    try:
        return list(check.function(**check.arguments))
    except Skip as reason:
        return [Row(check.name, str(reason), result=SKIPPED)]
    except torch.OutOfMemoryError as error:
        return [Row(check.name, f"needs more memory than there is: {_shortened(str(error))}", result=SKIPPED)]
    except Exception as error:
        path = Path(output_dir) / (re.sub(r"\W+", "_", check.name).strip("_") + ".txt")
        path.write_text(traceback.format_exc(), encoding="utf-8")
        message = _shortened(f"{type(error).__name__}: {error}")
        return [Row(check.name, f"{message} (trace in {path.name})", result=FAIL)]


def _shortened(message: str) -> str:
    message = " ".join(message.split())
    return message if len(message) <= _LONGEST_MESSAGE else message[:_LONGEST_MESSAGE] + " …"


def _frees_memory() -> bool:
    """Frees the GPU's unused memory; returns False if CUDA is broken, as it then is until the process ends."""
    gc.collect()
    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        print(f"CUDA does not work any more: {error}")
        return False
    return True


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table, and a line that counts them."""
    cells = [[_cell(text) for text in (row.name, row.measured, row.goal, row.result)] for row in rows]
    counts = [f"{sum(row.result == result for row in rows)} {result}" for result in (PASS, FAIL, SKIPPED)]
    lines = tabulate(cells, ("check", "measured", "goal", "result"), tablefmt="github", disable_numparse=True)
    return f"{lines}\n\n{len(rows)} rows: {', '.join(counts)}.\n"


def ratio(value: float, reference: float, unit: float) -> str:
    """The ratio and both values in a unit, for example "1.25 × (5 : 4)"."""
    return f"{value / reference:.2f} × ({value / unit:,.4g} : {reference / unit:,.4g})"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
