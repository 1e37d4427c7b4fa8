"""No weights file costs more than its size is worth: whatever it asks for, it is refused soon and by name."""

import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from hostile_files import write_hostile_files

from karat_det.backbones.classifiers import build_classifier
from karat_det.checkpoint.files import read_weights
from karat_det.checkpoint.inspection import not_a_file
from karat_det.checkpoint.loading import check_weights_file, load_weights
from karat_det.config import pretrain_config

# Reads each file that it is given with one more gigabyte of memory than the process has so far.
_READ = """
import json, resource, sys, time
from karat_det.backbones.classifiers import build_classifier
from karat_det.checkpoint.files import read_weights
with open("/proc/self/statm") as file:
    room = int(file.read().split()[0]) * resource.getpagesize() + 2**30
resource.setrlimit(resource.RLIMIT_AS, (room, room))

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024

before = peak()
for path in json.load(sys.stdin):
    start = time.process_time()
    try:
        read_weights(path)
        message = "read"
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    print(json.dumps([path, time.process_time() - start, peak() - before, message]), flush=True)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's account of memory")
def test_hostile_files_are_refused_within_two_seconds_and_a_gigabyte(tmp_path):
    names = write_hostile_files(tmp_path)
    paths = [str(tmp_path / name) for name in names]
    run = subprocess.run(
        [sys.executable, "-c", _READ], input=json.dumps(paths), capture_output=True, text=True, timeout=120
    )
    results = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(results) == len(paths), (paths[len(results)], run.returncode, run.stderr[-2000:])
    for path, seconds, grown, message in results:
        assert message.startswith(f"ValueError: {path} is no weights file that can be read"), message
        assert "\n" not in message and len(message) < 1000 + len(path), message
        # Of the processor, since other tests may run beside these.
        assert seconds < 2 and grown < 2**28, (path, seconds, grown, message)


def test_checkpoints_of_many_tensors_and_long_lists_are_read(tmp_path):
    state = {f"layer.{number}": torch.ones(2) for number in range(3_000)}
    plain = {"losses": [0.1] * 20_000, "names": {str(number) for number in range(5_000)}, "shape": (1,) * 2_000}
    for zipped in (True, False):
        torch.save({"model": state, **plain}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
        held = read_weights(str(tmp_path / "w.pth"))
        assert len(held["model"]) == 3_000 and {key: held[key] for key in plain} == plain


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_pickle_is_read_wherever_a_frame_of_it_ends(tmp_path, protocol):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    for length in range(15_900, 16_400, 2):
        # Python ends a frame where it has 64 KiB by then: here in turn behind every instruction of the array.
        before = ["a" * length, *(letter * 16_384 for letter in "bcd")]
        (tmp_path / "w.pkl").write_bytes(pickle.dumps({"before": before, "model": {"w": array}}, protocol))
        held = read_weights(str(tmp_path / "w.pkl"))
        assert held["model"]["w"].tolist() == array.tolist() and held["before"] == before


def test_expanded_tensors_that_are_small_are_read(tmp_path):
    torch.save({"model": {"position_ids": torch.arange(2).expand(3, 2)}}, tmp_path / "w.pth")
    assert read_weights(str(tmp_path / "w.pth"))["model"]["position_ids"].tolist() == [[0, 1]] * 3


def test_a_hostile_file_is_refused_before_anything_else_is_done(tmp_path):
    (tmp_path / "w.pkl").write_bytes(b"\x80\x02}r\xff\xff\xff\x3f.")
    with pytest.raises(ValueError, match=r"w\.pkl is no weights file .*room for 1,073,741,823 values"):
        check_weights_file(str(tmp_path / "w.pkl"))


def test_what_is_no_file_is_said(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").touch()
    kinds = {
        "pipe": "a named pipe",
        "loop": "a loop of links",
        "": "a folder",
        "/dev/null": "a device",
        "file": "",
        "none": "",
    }
    assert {name: not_a_file(tmp_path / name) for name in kinds} == kinds


def test_tensors_of_odd_dimensions_are_refused_by_file(tmp_path):
    cfg = pretrain_config()
    sizes = {"IMG_SIZE": 32, "PATCH_SIZE": 8, "EMBED_DIM": 12, "DEPTH": 1, "NUM_HEADS": 2}
    cfg.merge_from_list([word for key, size in sizes.items() for word in (f"MODEL.{key}", size)])
    cfg.MODEL.KARAT.RANK, cfg.MODEL.KARAT.SHARING = 3, "blockwise"
    model = build_classifier(cfg, 2)
    whole = model.state_dict()
    tokens = ("pos_embed", "cls_token", "dist_token", "reg_token", "absolute_pos_embed", "blocks.0.attn.q.weight")
    first = [key for key in whole if "blocks.0.attn" in key or key.startswith(("patch_embed", "head"))]
    refused = 0
    for key in [*tokens, *first]:
        for shape in ((), (0,), (3,), (2, 0), (1, 0, 12), (1, 10**6, 0), (1, 7, 12), (1, 2, 3, 4)):
            torch.save({"model": whole | {key: torch.zeros(shape)}}, tmp_path / "w.pth")
            try:
                load_weights(model, str(tmp_path / "w.pth"), strict=True, complete=False)
            except ValueError as error:
                assert str(error).startswith(f"{tmp_path}/w.pth")
                refused += 1
    assert refused > 50
