import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from karat_det.attention import KArAtAttention, KArAtConfig, KArAtOperator
from karat_det.checkpoint.files import read_weights, write_weights
from karat_det.checkpoint.loading import SafeCheckpointer, load_weights


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))


def save(path, state):
    torch.save(state, path)
    return str(path)


@pytest.mark.parametrize("layout", ["bare", "model", "ddp", "state_dict", "model_state", "averaged"])
def test_loads_a_state_dict_bare_in_a_container_or_of_ddp(tmp_path, layout, caplog):
    source, target = make_model(), make_model()
    nn.init.normal_(source[0].weight)
    state = source.state_dict()
    if layout == "ddp":
        state = {f"module.{key}": value for key, value in state.items()}
    if layout == "averaged":
        content = {"model_ema": state, "model": make_model().state_dict()}
    else:
        content = state if layout == "bare" else {"model" if layout == "ddp" else layout: state}
    with caplog.at_level(logging.INFO):
        load_weights(target, save(tmp_path / "w.pth", content))
    assert torch.equal(target[0].weight, source[0].weight)
    assert (
        "Loaded 4 of the model's 4 tensors from the file's 4, which is all of the file and of the model" in caplog.text
    )


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"MODEL.WEIGHTS is 'nowhere/w.pth'"):
        load_weights(make_model(), "nowhere/w.pth")


def test_misfits_and_unknown_keys_stop_and_are_listed(tmp_path):
    state = make_model().state_dict()
    state["0.weight"] = torch.zeros(5, 4)
    state["head.bias"] = torch.zeros(2)
    path = save(tmp_path / "w.pth", state)
    with pytest.raises(ValueError) as caught:
        load_weights(make_model(), path)
    message = str(caught.value)
    assert "0.weight: (5, 4) in the file, (3, 4) in the model" in message
    assert "1 tensors have no place in the model:\n  head.{bias}" in message
    assert "MODEL.WEIGHTS_STRICT False" in message


def test_not_strict_loads_what_fits_and_says_what_not(tmp_path, caplog):
    source = make_model()
    nn.init.normal_(source[1].weight)
    state = source.state_dict()
    state["0.weight"] = torch.zeros(5, 4)
    target = make_model()
    before = target[0].weight.clone()
    with caplog.at_level(logging.INFO):
        load_weights(target, save(tmp_path / "w.pth", state), strict=False)
    assert torch.equal(target[1].weight, source[1].weight)
    assert torch.equal(target[0].weight, before)
    assert "Left out, since MODEL.WEIGHTS_STRICT is False: 1 tensors have another shape" in caplog.text


def test_a_file_without_some_tensors_serves_a_start_but_not_an_evaluation(tmp_path, caplog):
    state = make_model().state_dict()
    del state["1.weight"]
    path = save(tmp_path / "w.pth", state)
    with pytest.raises(ValueError, match=r"The file lacks 1 tensors of the model:\n  1.{weight}"):
        load_weights(make_model(), path, complete=True)
    with caplog.at_level(logging.INFO):
        load_weights(make_model(), path, complete=False)
    assert "Not in the file, left at their initialisation: 1 tensors\n  1.{weight}" in caplog.text


def test_a_file_of_which_nothing_fits_stops_even_when_not_strict(tmp_path):
    path = save(tmp_path / "w.pth", {"encoder.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="No tensor of the file has a name and shape of the model's"):
        load_weights(make_model(), path, strict=False, complete=False)


class Malicious:
    def __reduce__(self):
        return os.system, ("touch hacked",)


@pytest.mark.parametrize("content", ["code", "text", "truncated", "list", "nested", "empty"])
def test_foreign_files_are_named_and_run_no_code(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "w.pth"
    if content == "code":
        torch.save({"model": Malicious()}, path)
    elif content in ("list", "nested"):
        torch.save([torch.zeros(1)] if content == "list" else {"optimizer": make_model().state_dict()}, path)
    else:
        torch.save(make_model().state_dict(), path)
        whole = path.read_bytes()
        path.write_bytes({"text": b"hello", "truncated": whole[: len(whole) // 2], "empty": b""}[content])
    with pytest.raises(ValueError, match=r"w\.pth"):
        load_weights(make_model(), str(path))
    assert not (tmp_path / "hacked").exists()


def test_resuming_needs_every_tensor(tmp_path):
    model = make_model()
    SafeCheckpointer(model, str(tmp_path)).save("model_0000001")
    bigger = nn.Sequential(*model, nn.Linear(3, 2))
    with pytest.raises(ValueError, match="The file lacks 2 tensors"):
        SafeCheckpointer(bigger, str(tmp_path), strict=False).resume_or_load("", resume=True)


def test_no_weights_is_said(caplog):
    with caplog.at_level(logging.INFO):
        SafeCheckpointer(make_model()).resume_or_load("", resume=False)
    assert "training starts from random weights" in caplog.text


def test_an_interrupted_save_leaves_the_checkpoint_before_it_whole(tmp_path, monkeypatch):
    checkpointer = SafeCheckpointer(make_model(), str(tmp_path))
    checkpointer.save("model_best", iteration=1)

    def fail_halfway(data, path):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", fail_halfway)
    with pytest.raises(OSError, match="No space left"):
        checkpointer.save("model_best", iteration=2)
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "model_best.pth")
    assert torch.load(tmp_path / "model_best.pth", weights_only=True)["iteration"] == 1


def test_a_full_disk_leaves_the_checkpoint_before_it_whole_and_no_rest(tmp_path):
    """A limit on the size of files fails as a full disk does: a write ends before its data."""
    code = """
import resource, sys
import torch
from karat_det.checkpoint.loading import SafeCheckpointer

model = torch.nn.Linear(300, 300)
checkpointer = SafeCheckpointer(model, sys.argv[1])
torch.nn.init.ones_(model.weight)
checkpointer.save("model_last")
torch.nn.init.zeros_(model.weight)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
checkpointer.save("model_last")
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith(f"OSError: Cannot save {tmp_path}/model_last.pth: ") and "--resume" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last_checkpoint", "model_last.pth"]
    assert torch.load(tmp_path / "model_last.pth", weights_only=True)["model"]["weight"].eq(1).all()


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("fields", [{"init": "paper"}, {"residual": "softmax"}, {"basis": "dog"}], ids=str)
def test_operators_that_are_other_functions_of_the_same_tensors_stop_the_run(tmp_path, fields, suffix):
    basis = {"basis": "morlet"} if "basis" in fields else {}

    def model(**fields):
        return nn.ModuleDict({"attn": KArAtAttention(8, 2, KArAtOperator(2, 6, KArAtConfig(rank=2, **fields)))})

    SafeCheckpointer(model(**basis), str(tmp_path)).save("w")
    path = str(tmp_path / "w.pth")
    if suffix == "safetensors":
        saved = read_weights(path)
        path = str(tmp_path / "w.safetensors")
        write_weights(path, saved["model"], saved["token_grids"], saved["operator_config"])
    load_weights(model(**basis), path)
    key, ours = next(iter(fields.items()))
    with pytest.raises(ValueError, match=rf"MODEL\.KARAT\.{key.upper()}: .* in the file, {ours} in the model"):
        load_weights(model(**basis | fields), path)
    other = model(**basis | fields)
    before = {key: tensor.clone() for key, tensor in other.attn.operator.state_dict().items()}
    load_weights(other, path, strict=False)
    for key, tensor in other.attn.operator.state_dict().items():
        assert torch.equal(tensor, before[key]), "functions of another operator were taken over"
    assert torch.equal(other.attn.qkv.weight, read_weights(path)["model"]["attn.qkv.weight"])


def test_a_new_field_of_the_config_makes_another_function(tmp_path):
    @dataclass(frozen=True)
    class NewerConfig(KArAtConfig):
        temperature: float = 1.0

    def model(**fields):
        return nn.ModuleDict({"attn": KArAtAttention(8, 2, KArAtOperator(2, 6, NewerConfig(rank=2, **fields)))})

    SafeCheckpointer(model(), str(tmp_path)).save("w")
    load_weights(model(triton=False), str(tmp_path / "w.pth"))
    with pytest.raises(ValueError, match=r"MODEL\.KARAT\.TEMPERATURE: 1\.0 in the file, 2\.0 in the model"):
        load_weights(model(temperature=2.0), str(tmp_path / "w.pth"))


def test_a_file_from_before_a_field_has_its_default(tmp_path):
    def model(**fields):
        return nn.ModuleDict({"attn": KArAtAttention(8, 2, KArAtOperator(2, 6, KArAtConfig(rank=2, **fields)))})

    SafeCheckpointer(model(), str(tmp_path)).save("w")
    saved = torch.load(tmp_path / "w.pth")
    del saved["operator_config"]["init"]
    torch.save(saved, tmp_path / "w.pth")
    load_weights(model(), str(tmp_path / "w.pth"))
    with pytest.raises(ValueError, match=r"MODEL\.KARAT\.INIT: scaled in the file, paper in the model"):
        load_weights(model(init="paper"), str(tmp_path / "w.pth"))


def test_splines_of_as_many_coefficients_but_other_intervals_stop_the_run(tmp_path):
    def model(**fields):
        return nn.ModuleDict({"attn": KArAtAttention(8, 2, KArAtOperator(2, 6, KArAtConfig(rank=2, **fields)))})

    spline = {"basis": "bspline", "grid_size": 5, "spline_order": 3}
    SafeCheckpointer(model(**spline), str(tmp_path)).save("w")
    path = str(tmp_path / "w.pth")
    load_weights(model(**spline), path)
    with pytest.raises(ValueError) as caught:
        load_weights(model(**spline | {"grid_size": 6, "spline_order": 2}), path)
    assert "MODEL.KARAT.GRID_SIZE: 5 in the file, 6 in the model" in str(caught.value)
    assert "MODEL.KARAT.SPLINE_ORDER: 3 in the file, 2 in the model" in str(caught.value)
    with pytest.raises(ValueError, match=r"MODEL\.KARAT\.SPLINE_RANGE: 3\.0 in the file, 2\.0 in the model"):
        load_weights(model(**spline, spline_range=2.0), path)
    # Of other functions these fields say nothing.
    SafeCheckpointer(model(spline_order=3), str(tmp_path)).save("w")
    load_weights(model(spline_order=2, spline_range=2.0), path)


def test_what_does_not_fit_names_the_file(tmp_path):
    torch.save({"model": {"a.weight": torch.ones(2)}}, tmp_path / "foreign.pth")
    with pytest.raises(ValueError, match=r"foreign\.pth: The weights do not fit"):
        load_weights(nn.Linear(2, 2), str(tmp_path / "foreign.pth"))


def test_a_head_for_other_classes_of_the_same_number_is_left_out(tmp_path):
    torch.manual_seed(0)
    file, model = (nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 3)}) for _ in range(2))
    torch.save({"model": file.state_dict(), "classes": ["a", "b", "c"]}, tmp_path / "w.pth")
    before = model.head.weight.clone()
    load_weights(model, str(tmp_path / "w.pth"), complete=False, classes=["a", "c", "b"])
    assert torch.equal(model.head.weight, before)
    assert torch.equal(model.body.weight, file.body.weight)
    load_weights(model, str(tmp_path / "w.pth"), complete=False, classes=["a", "b", "c"])
    assert torch.equal(model.head.weight, file.head.weight)
