import inspect
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from karat_det.analysis import gpu_check
from karat_det.analysis.benchmark_attention import AttentionShape
from karat_det.analysis.check_runner import FAIL, PASS, SKIPPED, Check, Row, rows_of
from karat_det.analysis.gpu_attention import (
    LEARNED_BIAS,
    MASK,
    NO_BIAS,
    REL_POS,
    AttentionCase,
    check_attention,
    check_times,
)
from karat_det.analysis.gpu_check import describe_machine, gpu_checks, make_report, run_gpu_check
from karat_det.analysis.measuring import Turns

ROOT = Path(__file__).parents[2]


def test_the_plan_has_all_that_is_promised(tmp_path):
    groups = gpu_checks(ROOT, tmp_path)
    checks = [check for group in groups.values() for check in group]
    assert len({check.name for check in checks}) == len(checks)
    assert pickle.loads(pickle.dumps(groups)) == groups
    for check in checks:
        inspect.signature(check.function).bind(**check.arguments)

    cases = {check.arguments["case"] for check in groups["errors"][1:]}
    for num_tokens in (49, 196, 1024, 4096):
        for grid_size in (1, 3):
            for dtype in (torch.float32, torch.bfloat16):
                for scores in (NO_BIAS, MASK, REL_POS, LEARNED_BIAS):
                    (case,) = (
                        c
                        for c in cases
                        if (c.num_tokens, c.grid_size) == (num_tokens, grid_size)
                        and (c.dtype, c.scores) == (dtype, scores)
                    )
                    assert (case.head_dim, case.rank) == (64, 12)
    assert len(cases) == 64
    shapes = {
        (c.arguments["shape"].num_tokens, c.arguments["shape"].bias, c.arguments["dtype"]) for c in groups["times"]
    }
    assert len(shapes) == 4 * 2 * 2
    assert [check.arguments["config_file"].name for check in groups["training"]] == [
        "vitdet_karat.yaml",
        "vitdet_b_1024_karat.yaml",
    ]
    assert all(path.is_file() for path in (check.arguments["config_file"] for check in groups["training"]))


def test_the_report_names_the_machine_and_every_row():
    rows = [Row("machine", "one GPU, commit abc"), Row("a", "1", "≤ 2"), Row("b", "why", result=SKIPPED)]
    report = make_report(rows)
    assert report.startswith("GPU check of karat_det on one GPU, commit abc.\n\n| check")
    assert "| a " in report
    assert "2 rows: 1 pass, 0 **fail**, 1 skipped." in report
    failed = make_report([Row("machine", "RuntimeError: CUDA", result=FAIL), *rows[1:]])
    assert failed.startswith("GPU check of karat_det on a machine that could not be described.")
    assert "| machine " in failed


def test_the_machine_is_described_with_and_without_a_gpu(monkeypatch, tmp_path):
    (row,) = describe_machine(ROOT)
    assert row.measured.startswith(f"no GPU, PyTorch {torch.__version__}, ")
    assert ", commit " in row.measured

    nvidia_smi = tmp_path / "nvidia-smi"
    nvidia_smi.write_text("#!/bin/sh\necho 550.54.15\necho 550.54.15\n")
    nvidia_smi.chmod(0o755)
    found = SimpleNamespace(name="NVIDIA X", total_memory=24 * 2**30, major=8, minor=6)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setenv("PATH", str(tmp_path))
    gpu = "NVIDIA X (the first of 2), 24.0 GiB, compute capability 8.6, driver "
    assert describe_machine(ROOT)[0].measured.startswith(f"{gpu}550.54.15, PyTorch ")
    nvidia_smi.write_text("#!/bin/sh\nexit 9\n")
    assert f"{gpu}unknown (nvidia-smi failed)" in describe_machine(ROOT)[0].measured
    nvidia_smi.unlink()
    assert f"{gpu}unknown (there is no nvidia-smi)" in describe_machine(ROOT)[0].measured


def small_checks(root, output_dir, device):
    case = AttentionCase((2, 3), 1, torch.float32, MASK, head_dim=16, rank=4)
    shape = AttentionShape(2, 2, (2, 3), 8, 4)
    times = {"device": device, "shape": shape, "dtype": torch.bfloat16, "turns": Turns(repeats=1, device=device)}
    return {
        "errors": [
            Check("machine", describe_machine, {"root": root}),
            Check("errors", check_attention, {"device": device, "case": case}),
            Check("times", check_times, times),
            Check("wrong", check_times, {**times, "dtype": "text"}),
        ]
    }


def test_a_check_prints_as_it_goes_and_writes_its_table(tmp_path, monkeypatch, capsys):
    """In processes that are spawned, as on a GPU."""
    monkeypatch.setattr(gpu_check, "gpu_checks", small_checks)
    report, passed = run_gpu_check(ROOT, tmp_path / "new" / "folder", device="cpu", seconds=300)
    assert not passed
    assert (tmp_path / "new" / "folder" / "table.md").read_text() == report
    assert report.startswith("GPU check of karat_det on no GPU, PyTorch ")
    assert "5 rows: 3 pass, 1 **fail**, 1 skipped." in report
    printed = capsys.readouterr().out
    assert " s: skipped: errors: N = 6, G = 1, float32, mask: plain PyTorch" in printed
    assert " s: **fail**: wrong: TypeError" in printed
    names = {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    assert names == {"table.md", "errors.log", "wrong.txt"}

    report, passed = run_gpu_check(ROOT, tmp_path, device="cpu", seconds=1e-9)
    assert passed
    assert "4 rows: 0 pass, 0 **fail**, 4 skipped." in report


@pytest.mark.gpu
@pytest.mark.parametrize("group", ["errors", "training", "processes", "compile", "times"])
def test_the_check_passes_on_this_gpu(tmp_path, group):
    checks = gpu_checks(ROOT, tmp_path)[group]
    if group == "errors":
        checks = [check for check in checks[1:] if check.arguments["case"].num_tokens <= 1024]
    rows = [row for check in checks for row in rows_of(check, tmp_path)]
    assert rows
    assert not [row for row in rows if row.result not in (PASS, SKIPPED)]


@pytest.mark.gpu(2)
def test_the_check_trains_on_two_gpus(tmp_path):
    (check,) = (check for check in gpu_checks(ROOT, tmp_path)["processes"] if check.name == "2 processes")
    assert [row.result for row in rows_of(check, tmp_path)] == [PASS, PASS]
