"""The embedded dataset: what its scenes hold, and that it appears whole, once and always alike."""

import json
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from karat_det.data import digits as module
from karat_det.data.digits import generate_crops, generate_digits, register_digits, split_digits

PREPARE = Path(__file__).parents[2] / "datasets" / "prepare_digits.py"


def read(folder, split):
    return json.loads((folder / "annotations" / f"instances_{split}.json").read_text())


def annotations_by_image(dataset):
    grouped = {image["id"]: [] for image in dataset["images"]}
    for annotation in dataset["annotations"]:
        grouped[annotation["image_id"]].append(annotation)
    return grouped


@pytest.mark.parametrize("split, num_scenes, numbers", [("train", 24, {1, 2, 3, 4}), ("val", 12, {3, 4})])
def test_each_image_is_a_scene_of_one_to_four_digits(digits, split, num_scenes, numbers):
    dataset = read(digits, split)
    grouped = annotations_by_image(dataset)
    assert len(grouped) == num_scenes
    assert {len(annotations) for annotations in grouped.values()} == numbers
    for image in dataset["images"]:
        with Image.open(digits / split / image["file_name"]) as file:
            assert (file.mode, file.size) == ("RGB", (112, 112)) == ("RGB", (image["width"], image["height"]))


def test_masks_of_a_scene_do_not_overlap_and_boxes_fit_them_tightly(digits):
    for annotations in annotations_by_image(read(digits, "train")).values():
        covered = np.zeros((112, 112), dtype=int)
        for annotation in annotations:
            mask = mask_util.decode(annotation["segmentation"])
            rows, columns = np.nonzero(mask)
            x, y = columns.min(), rows.min()
            assert annotation["bbox"] == [x, y, columns.max() + 1 - x, rows.max() + 1 - y]
            assert annotation["area"] == mask.sum()
            covered += mask
        assert covered.max() == 1


def test_some_digits_hide_parts_of_others(digits):
    def boxes_overlap(a, b):
        return all(a[i] < b[i] + b[i + 2] and b[i] < a[i] + a[i + 2] for i in (0, 1))

    scenes = [[a["bbox"] for a in group] for group in annotations_by_image(read(digits, "train")).values()]
    assert any(boxes_overlap(a, b) for boxes in scenes for i, a in enumerate(boxes) for b in boxes[:i])


def test_annotations_carry_the_label_of_the_digit_drawn(digits):
    labels = load_digits().target
    dataset = read(digits, "train")
    names = {category["id"]: category["name"] for category in dataset["categories"]}
    assert names == {i + 1: str(i) for i in range(10)}
    for annotation in dataset["annotations"]:
        assert names[annotation["category_id"]] == str(labels[annotation["digit_index"]])
        assert annotation["iscrowd"] == 0


def test_splits_share_no_digit_and_use_them_all():
    labels = load_digits().target
    split = split_digits(labels)
    assert sorted([*split["train"], *split["val"]]) == list(range(1797))
    for label in range(10):
        assert 0.19 < np.mean(np.isin(np.flatnonzero(labels == label), split["val"])) <= 0.2


def test_written_splits_take_their_digits_from_their_own_half(digits):
    split = split_digits(load_digits().target)
    for name in ("train", "val"):
        assert {annotation["digit_index"] for annotation in read(digits, name)["annotations"]} <= set(split[name])


def test_generation_is_deterministic_and_scenes_do_not_depend_on_their_number(digits, tmp_path):
    again = generate_digits(tmp_path, {"train": 3, "val": 2})
    for split, number in (("train", 3), ("val", 2)):
        for i in range(1, number + 1):
            name = f"{split}/{i:06d}.png"
            assert (again / name).read_bytes() == (digits / name).read_bytes()
        annotations = read(again, split)["annotations"]
        assert annotations == read(digits, split)["annotations"][: len(annotations)]


def test_train_and_val_scenes_differ(digits):
    assert (digits / "train/000001.png").read_bytes() != (digits / "val/000001.png").read_bytes()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_no_digit_loses_more_than_the_allowed_part_of_its_ink(seed):
    # Solid squares of 1,600 pixels, so that the ink is known.
    photographs = [Image.new("RGB", (640, 427), (90, 90, 90))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_render_digit", lambda digit, side: np.ones((40, 40), dtype=np.float32))
        rng, squares = np.random.default_rng(seed), np.zeros((1, 10, 10))
        _, instances = module._draw_scene(rng, squares, np.array([0]), photographs)
    assert 1 <= len(instances) <= 4
    assert min(mask.sum() for _, mask in instances) >= module.MIN_VISIBLE * 1600


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32), gray=st.integers(0, 255))
def test_colors_stand_out_from_what_lies_beneath_and_from_each_other(seed, gray):
    taken = [np.array([200.0, 30.0, 30.0], dtype=np.float32)]
    beneath = np.full((50, 3), gray, dtype=np.float32)
    color = module._pick_color(np.random.default_rng(seed), beneath, taken)
    if color is not None:
        assert abs(color @ [0.299, 0.587, 0.114] - gray) >= module.MIN_CONTRAST - 0.01
        assert np.linalg.norm(color - taken[0]) >= module.MIN_COLOR_DISTANCE


def test_no_color_is_picked_where_none_stands_out():
    beneath = np.repeat(np.arange(0, 256, 30, dtype=np.float32), 10)[:, None].repeat(3, axis=1)
    assert module._pick_color(np.random.default_rng(0), beneath, []) is None


def test_digits_enlarge_to_about_the_side_asked_for():
    full = np.pad(np.ones((8, 8), dtype=np.float32), 1)
    for side in (module.MIN_SIDE, module.MAX_SIDE):
        height, width = module._render_digit(full, side).shape
        assert abs(height - side) <= 3 and height == width


def test_second_generation_leaves_the_data_alone(digits, monkeypatch):
    monkeypatch.setattr(module, "_write_dataset", lambda *args: pytest.fail("written again"))
    assert generate_digits(digits.parent) == digits


def test_interrupted_generation_leaves_nothing(tmp_path, monkeypatch):
    calls = []

    def interrupt(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw(*args)

    draw = module._draw_scene
    with monkeypatch.context() as patch:
        patch.setattr(module, "_draw_scene", interrupt)
        with pytest.raises(KeyboardInterrupt):
            generate_digits(tmp_path, {"train": 5, "val": 1})
    assert list(tmp_path.iterdir()) == []
    assert len(list((generate_digits(tmp_path, {"train": 5, "val": 1}) / "train").iterdir())) == 5


def test_process_that_finished_first_wins(tmp_path, monkeypatch):
    write = module._write_dataset

    def write_late(folder, num_scenes):
        write(folder, num_scenes)
        write(tmp_path / "digits", {"train": 1, "val": 1})

    monkeypatch.setattr(module, "_write_dataset", write_late)
    folder = generate_digits(tmp_path, {"train": 2, "val": 2})
    assert len(read(folder, "train")["images"]) == 1
    assert os.listdir(tmp_path) == ["digits"]


def test_folder_that_holds_something_else_is_named(tmp_path):
    (tmp_path / "digits" / "train").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"digits is not a whole digits dataset.*instances_train\.json"):
        generate_digits(tmp_path)


def test_root_that_cannot_be_written_is_named_with_the_remedy(tmp_path):
    root = tmp_path / "file"
    root.touch()
    with pytest.raises(OSError, match=r"file/digits.*DETECTRON2_DATASETS"):
        generate_digits(root)


def test_crops_are_always_alike_and_share_no_digit(tmp_path, monkeypatch):
    drawn = []

    def draw(rng, digit, photographs):
        drawn.append(digit.tobytes())
        return crop(rng, digit, photographs)

    crop = module._draw_crop
    monkeypatch.setattr(module, "_draw_crop", draw)
    counts = {"train": 200, "val": 60}
    folder = generate_crops(tmp_path / "a", counts)
    assert folder == tmp_path / "a" / "digit_crops"
    assert not set(drawn[:200]) & set(drawn[200:])
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.png")}
    assert {split: sum(name.startswith(split) for name in files) for split in counts} == counts
    assert {Path(name).parts[1] for name in files} == set("0123456789")
    digits = load_digits()
    padded, labels, _ = module._load_sources()
    classes = {image.tobytes(): label for image, label in zip(padded, digits.target, strict=True)}
    assert (labels == digits.target).all()
    for split, start in (("train", 0), ("val", 200)):
        for name in (name for name in files if name.startswith(split)):
            number = int(Path(name).stem)
            assert classes[drawn[start + number - 1]] == int(Path(name).parts[1])
    other = generate_crops(tmp_path / "b", {"train": 20, "val": 1})
    assert all((other / path).read_bytes() == files[path] for path in files if (other / path).exists())
    # What is there stays.
    assert generate_crops(tmp_path / "b") == other and len(list((other / "train").rglob("*.png"))) == 20


def test_a_crop_holds_a_whole_digit_that_mostly_is_lighter_than_the_background(monkeypatch):
    gray = np.full((112, 112, 3), 120, dtype=np.float32)
    monkeypatch.setattr(module, "_draw_background", lambda *arguments: gray.copy())
    padded, _, photographs = module._load_sources()
    lighter, sides = 0, []
    for seed in range(120):
        crop = module._draw_crop(np.random.default_rng(seed), padded[seed], photographs)
        assert crop.shape == (48, 48, 3) and crop.dtype == np.uint8
        luma = crop @ [0.299, 0.587, 0.114]
        rows, columns = np.nonzero(np.abs(luma - 120) > 30)
        sides.append(max(np.ptp(rows), np.ptp(columns)) + 1)
        assert abs(luma[rows, columns] - 120).max() >= module.MIN_CONTRAST - 1
        # Near the middle.
        assert abs(rows.min() + rows.max() - 47) <= 12 and abs(columns.min() + columns.max() - 47) <= 12
        lighter += luma[rows, columns].mean() > 120
    assert 75 <= lighter <= 105
    assert min(sides) < 32 and 40 < max(sides) <= 48


def test_import_registers_both_names_with_their_metadata():
    for split in ("train", "val"):
        metadata = MetadataCatalog.get(f"digits_{split}")
        assert f"digits_{split}" in DatasetCatalog
        assert metadata.thing_classes == list("0123456789")
        assert metadata.json_file.endswith(os.path.join("digits", "annotations", f"instances_{split}.json"))
        assert metadata.evaluator_type == "coco"


def test_data_is_generated_when_it_is_first_asked_for(catalogs, tmp_path, monkeypatch):
    for name in ("digits_train", "digits_val"):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "root"))
    monkeypatch.setattr(module, "NUM_SCENES", {"train": 2, "val": 1})
    register_digits()
    register_digits()
    assert not (tmp_path / "root").exists()
    records = DatasetCatalog.get("digits_train")
    assert [os.path.relpath(record["file_name"], tmp_path) for record in records] == [
        "root/digits/train/000001.png",
        "root/digits/train/000002.png",
    ]
    labels = load_digits().target
    drawn = read(tmp_path / "root/digits", "train")["annotations"]
    classes = [annotation["category_id"] for record in records for annotation in record["annotations"]]
    assert classes == [labels[annotation["digit_index"]] for annotation in drawn]
    assert len(DatasetCatalog.get("digits_val")) == 1


def test_command_says_where_the_data_is(digits, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(PREPARE), "--root", str(digits.parent)])
    runpy.run_path(str(PREPARE), run_name="__main__")
    assert capsys.readouterr().out.strip() == str(digits)


def test_command_fails_in_one_line_where_it_cannot_write(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", [str(PREPARE), "--root", str(tmp_path / "file")])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(PREPARE), run_name="__main__")
    assert stop.value.code == 1
    assert "Traceback" not in capsys.readouterr().err
