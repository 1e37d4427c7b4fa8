"""Which tests see the machine's GPUs, on machines that only a stand-in for torch claims to be."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import os, subprocess, sys
import pytest, torch

COUNT = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]

def test_unmarked():
    assert torch.cuda.device_count() == 0
    assert subprocess.check_output(COUNT) == b"0\\n"

@pytest.mark.gpu
def test_one(tmp_path):
    assert torch.cuda.device_count() == int(os.environ["FAKE_GPUS"])
    assert subprocess.check_output(COUNT) == os.environ["FAKE_GPUS"].encode() + b"\\n"

@pytest.mark.gpu(2)
@pytest.mark.parametrize("word", ["a b"])
def test_two(word):
    os._exit(3)  # as an illegal address may end it
"""
TORCH = """
import os

def set_num_threads(count): pass

class cuda:
    def device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        return int(os.environ["FAKE_GPUS"]) if visible is None else len([x for x in visible.split(",") if x])
"""


@pytest.mark.parametrize(
    "gpus, visible, expected",
    [
        (1, None, {"test_unmarked": "PASSED", "test_one": "PASSED", "test_two[a b]": "SKIPPED"}),
        (2, "3,5", {"test_unmarked": "PASSED", "test_one": "PASSED", "test_two[a b]": "FAILED"}),
    ],
)
def test_marked_tests_alone_see_gpus_each_in_a_process_of_its_own(tmp_path, gpus, visible, expected):
    for name in ("tests/conftest.py", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(Path(__file__).parents[1] / name, tmp_path / name)
    (tmp_path / "tests" / "test_it.py").write_text(TESTS)
    (tmp_path / "torch.py").write_text(TORCH)
    (tmp_path / "karat_det").mkdir()
    (tmp_path / "karat_det" / "quiet.py").write_text("")
    ours = ("CUDA_VISIBLE_DEVICES", "PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER")
    environment = {key: x for key, x in os.environ.items() if key not in ours and not key.startswith("KARAT_TEST_")}
    environment |= {"PYTHONPATH": str(tmp_path), "FAKE_GPUS": str(gpus), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    if visible is not None:
        environment["CUDA_VISIBLE_DEVICES"] = visible
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    results = dict(re.findall(r"test_it.py::(.+?) (PASSED|SKIPPED|FAILED)", done.stdout))
    assert results == expected, done.stdout + done.stderr
    if gpus < 2:
        assert "test_two[a b] needs 2 GPUs, and PyTorch finds 1 on this machine" in done.stdout
