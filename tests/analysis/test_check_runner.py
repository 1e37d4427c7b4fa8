import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from karat_det.analysis import check_runner
from karat_det.analysis.check_runner import FAIL, PASS, SKIPPED, Check, Row, Skip, ratio, rows_of, run_checks, table


def _pass(name):
    print("something that a library says")
    return [Row(f"{name}: time", "1 s", "≤ 2 s"), Row(f"{name}: memory", "1 MiB")]


def _raise(error):
    raise error


def _die():
    os.kill(os.getpid(), signal.SIGSEGV)


def _wait(pids):
    sleep = [sys.executable, "-c", "import time; time.sleep(100)"]
    Path(pids).write_text(f"{os.getpid()} {subprocess.Popen(sleep).pid}")
    time.sleep(100)


def _process_id(name):
    return [Row(name, str(os.getpid()))]


def is_running(pid):
    try:
        # A zombie is not: nobody may have asked for its status yet.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(autouse=True)
def forked(monkeypatch):
    """A fork has all imports done; here is no GPU that it could not use."""
    monkeypatch.setattr(check_runner, "_CONTEXT", multiprocessing.get_context("fork"))


def test_no_check_costs_more_than_its_own_row(tmp_path):
    pids = tmp_path / "pids"
    groups = {
        "first": [
            Check("skipped", _raise, {"error": Skip("needs 2 GPUs")}),
            Check("raises | badly", _raise, {"error": RuntimeError("first line\n  second | line")}),
            Check("dies", _die),
            Check("good", _pass, {"name": "good"}),
        ],
        "second": [Check("hangs", _wait, {"pids": str(pids)}), Check("after it", _pass, {"name": "after it"})],
    }
    (tmp_path / "first.log").write_text("of an earlier run")
    rows = list(run_checks(groups, tmp_path, seconds=600, patience=2.0))
    assert [(row.name, row.result) for row in rows] == [
        ("skipped", SKIPPED),
        ("raises | badly", FAIL),
        ("dies", FAIL),
        ("good: time", PASS),
        ("good: memory", PASS),
        ("hangs", FAIL),
        ("after it: time", PASS),
        ("after it: memory", PASS),
    ]
    assert rows[0].measured == "needs 2 GPUs"
    assert rows[1].measured == "RuntimeError: first line second | line (trace in raises_badly.txt)"
    assert "in _raise" in (tmp_path / "raises_badly.txt").read_text()
    assert rows[2].measured.startswith("its process was ended by SIGSEGV; first.log")
    assert rows[5].measured.startswith("no end after 2 s; second.log")
    assert not any(is_running(pid) for pid in pids.read_text().split())
    log = (tmp_path / "first.log").read_text()
    assert "something that a library says" in log
    assert "Segmentation fault" in log
    assert "an earlier run" not in log


def test_what_the_time_does_not_suffice_for_is_left_out_by_name(tmp_path):
    pids = tmp_path / "pids"
    groups = {
        "first": [Check("good", _pass, {"name": "good"}), Check("long", _wait, {"pids": str(pids)})],
        "second": [Check("late", _pass, {"name": "late"})],
    }
    rows = list(run_checks(groups, tmp_path, seconds=2.0))
    assert [(row.name, row.result) for row in rows[2:]] == [("long", SKIPPED), ("late", SKIPPED)]
    assert "the time was over" in rows[2].measured
    assert rows[3].measured == "left out: the time, 2 s, was over"
    assert not any(is_running(pid) for pid in pids.read_text().split())


def test_a_process_whose_gpu_is_broken_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(check_runner, "_frees_memory", lambda: False)
    groups = {"group": [Check(name, _process_id, {"name": name}) for name in "abc"]}
    rows = list(run_checks(groups, tmp_path))
    assert [row.name for row in rows] == ["a", "b", "c"]
    assert len({row.measured for row in rows}) == 3


def test_too_little_memory_is_no_failure(tmp_path):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. " + 100 * "More words. ")
    (row,) = rows_of(Check("large", _raise, {"error": error}), tmp_path)
    assert row.result == SKIPPED
    assert "Tried to allocate 2.00 GiB." in row.measured
    assert len(row.measured) < 400


def test_the_table_has_one_line_a_row_and_counts_them():
    rows = [Row("a | b", "first\nsecond", "≤ 1"), Row("c", "x", result=FAIL), Row("d", "why", result=SKIPPED)]
    lines = table(rows).splitlines()
    assert [cell.strip() for cell in lines[2].split(" | ")] == ["| a \\| b", "first second", "≤ 1", "pass     |"]
    assert "**fail**" in lines[3]
    assert lines[-1] == "3 rows: 1 pass, 1 **fail**, 1 skipped."


def test_a_ratio_shows_both():
    assert ratio(0.005, 0.004, 1e-3) == "1.25 × (5 : 4)"
    assert ratio(3 * 2**30, 2**30, 2**20) == "3.00 × (3,072 : 1,024)"
