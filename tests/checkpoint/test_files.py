"""Weights files of every kind are read alike, and none of them runs code."""

import argparse
import os
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

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


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
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
    with pytest.raises(ValueError, match=rf"w\{suffix} is no weights file"):
        read_weights(str(path))


def test_a_file_without_a_state_dict_says_what_it_holds(tmp_path):
    with pytest.raises(ValueError, match=r"neither bare nor under .* but a dict of boxes, scores"):
        read_weights(pickled(tmp_path, {"boxes": np.zeros(2), "scores": [1, 2]}))
    for content, held in (({}, "an empty dict"), ([torch.ones(1)], "list"), ({"model": {}}, "a dict of model")):
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(ValueError, match=rf"neither bare nor under .* but {held}\."):
            read_weights(str(tmp_path / "w.pth"))
