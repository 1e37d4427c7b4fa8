import hashlib
import json
import re
import subprocess

import pytest
import torch
import yaml
from timm.models.vision_transformer import VisionTransformer

from karat_det.checkpoint import publishing
from karat_det.checkpoint.files import read_weights
from karat_det.checkpoint.publishing import convert_file, write_card
from karat_det.engine.pretraining import load_pretrain_cfg
from karat_det.engine.setup import load_cfg


@pytest.fixture
def source(tmp_path):
    state = VisionTransformer(img_size=32, embed_dim=12, depth=1, num_heads=2, num_classes=3).state_dict()
    path = tmp_path / "model_best.pth"
    torch.save({"model": state, "trainer": {"iteration": 99}}, path)
    return path


@pytest.fixture
def run(tmp_path, configs):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(load_cfg(str(configs / "quickstart.yaml"), []).dump())
    rows = [{"iteration": step, "bbox/AP": step / 10, "bbox/AP-one": 3.0, "total_loss": 1.0} for step in (49, 99, 149)]
    lines = [json.dumps(row) for row in [*rows, {"iteration": 199, "total_loss": 1.0}]]
    (folder / "metrics.json").write_text("\n".join(lines) + '\n{"iteration": 2')
    return folder


def test_converted_weights_have_a_detectors_names(tmp_path, source):
    target = str(tmp_path / "out.safetensors")
    assert convert_file(str(source), target) == {"trainer": {"iteration": 99}}
    state = read_weights(target)["model"]
    original = torch.load(source, weights_only=True)["model"]
    assert torch.equal(state["backbone.net.blocks.0.attn.qkv.weight"], original["blocks.0.attn.qkv.weight"])
    assert all(key.startswith("backbone.net.") for key in state)


def test_weights_of_an_unknown_layout_are_not_converted(tmp_path):
    torch.save({"conv1.weight": torch.zeros(1), "fc.bias": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth is of no known layout. Its names begin with conv1, fc\. Known: timm"):
        convert_file(str(tmp_path / "w.pth"), str(tmp_path / "out.pth"))
    assert not (tmp_path / "out.pth").exists()


def test_missing_files_and_folders_are_named(tmp_path, source):
    with pytest.raises(FileNotFoundError, match=r"IN is 'nowhere\.pth', but there is no such file"):
        convert_file("nowhere.pth", str(tmp_path / "out.pth"))
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        convert_file(str(source), str(tmp_path / "nowhere" / "out.pth"))


def test_the_card_says_how_the_weights_came_about(tmp_path, source, run):
    target = tmp_path / "out.safetensors"
    checkpoint = convert_file(str(source), str(target))
    card = write_card(str(target), str(run), checkpoint, commit="abc123", notes="For digits.")
    text = (tmp_path / "out.md").read_text()
    assert card == str(tmp_path / "out.md")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert ["commit", "abc123"] in cells
    assert ["iterations", "100"] in cells
    assert ["bbox/AP", "9.90"] in cells
    assert ["SHA-256", hashlib.sha256(target.read_bytes()).hexdigest()] in cells
    assert "For digits." in text and "total_loss" not in text and "AP-one" not in text
    config = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    assert config == yaml.safe_load((run / "config.yaml").read_text())
    assert ["trained on", ", ".join(config["DATASETS"]["TRAIN"])] in cells


def test_without_an_iteration_the_last_evaluation_is_told(tmp_path, run, caplog):
    (tmp_path / "w.safetensors").write_bytes(b"weights")
    write_card(str(tmp_path / "w.safetensors"), str(run), {})
    assert "14.90" in (tmp_path / "w.md").read_text()
    assert "the card has that of 149" in caplog.text


def test_the_card_of_a_classifier_tells_its_accuracy(tmp_path, source, run, configs):
    cfg = load_pretrain_cfg(str(configs / "pretrain" / "digits.yaml"), [], data="data")
    (run / "config.yaml").write_text(cfg.dump())
    (run / "metrics.json").write_text(json.dumps({"iteration": 99, "top-1": 81.5, "top-5": 97.25, "val_loss": 0.7}))
    checkpoint = convert_file(str(source), str(tmp_path / "out.safetensors"))
    write_card(str(tmp_path / "out.safetensors"), str(run), checkpoint)
    text = (tmp_path / "out.md").read_text()
    for row in (r"trained on *\| digits, data", r"top-1 *\| *81\.50", r"top-5 *\| *97\.25", r"iterations *\| 100"):
        assert re.search(row, text), row
    assert "for `MODEL.WEIGHTS` of a detector" in text and "val_loss" not in text


def test_figures_of_the_checkpoint_itself_come_before_those_of_its_run(tmp_path, run, caplog):
    (tmp_path / "w.safetensors").write_bytes(b"weights")
    (run / "metrics.json").write_text(json.dumps({"iteration": 99, "top-1": 11.0, "top-5": 22.0}))
    figures = {"top-1": 81.5, "top-5": 97.25, "val_loss": 0.75}
    write_card(str(tmp_path / "w.safetensors"), str(run), {"figures": figures, "trainer": {"iteration": 99}})
    text = (tmp_path / "w.md").read_text()
    for row in (r"top-1 *\| *81\.50", r"top-5 *\| *97\.25", r"val_loss *\| *0\.75", r"iterations *\| 100"):
        assert re.search(row, text), row
    assert "11.0" not in text and not caplog.text
    # Of a checkpoint that says nothing of itself, or not when it was, they are those of the run.
    for checkpoint in ({"figures": {}, "trainer": {"iteration": 99}}, {"figures": figures}):
        write_card(str(tmp_path / "w.safetensors"), str(run), checkpoint)
        assert re.search(r"top-1 *\| *11\.00", (tmp_path / "w.md").read_text())
    # A checkpoint of an epoch that was not evaluated has the figures of one before.
    write_card(str(tmp_path / "w.safetensors"), str(run), {"figures": figures, "trainer": {"iteration": 149}})
    assert "No evaluation of iteration 149" in caplog.text


def git(folder, *arguments):
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(["git", "-C", str(folder), *who, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize("place", ["", ".venv/lib/site-packages"])
def test_the_commit_is_that_of_the_packages_own_working_copy(tmp_path, run, monkeypatch, place):
    (tmp_path / "w.safetensors").write_bytes(b"weights")
    repository = tmp_path / "repository"
    module = repository / place / "karat_det" / "checkpoint" / "publishing.py"
    module.parent.mkdir(parents=True)
    monkeypatch.setattr(publishing, "__file__", str(module))

    def commit():
        write_card(str(tmp_path / "w.safetensors"), str(run), {})
        return re.search(r"commit *\| (\w+)", (tmp_path / "w.md").read_text())[1]

    assert commit() == "unknown"
    git(repository, "init")
    git(repository, "commit", "--allow-empty", "-m", "first")
    assert commit() == ("unknown" if place else git(repository, "rev-parse", "HEAD"))


@pytest.mark.parametrize("missing", ["config.yaml", "metrics.json"])
def test_a_folder_that_is_no_run_is_named(tmp_path, run, missing):
    (run / missing).unlink()
    with pytest.raises(FileNotFoundError, match=missing):
        write_card(str(tmp_path / "w.safetensors"), str(run), {})


def test_a_run_without_evaluation_is_not_published(tmp_path, run):
    (run / "metrics.json").write_text('{"iteration": 19, "total_loss": 1.0}\n')
    with pytest.raises(ValueError, match="holds no evaluation"):
        write_card(str(tmp_path / "w.safetensors"), str(run), {})
