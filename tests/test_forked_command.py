"""Commands run in a fork of the tests' process."""

import multiprocessing
import multiprocessing.util
import time

from forked_command import run_command


def test_the_tests_own_children_are_left_alone(tmp_path):
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
    child.start()
    try:
        done = run_command("convert_weights", "--help", folder=tmp_path)
        assert done.returncode == 0 and done.stdout.startswith("usage: convert_weights.py") and not done.stderr
        assert child.is_alive()
    finally:
        child.kill()
        child.join()


def test_whatever_fails_ends_the_child_alone(tmp_path, monkeypatch):
    """It would go on as a second run of the tests."""
    monkeypatch.setattr(multiprocessing.util, "_exit_function", lambda: 1 / 0)
    done = run_command("convert_weights", "--help", folder=tmp_path)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr
