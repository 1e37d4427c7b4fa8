"""tools/convert_weights.py as a user runs it."""

import json
import resource
from functools import partial
from pathlib import Path

import pytest
import torch
from forked_command import run_command
from timm.models.vision_transformer import VisionTransformer

from karat_det.checkpoint.files import read_weights
from karat_det.engine.setup import load_cfg

ROOT = Path(__file__).parents[2]


def convert(*arguments, **options):
    return run_command("convert_weights", *arguments, folder=ROOT, **options)


def test_converts_and_publishes(tmp_path, configs):
    torch.save(VisionTransformer(img_size=32, embed_dim=12, depth=1, num_heads=2).state_dict(), tmp_path / "vit.pth")
    (tmp_path / "config.yaml").write_text(load_cfg(str(configs / "quickstart.yaml"), []).dump())
    (tmp_path / "metrics.json").write_text(json.dumps({"iteration": 9, "segm/AP": 41.25}) + "\n")
    target = tmp_path / "vit.safetensors"
    done = convert(tmp_path / "vit.pth", target, "--publish", tmp_path, "--commit", "abc")
    assert done.returncode == 0, done.stderr
    assert "backbone.net.pos_embed" in read_weights(str(target))["model"]
    assert "41.25" in (tmp_path / "vit.md").read_text()
    assert "head.weight" in done.stdout and "the classifier's head" in done.stdout


def test_a_foreign_file_ends_in_one_line(tmp_path):
    (tmp_path / "photo.pkl").write_bytes(b"\xff\xd8\xff\xe0JFIF")
    done = convert(tmp_path / "photo.pkl", tmp_path / "out.pth")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'photo.pkl'} is no weights file")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_full_disk_ends_in_one_line_and_leaves_the_file_of_that_name(tmp_path, suffix):
    """A limit on the size of files fails as a full disk does: a write ends before its data."""
    torch.save(VisionTransformer(img_size=32, embed_dim=48, depth=1, num_heads=2).state_dict(), tmp_path / "vit.pth")
    target = tmp_path / f"out.{suffix}"
    target.write_bytes(b"before")
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (50_000, 50_000))
    done = convert(tmp_path / "vit.pth", target, prepare=limit)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: Cannot write {target}: ")
    assert "Traceback" not in done.stderr
    assert target.read_bytes() == b"before"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["vit.pth", target.name])
