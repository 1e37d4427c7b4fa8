import os
import runpy
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

from karat_det.analysis import gpu_check

CHECK_GPU = str(Path(__file__).parents[2] / "tools" / "check_gpu.py")


def test_without_a_gpu_it_says_at_once_what_it_needs(tmp_path):
    start = time.monotonic()
    # The tests hide a GPU from what they start.
    done = subprocess.run([sys.executable, CHECK_GPU], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert time.monotonic() - start < 60  # 2 s where the machine has nothing else to do
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: this check needs an NVIDIA GPU with its driver, and a PyTorch built for CUDA."
    )
    assert f"PyTorch {torch.__version__} is" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not os.listdir(tmp_path)


@pytest.fixture
def check(monkeypatch, capsys, tmp_path):
    """Calls the command as on a machine with a GPU, which a stand-in checks."""
    called = []

    def run(*arguments, passed=True):
        def run_gpu_check(root, output_dir, seconds):
            called.append((root, output_dir, seconds))
            if output_dir.is_file():
                raise FileExistsError(f"File exists: {output_dir}")
            if passed is None:
                raise KeyboardInterrupt
            return "the report\n", passed

        # The real one would take over the signals of this process.
        monkeypatch.setitem(sys.modules, "early_signals", ModuleType("early_signals"))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(gpu_check, "run_gpu_check", run_gpu_check)
        monkeypatch.setattr(sys, "argv", [CHECK_GPU, *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(CHECK_GPU, run_name="__main__")
        captured = capsys.readouterr()
        return end.value.code, captured.out, captured.err, called

    return run


def test_the_status_tells_whether_a_row_failed(check, tmp_path):
    status, out, _, called = check("--output", str(tmp_path), "--seconds", "60")
    assert (status, called) == (0, [(Path(CHECK_GPU).parents[1], tmp_path, 60.0)])
    assert "\nthe report\n" in out
    assert str(tmp_path / "table.md") in out
    assert check(passed=False)[0] == 1
    assert "Interrupted. What was done by then is in output/check_gpu/table.md." in check(passed=None)[0]


def test_arguments_that_cannot_be_are_refused(check, tmp_path):
    status, _, err, called = check("--seconds", "0")
    assert (status, called) == (2, [])
    assert "--seconds is 0.0. It must be above 0." in err
    (tmp_path / "file").touch()
    status, _, err, _ = check("--output", str(tmp_path / "file"))
    assert status == 2
    assert f"--output {tmp_path / 'file'}: File exists" in err
