"""Weights files of every kind are read alike, and none of them runs code."""

import argparse
import os
import pickle
import shutil
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from karat_det.checkpoint import files
from karat_det.checkpoint.files import read_weights, write_weights

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.steps": torch.tensor(3)}


def pickled(tmp_path, content, protocol=4):
    path = tmp_path / "w.pkl"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return str(path)


def same(state, expected):
    return state.keys() == expected.keys() and all(
        torch.equal(state[key], torch.as_tensor(expected[key])) for key in state
    )


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors"])
def test_what_is_written_is_read(tmp_path, suffix):
    path = str(tmp_path / f"w{suffix}")
    state = {**STATE, "twice": STATE["a.weight"], "transposed": STATE["a.weight"].T}
    write_weights(path, state, {"net.operator": (14, 7)})
    checkpoint = read_weights(path)
    assert same(checkpoint["model"], state)
    assert {name: tuple(grid) for name, grid in checkpoint["token_grids"].items()} == {"net.operator": (14, 7)}
    assert os.listdir(tmp_path) == [f"w{suffix}"]


def test_another_suffix_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"w\.onnx must end in one of \.pth"):
        write_weights(str(tmp_path / "w.onnx"), STATE, {})


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@settings(max_examples=25, deadline=None)
@given(
    array=hnp.arrays(
        st.sampled_from(["<f4", ">f4", "<f8", "<f2", "<i8", "u1", "?"]), hnp.array_shapes(min_dims=0, max_side=4)
    ),
    fortran=st.booleans(),
)
def test_arrays_of_any_pickle_protocol_are_read(tmp_path_factory, protocol, array, fortran):
    array = np.array(np.nan_to_num(array), order="F" if fortran else "C")
    content = {"model": OrderedDict(w=array), "__author__": "Facebook", "epoch": 3}
    checkpoint = read_weights(pickled(tmp_path_factory.mktemp("pkl"), content, protocol))
    assert checkpoint["__author__"] == "Facebook"
    assert torch.equal(checkpoint["model"]["w"], torch.from_numpy(np.array(array, array.dtype.newbyteorder("="))))


def test_averaged_weights_come_first_unless_a_run_goes_on(tmp_path):
    path = str(tmp_path / "w.pth")
    args = argparse.Namespace(lr=0.1)
    torch.save({"state_dict": STATE, "state_dict_ema": {"a": torch.ones(1)}, "args": args}, path)
    assert same(read_weights(path)["model"], {"a": torch.ones(1)})
    assert same(read_weights(path, averaged=False)["model"], STATE)


def prefixed(prefix, state):
    return {f"{prefix}.{key}": tensor for key, tensor in state.items()}


AVERAGE = {"a.weight": torch.ones(2, 3), "a.steps": torch.tensor(5)}
BOTH = {
    "module within": {"model_ema": {"module": AVERAGE, "decay": 0.9}, "model": STATE},
    "module within both": {"model_ema": {"module": AVERAGE}, "model": {"module": STATE}},
    "flat": prefixed("model", STATE) | prefixed("model_ema", AVERAGE),
    "flat in a container": {"state_dict": prefixed("model", STATE) | prefixed("model_ema", AVERAGE), "epoch": 3},
    "DINO": {"student": STATE, "teacher": AVERAGE, "epoch": 3},
    "ema": {"model": STATE, "ema": AVERAGE},
}
ONE = {
    "module": {"module": STATE},
    "module of model": {"model": {"module": STATE, "epoch": 3}},
    "ema": {"ema": STATE},
    "teacher": {"teacher": STATE},
    "student": {"student": STATE},
    "flat teacher": prefixed("teacher", STATE),
    "an average of nothing": {"model_ema": {}, "model": STATE},
    "an average without tensors": {"model_ema": {"decay": 0.9, "module": None}, "model": STATE},
    "no average": {"state_dict_ema": None, "state_dict": STATE},
}


@pytest.mark.parametrize("layout", BOTH)
def test_averages_are_found_wherever_they_lie(tmp_path, layout):
    path = str(tmp_path / "w.pth")
    torch.save(BOTH[layout], path)
    assert same(read_weights(path)["model"], AVERAGE)
    assert same(read_weights(path, averaged=False)["model"], STATE)


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("layout", ONE)
def test_what_a_file_has_of_one_model_is_found(tmp_path, layout, averaged):
    path = str(tmp_path / "w.pth")
    torch.save(ONE[layout], path)
    assert same(read_weights(path, averaged=averaged)["model"], STATE)


@pytest.mark.parametrize("container", ["bare", "model_ema"])
def test_an_averaged_models_count_is_no_weight(tmp_path, container):
    averaged = torch.optim.swa_utils.AveragedModel(torch.nn.Linear(2, 3))
    averaged.update_parameters(torch.nn.Linear(2, 3))
    path = str(tmp_path / "w.pth")
    torch.save(averaged.state_dict() if container == "bare" else {container: averaged.state_dict()}, path)
    assert same(read_weights(path)["model"], prefixed("module", averaged.module.state_dict()))
    torch.save({"n_averaged": torch.ones(1), "a": torch.ones(1)}, path)
    assert same(read_weights(path)["model"], {"n_averaged": torch.ones(1), "a": torch.ones(1)})


class Calls:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("payload", "named"),
    [
        (Calls(os.system, "touch hacked"), "posix.system"),
        (Calls(eval, "open('hacked', 'w')"), ".eval"),
        (Calls(getattr, "text", "upper"), ".getattr"),
        (torch.zeros(2), "torch._utils._rebuild_tensor_v2"),
        (np.array([Calls(os.system, "touch hacked")], dtype=object), "an array of 'O8'"),
        (np.zeros(2, dtype=[("pointer", "O")]), "an array of 'V8'"),
        (Calls(__import__("_codecs").encode, "text", "zip"), "the codec 'zip'"),
    ],
    ids=["system", "eval", "getattr", "tensor", "objects", "structure", "codec"],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_asks_for_more_is_refused_by_name(tmp_path, monkeypatch, payload, named, protocol):
    monkeypatch.chdir(tmp_path)
    path = pickled(tmp_path, {"model": {"w": payload}}, protocol)
    with pytest.raises(ValueError, match=r"w\.pkl is no weights file") as caught:
        read_weights(path)
    assert named in str(caught.value)
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_containers_of_any_pickle_protocol_are_read(tmp_path, protocol):
    plain = {
        "set": {1, 2},
        "frozenset": frozenset({"a"}),
        "bytes": (b"", b"\x00\xff"),
        "bytearray": [bytearray(), bytearray(b"\x00\xff")],
        "scalars": [np.float64(0.5), np.int32(3), np.bool_(True)],
        "rest": [None, True, 10**30, 1.5, "ü", (1, [2])],
    }
    content = {"model": {"w": np.ones(2)}, "path": Path("/a/b"), **plain}
    checkpoint = read_weights(pickled(tmp_path, content, protocol))
    assert {key: checkpoint[key] for key in plain} == plain
    assert checkpoint["path"] == "/a/b"
    assert {type(value) for value in checkpoint["scalars"]} == {float, int, bool}


def test_what_training_checkpoints_hold_beside_their_weights_is_read(tmp_path):
    path = str(tmp_path / "w.pth")
    metrics = {"top-1": np.float64(81.5), "top-5": np.float32(0.5), "steps": np.int64(3)}
    curve = [np.arange(3.0), (np.ones((2, 2), dtype=np.int16),)]
    args = argparse.Namespace(output=Path("/a/b"), kept={1, 2})
    milestones = Counter([30, 60])
    torch.save({"model": STATE, "metrics": metrics, "curve": curve, "args": args, "milestones": milestones}, path)
    checkpoint = read_weights(path)
    assert same(checkpoint["model"], STATE)
    assert checkpoint["metrics"] == metrics and type(checkpoint["metrics"]["top-1"]) is float
    assert torch.equal(checkpoint["curve"][0], torch.arange(3.0).double())
    assert torch.equal(checkpoint["curve"][1][0], torch.ones(2, 2, dtype=torch.int16))
    assert vars(checkpoint["args"]) == {"output": "/a/b", "kept": {1, 2}}
    assert checkpoint["milestones"][30] == 1 and checkpoint["milestones"][45] == 0


@pytest.mark.parametrize(
    ("payload", "named"),
    [
        (Calls(os.system, "touch hacked"), "it asks for posix.system, which is refused"),
        (Calls(eval, "open('hacked', 'w')"), "it asks for eval, which is refused"),
        (Calls(shutil.rmtree, "folder"), "it asks for shutil.rmtree, which is refused"),
        (np.array([Calls(os.system, "touch hacked")], dtype=object), "it holds an array of 'O8', not of numbers"),
    ],
    ids=["system", "eval", "rmtree", "objects"],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_of_torch_that_asks_for_more_is_refused_in_one_line(tmp_path, monkeypatch, payload, named, zipped):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": STATE, "extra": payload}, "w.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"w\.pth is no weights file") as caught:
        read_weights("w.pth")
    message = str(caught.value)
    assert message.endswith(f"({named})")
    assert "\n" not in message and "\x1b" not in message
    assert "weights_only" not in message and "safe_globals" not in message
    assert caught.value.__suppress_context__
    assert not (tmp_path / "hacked").exists()


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_an_archive_of_torchscript_is_refused_in_one_line(tmp_path):
    path = str(tmp_path / "w.pt")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with pytest.raises(ValueError, match=r"w\.pt is no weights file .*TorchScript") as caught:
        read_weights(path)
    assert "\n" not in str(caught.value) and "trusted" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "_codecs encode",
        "numpy._core.multiarray scalar",
        "numpy._core.numeric _frombuffer",
        "__builtin__ bytes",
        "builtins bytearray",
        "builtins set",
        "pathlib PosixPath",
        "numpy dtype",
        "numpy._core.multiarray _reconstruct",
        "collections OrderedDict",
    ],
)
@pytest.mark.parametrize("state", ["}(Vmark\nI1\nu", "N}(Vmark\nI1\nu\x86"])
def test_a_pickle_sets_nothing_on_what_it_has_asked_for(tmp_path, name, state):
    module, attribute = name.split()
    (tmp_path / "w.pkl").write_bytes(f"c{module}\n{attribute}\n{state}b.".encode("latin1"))
    with pytest.raises(ValueError, match=r"w\.pkl is no weights file"):
        read_weights(str(tmp_path / "w.pkl"))
    assert not any(hasattr(builder, "mark") for builder in files._ADMITTED.values())


@pytest.mark.parametrize("name", ["bytes", "bytearray"])
def test_a_pickle_gets_no_memory_by_a_number(tmp_path, name):
    (tmp_path / "w.pkl").write_bytes(f"cbuiltins\n{name}\n(I100\ntR.".encode())
    with pytest.raises(ValueError, match="it asks for the bytes of 100"):
        read_weights(str(tmp_path / "w.pkl"))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".pkl"])
@pytest.mark.parametrize("content", ["truncated", "jpeg", "empty", "text"])
def test_truncated_and_foreign_files_are_named(tmp_path, suffix, content):
    path = tmp_path / f"w{suffix}"
    if suffix == ".pkl":
        pickled(tmp_path, {"model": {"w": np.zeros(100)}})
    else:
        write_weights(str(path), STATE, {})
    whole = path.read_bytes()
    foreign = {
        "truncated": whole[: len(whole) // 2],
        "jpeg": b"\xff\xd8\xff\xe0\x00\x10JFIF\x00" + bytes(200),
        "empty": b"",
        "text": b"hello\n",
    }
    path.write_bytes(foreign[content])
    with pytest.raises(ValueError, match=rf"w\{suffix} is no weights file") as caught:
        read_weights(str(path))
    assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)


def test_a_file_without_a_state_dict_says_what_it_holds(tmp_path):
    with pytest.raises(ValueError, match=r"neither bare nor under .* but a dict of boxes, scores"):
        read_weights(pickled(tmp_path, {"boxes": np.zeros(2), "scores": [1, 2]}))
    for content, held in (({}, "an empty dict"), ([torch.ones(1)], "list"), ({"model": {}}, "a dict of model")):
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(ValueError, match=rf"neither bare nor under .* but {held}\."):
            read_weights(str(tmp_path / "w.pth"))


def test_numbers_and_words_may_lie_beside_tensors(tmp_path):
    torch.save({"model": {"a": torch.ones(2), "count": 3, "note": "by hand", "none": None}}, tmp_path / "w.pth")
    state = read_weights(str(tmp_path / "w.pth"))["model"]
    assert set(state) == {"a", "count"} and state["count"] == 3


def test_a_container_in_many_places_is_read_once(tmp_path):
    """Each level in twice the places of the one before: a file of some hundred bytes, and 2⁶⁰ places."""
    value = (np.ones(2),)
    for _ in range(60):
        value = (value, value)
    (tmp_path / "w.pkl").write_bytes(pickle.dumps({"model": {"a": np.ones(3)}, "nested": value}))
    loaded = read_weights(str(tmp_path / "w.pkl"))
    assert torch.equal(loaded["model"]["a"], torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize(
    "beside",
    [
        {"token_grids": 3},
        {"token_grids": {"a": [1]}},
        {"token_grids": {"a": [0, 2]}},
        {"operator_config": [1]},
        {"operator_config": {1: 2}},
        {"operator_config": {"a": ()}},
    ],
)
def test_what_lies_beside_weights_must_be_of_its_form(tmp_path, beside):
    torch.save({"model": {"a": torch.ones(2)}, **beside}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=rf"w\.pth is no weights file.*{next(iter(beside))} is"):
        read_weights(str(tmp_path / "w.pth"))


def test_others_may_read_safetensors_as_they_may_torchs_files(tmp_path):
    for name in ("w.pth", "w.safetensors"):
        write_weights(str(tmp_path / name), {"a": torch.ones(2)}, {})
    modes = {path.name: path.stat().st_mode for path in tmp_path.iterdir()}
    assert modes["w.safetensors"] == modes["w.pth"]
