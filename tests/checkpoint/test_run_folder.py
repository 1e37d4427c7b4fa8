import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from karat_det.checkpoint.loading import SafeCheckpointer
from karat_det.checkpoint.run_folder import (
    checkpoints,
    clear_partial,
    end_metrics,
    first_not_finite,
    keep_last,
    read_metrics,
)


class Run:
    """What a trainer is to a checkpointer: it has a state."""

    def __init__(self):
        self.iteration = -1

    def state_dict(self):
        return {"iteration": self.iteration}

    def load_state_dict(self, state):
        self.iteration = state["iteration"]


def make_run(folder):
    return SafeCheckpointer(nn.Linear(2, 2), str(folder), trainer=Run())


def save(checkpointer, *iterations, name="model_{:07d}"):
    for iteration in iterations:
        checkpointer.checkpointables["trainer"].iteration = iteration
        checkpointer.save(name.format(iteration))
        # The order in time, on file systems whose clock is coarse too.
        os.utime(f"{checkpointer.save_dir}/{name.format(iteration)}.pth", (1e9 + iteration,) * 2)


def resume(folder):
    checkpointer = make_run(folder)
    checkpointer.resume_or_load("", resume=True)
    return checkpointer.checkpointables["trainer"].iteration


BROKEN = {
    "truncated": lambda content: content[: len(content) // 2],
    "one byte short": lambda content: content[:-1],
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "zeros at the end": lambda content: content[: len(content) // 2] + bytes(len(content) - len(content) // 2),
    "text": lambda content: b"model_0000002.pth",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_where_the_last_checkpoint_cannot_be_read_the_run_goes_on_from_the_one_before(tmp_path, caplog, kind):
    save(make_run(tmp_path), 0, 1, 2)
    (tmp_path / "weights.pth").write_bytes(b"")  # of no run
    last = tmp_path / "model_0000002.pth"
    last.write_bytes(BROKEN[kind](last.read_bytes()))
    assert resume(tmp_path) == 1
    assert "model_0000001.pth, the one before" in caplog.text and str(last) in caplog.text


def test_a_run_whose_last_checkpoint_is_gone_or_not_named_goes_on(tmp_path, caplog):
    save(make_run(tmp_path), 0, 1)
    os.remove(tmp_path / "model_0000001.pth")
    assert resume(tmp_path) == 0
    for torn in (lambda path: path.write_bytes(b""), lambda path: path.write_bytes(bytes(9)), os.remove):
        torn(tmp_path / "last_checkpoint")
        assert make_run(tmp_path).has_checkpoint() and resume(tmp_path) == 0


def test_weights_alone_are_no_checkpoint_to_fall_back_to(tmp_path):
    save(make_run(tmp_path), 3)
    torch.save({"model": nn.Linear(2, 2).state_dict()}, tmp_path / "model_weights.pth")
    (tmp_path / "last_checkpoint").write_text("model_0000009.pth")
    assert resume(tmp_path) == 3


def test_a_run_of_which_no_checkpoint_can_be_read_names_them_all(tmp_path):
    save(make_run(tmp_path), 0, 1)
    for path in tmp_path.glob("*.pth"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"no checkpoint that can be read: .*model_0000001.pth.*model_0000000.pth"):
        resume(tmp_path)


def test_the_last_checkpoints_are_kept_and_never_the_best_one_removed(tmp_path):
    checkpointer = make_run(tmp_path)
    save(checkpointer, 9, name="model_best")
    save(checkpointer, 5, 6, 7)
    keep_last(str(tmp_path), 0)
    assert len(checkpoints(str(tmp_path))) == 4
    keep_last(str(tmp_path), 2)
    assert {path.name for path in tmp_path.glob("*.pth")} == {
        "model_best.pth",
        "model_0000006.pth",
        "model_0000007.pth",
    }
    # A run that began again in the folder of a longer one: its own is the last one, whatever the numbers say.
    save(checkpointer, 2)
    os.utime(tmp_path / "model_0000002.pth", (2e9, 2e9))
    keep_last(str(tmp_path), 1)
    assert {path.name for path in tmp_path.glob("*.pth")} == {"model_best.pth", "model_0000002.pth"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nothing_that_is_not_finite_is_saved(tmp_path, value):
    checkpointer = make_run(tmp_path)
    poisoned = make_run(tmp_path)
    with torch.no_grad():
        poisoned.model.bias[1] = value
    with pytest.raises(FloatingPointError, match=r"model.bias is not finite, and was not saved\. .*there is none"):
        save(poisoned, 0)
    assert not list(tmp_path.iterdir())
    save(checkpointer, 0)
    with pytest.raises(FloatingPointError, match=r"The last good checkpoint is .*model_0000000.pth"):
        save(poisoned, 1)
    assert resume(tmp_path) == 0


def test_what_is_not_finite_is_found_wherever_it_is():
    good = {"a": torch.ones(3), "b": [torch.ones(2, dtype=torch.bfloat16), torch.zeros(0)], "c": torch.tensor([1])}
    largest = torch.full((9,), torch.finfo(torch.float32).max)
    assert first_not_finite({**good, "largest": largest, "best": float("-inf")}) == ""
    for bad in (torch.tensor([1, float("nan"), 2.0]), torch.tensor(float("inf"), dtype=torch.bfloat16)):
        assert first_not_finite({**good, "state": {0: {"exp_avg": bad}}}) == "state.0.exp_avg"


def test_parts_that_a_killed_save_left_are_removed(tmp_path):
    for name in ("model_0000001.pth.partial", "last_checkpoint.partial", "model_0000000.pth", "notes.partial"):
        (tmp_path / name).write_text("")
    clear_partial(str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"model_0000000.pth", "notes.partial"}


@pytest.mark.parametrize("torn", [b'{"iter', b"{", b'{"iteration": 3, "a": 1', b"\0\0\0\0", b"\xff\xfe", b"7"])
def test_a_torn_last_line_of_the_metrics_is_left_out_and_cut_off(tmp_path, torn):
    path = tmp_path / "metrics.json"
    whole = b"".join(json.dumps({"iteration": i, "loss": float("nan")}).encode() + b"\n" for i in range(2))
    path.write_bytes(whole + torn)
    assert [record["iteration"] for record in read_metrics(path)] == [0, 1]
    end_metrics(path)
    assert path.read_bytes() == whole
    end_metrics(path)
    assert path.read_bytes() == whole
    end_metrics(tmp_path / "nowhere.json")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_names_the_path_and_what_is_needed(tmp_path):
    """On a disk of 1 MiB, where a checkpoint of 0.69 MiB has room once."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "karat_det_test", str(tmp_path)])
    if mounted.returncode:
        pytest.skip("no disk can be mounted here")
    code = """
import sys
from torch import nn
from karat_det.checkpoint.loading import SafeCheckpointer

checkpointer = SafeCheckpointer(nn.Linear(600, 300), sys.argv[1])
checkpointer.save("model_last")
checkpointer.save("model_last")
"""
    try:
        command = [sys.executable, "-c", code, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
        assert sorted(path.name for path in tmp_path.iterdir()) == ["last_checkpoint", "model_last.pth"]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith(f"OSError: Cannot save {tmp_path}/model_last.pth: it cannot be written to its end")
    assert "It needs 0.69 MiB, and the disk has 0.3" in message and "--resume" in message, message
    assert f"The last good checkpoint is {tmp_path}/model_last.pth" in message
