"""karat_det.analysis.visualization: what is drawn, under which name, and what the errors say."""

import errno
import json
import math
import os

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image
from torch import nn

from karat_det.analysis import visualization
from karat_det.analysis.visualization import (
    Classes,
    FailedImagesError,
    dataset_classes,
    draw_ground_truth,
    draw_predictions,
    image_records,
    picture_paths,
    predict,
    side_by_side,
)

NAMES = ["cat", "dog"]


def gray(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), 128, dtype=np.uint8)


def instances_of(scores: list[float], size: tuple[int, int] = (40, 60)) -> Instances:
    """Squares of side 8 in a row, the first at the left, of class 1 with full masks."""
    instances = Instances(size)
    boxes = torch.tensor([[9.0 * i + 1, 12.0, 9.0 * i + 9, 20.0] for i in range(len(scores))]).reshape(-1, 4)
    instances.pred_boxes = Boxes(boxes)
    instances.scores = torch.tensor(scores)
    instances.pred_classes = torch.ones(len(scores), dtype=torch.long)
    instances.pred_masks = torch.zeros(len(scores), *size, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(instances.pred_masks, boxes.long(), strict=True):
        mask[y0:y1, x0:x1] = True
    return instances


def drawn_columns(picture: np.ndarray, instances: Instances) -> list[bool]:
    """Which of the squares of `instances_of` are coloured at their centres."""
    factor = picture.shape[0] / instances.image_size[0]
    centres = (instances.pred_boxes.get_centers() * factor).round().long()
    return [bool((picture[y, x] != 128).any()) for x, y in centres.tolist()]


class FoundEverywhere(nn.Module):
    """A detector that finds the same instances, of three scores, on every image."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def forward(self, batched_inputs):
        self.sizes.append((batched_inputs[0]["height"], batched_inputs[0]["width"]))
        return [{"instances": instances_of([0.9, 0.2, 0.6], self.sizes[-1])}]


@pytest.fixture
def folders(tmp_path):
    """Two folders that hold an image of the same name, and one of them also what is no image."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.fromarray(gray(40, 60)).save(tmp_path / name / "scene.png")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "a" / "folder.jpg").mkdir()
    return tmp_path


def test_only_scores_from_the_threshold_are_drawn():
    found = instances_of([0.3, 0.9, 0.5])
    assert drawn_columns(draw_predictions(gray(40, 60), found, NAMES, threshold=0.5), found) == [False, True, True]


def test_top_k_keeps_the_highest_scores():
    found = instances_of([0.3, 0.9, 0.5])
    assert drawn_columns(draw_predictions(gray(40, 60), found, NAMES, top_k=2), found) == [False, True, True]


def test_predictions_without_masks_and_without_instances():
    found = instances_of([0.9])
    found.remove("pred_masks")
    assert (draw_predictions(gray(40, 60), found, NAMES) != 128).any()
    assert (draw_predictions(gray(40, 60), instances_of([]), NAMES) == 128).all()


@pytest.mark.parametrize("size", [(112, 112), (20, 900), (900, 700), (1, 3)])
def test_small_images_are_enlarged_and_large_ones_are_not(size):
    height, width = draw_ground_truth(gray(*size), [], NAMES).shape[:2]
    if min(size) >= 448:
        assert (height, width) == size
    else:
        assert min(height, width) == 448 or max(height, width) == 2048


def test_ground_truth_takes_polygons_rles_crowds_and_leaves_holes_open():
    ring = np.zeros((40, 60), dtype=np.uint8)
    ring[5:35, 25:55] = 1
    ring[15:25, 35:45] = 0
    rle = mask_util.encode(np.asfortranarray(ring))
    polygon = [5, 20, 15, 20, 15, 30, 5, 30]
    annotations = [
        {"bbox": [5, 20, 10, 10], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, "segmentation": [polygon]},
        {"bbox": [25, 5, 30, 30], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1, "segmentation": rle, "iscrowd": 1},
    ]
    picture = draw_ground_truth(gray(40, 60), annotations, NAMES)
    factor = picture.shape[0] / 40

    def is_coloured(x, y):
        return (picture[int(y * factor), int(x * factor)] != 128).any()

    assert is_coloured(10, 28)
    assert is_coloured(50, 20)
    assert not is_coloured(40, 20)


def test_ground_truth_takes_objects_without_masks_beside_others():
    box = {"bbox": [5, 20, 10, 10], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    masked = {**box, "bbox": [30, 20, 10, 10], "segmentation": [[30, 20, 40, 20, 40, 30, 30, 30]]}
    for others in ([box], [{**box, "segmentation": []}], []):
        assert (draw_ground_truth(gray(40, 60), [masked, *others], NAMES)[25 * 11, 35 * 11] != 128).any()
    assert (draw_ground_truth(gray(40, 60), [{**box, "segmentation": []}], NAMES) != 128).any()


def test_side_by_side_keeps_each_picture_below_its_title():
    left, right = np.zeros((30, 40, 3), np.uint8), np.full((50, 20, 3), 200, np.uint8)
    sheet = np.asarray(side_by_side({"x": left, "y": right}))
    assert (sheet[-50:-20, :40] == left).all()
    assert (sheet[-50:, -20:] == right).all()


def test_folders_files_and_repeats_give_each_image_once(folders, caplog):
    records = image_records([str(folders / "a"), str(folders / "b" / "scene.png"), str(folders / "b")])
    assert [record["image_id"] for record in records] == [1, 2]
    assert [record["file_name"] for record in records] == [str(folders / name / "scene.png") for name in ("a", "b")]
    assert "Skipped 1 file" in caplog.text
    assert "notes.txt" in caplog.text


def test_unusable_inputs_are_errors_that_name_them(folders):
    whole = (folders / "a" / "scene.png").read_bytes()
    (folders / "broken.png").write_bytes(whole[: len(whole) // 2])
    (folders / "empty").mkdir()
    for path in ("broken.png", "a/notes.txt", "absent.png"):
        with pytest.raises(OSError, match=path):
            image_records([str(folders / path)])
    with pytest.raises(ValueError, match=r"empty.*no image"):
        image_records([str(folders / "empty")])


def test_what_is_no_file_in_a_folder_is_skipped_and_what_is_damaged_stays(folders, caplog):
    folder = folders / "a"
    os.mkfifo(folder / "fifo.png")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "damaged.png").write_bytes((folder / "scene.png").read_bytes()[:40])
    records = image_records([str(folder)])
    assert [os.path.basename(record["file_name"]) for record in records] == ["damaged.png", "scene.png"]
    assert "Skipped 3 files" in caplog.text and "fifo.png, loop.png, notes.txt" in caplog.text


def test_one_of_several_files_that_is_no_image_stays(folders):
    paths = [str(folders / "a" / name) for name in ("notes.txt", "scene.png")]
    assert [record["file_name"] for record in image_records(paths)] == paths
    os.mkfifo(folders / "fifo.png")
    with pytest.raises(OSError, match=r"fifo\.png.*a FIFO, not a file"):
        image_records([str(folders / "fifo.png")])


def test_pictures_of_equal_names_do_not_collide(folders):
    records = image_records([str(folders / "a"), str(folders / "b")])
    assert [path.name for path in picture_paths(records, "out")] == ["scene-1.jpg", "scene-2.jpg"]
    assert [path.name for path in picture_paths(records[:1], "out")] == ["scene.jpg"]
    named = [{**record, "image_id": f"camera/{record['image_id']}"} for record in records]
    assert [path.name for path in picture_paths(named, "out")] == ["scene-1.jpg", "scene-2.jpg"]


def test_a_picture_never_overwrites_its_image(folders):
    Image.fromarray(gray(8, 8)).save(folders / "photo.jpg")
    with pytest.raises(ValueError, match="overwrite"):
        picture_paths(image_records([str(folders / "photo.jpg")]), str(folders))


def test_json_holds_all_predictions_with_category_ids_and_drawings_only_the_best(folders, tmp_path):
    records = image_records([str(folders / "a"), str(folders / "b")])
    model, output = FoundEverywhere().train(), tmp_path / "out"
    output.mkdir()
    returned = predict(
        model, dict, Classes(NAMES, [3, 7]), records, str(output), ground_truth=False, threshold=0.5, top_k=1
    )
    results = json.loads((output / "coco_instances_results.json").read_text())
    assert results == returned
    assert [result["image_id"] for result in results] == [1, 1, 1, 2, 2, 2]
    assert {result["category_id"] for result in results} == {7}
    assert results[0]["bbox"] == [1, 12, 8, 8]
    assert results[0]["segmentation"]["size"] == [40, 60]
    assert json.loads((output / "images.json").read_text()) == [
        {"id": record["image_id"], "file_name": record["file_name"], "height": 40, "width": 60} for record in records
    ]
    assert sorted(path.name for path in output.glob("*.jpg")) == ["scene-1.jpg", "scene-2.jpg"]
    assert model.sizes == [(40, 60)] * 2
    assert model.training


def fail_drawing(monkeypatch):
    draw = visualization.draw_predictions

    def draw_but_one(image, *arguments):
        if image[0, 0, 0] == 7:
            raise MemoryError("no room")
        return draw(image, *arguments)

    monkeypatch.setattr(visualization, "draw_predictions", draw_but_one)


def test_an_image_that_fails_is_named_and_costs_no_other(tmp_path, caplog, monkeypatch):
    fail_drawing(monkeypatch)
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for i, path in enumerate(paths):
        Image.fromarray(gray(40, 60) if i != 1 else np.full((40, 60, 3), 7, np.uint8)).save(path)
    paths[2].write_bytes(paths[2].read_bytes()[:-20])
    records = [{"image_id": i, "file_name": str(path)} for i, path in enumerate(paths)]

    class FailsOnTheFourth(FoundEverywhere):
        def forward(self, batched_inputs):
            if batched_inputs[0]["image_id"] == 3:
                raise RuntimeError("no memory on the device")
            return super().forward(batched_inputs)

    output = tmp_path / "out"
    output.mkdir()
    (output / "2.jpg").write_text("of an earlier run")
    message = r"3 of the 5 images failed: .*1\.png, .*2\.png, .*3\.png\. The log says why"
    with pytest.raises(FailedImagesError, match=message):
        predict(FailsOnTheFourth(), dict, Classes(NAMES, [3, 7]), records, str(output), ground_truth=False)
    for name, reason in (("1.png", "MemoryError: no room"), ("2.png", "cut short"), ("3.png", "on the device")):
        assert any(name in record.message and reason in record.message for record in caplog.records)
    assert sorted(path.name for path in output.glob("*.jpg")) == ["0.jpg", "4.jpg"]
    results = json.loads((output / "coco_instances_results.json").read_text())
    # What was found on the second is known, though it could not be drawn.
    assert {result["image_id"] for result in results} == {0, 1, 4}
    assert [image["id"] for image in json.loads((output / "images.json").read_text())] == [0, 1, 4]


def test_a_full_disk_ends_the_command(folders, tmp_path, monkeypatch):
    def save(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    records = image_records([str(folders / "a"), str(folders / "b")])
    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(OSError, match="No space left"):
        predict(FoundEverywhere(), dict, Classes(NAMES, [0, 1]), records, str(tmp_path), ground_truth=False)


@pytest.mark.parametrize("size", [(10, 65_600), (65_600, 10), (1, 40_000), (1, 1), (700, 500)])
@pytest.mark.parametrize("ground_truth", [False, True])
def test_images_of_any_size_are_drawn_and_saved(tmp_path, monkeypatch, size, ground_truth):
    monkeypatch.setattr(visualization, "MAX_AREA", 320_000)
    height, width = size
    Image.fromarray(gray(height, width)).save(tmp_path / "long.png")
    box = [width // 4, height // 4, max(1, width // 2), max(1, height // 2)]
    annotation = {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    records = [{"image_id": 1, "file_name": str(tmp_path / "long.png"), "annotations": [annotation]}]

    class FindsOne(nn.Module):
        def forward(self, batched_inputs):
            found = instances_of([0.9], size)
            found.pred_boxes = Boxes(torch.tensor([[box[0], box[1], box[0] + box[2], box[1] + box[3]]]).float())
            found.pred_masks = torch.zeros(1, *size, dtype=torch.bool)
            found.pred_masks[0, box[1] : box[1] + box[3], box[0] : box[0] + box[2]] = True
            return [{"instances": found}]

    predict(FindsOne(), dict, Classes(NAMES, [0, 1]), records, str(tmp_path), ground_truth=ground_truth)
    with Image.open(tmp_path / "long.jpg") as picture:
        assert max(picture.size) <= 65_535
        if size == (700, 500):
            assert picture.height == round(700 * math.sqrt(320_000 / 350_000)) + 28
        assert (np.asarray(picture).reshape(-1, 3).std(axis=1) > 20).any()


@pytest.mark.filterwarnings("error")
def test_names_are_drawn_as_they_are_written(caplog):
    found = instances_of([0.9])
    plain, dollars, arabic = (
        draw_predictions(gray(40, 60), found, ["x", name]) for name in ("a and b", "$a$ and $b$", "قطة")
    )
    assert plain.shape == dollars.shape and (plain != dollars).any() and (plain != arabic).any()
    annotations = [{"bbox": [5, 6, 7, 8], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}]
    draw_ground_truth(gray(40, 60), annotations, ["$\\frac$ 猫 \ud800"])
    assert len(caplog.records) == 1 and "猫" in caplog.text


def test_ground_truth_doubles_the_width_and_needs_no_images_json(folders, tmp_path):
    records = image_records([str(folders / "b")])
    predict(FoundEverywhere(), dict, Classes(NAMES, [0, 1]), records, str(tmp_path), ground_truth=True)
    with Image.open(tmp_path / "scene.jpg") as picture:
        assert picture.width == 2 * 672 + 8
    assert not (tmp_path / "images.json").exists()


def test_classes_come_from_the_dataset_or_else_are_numbers(tmp_path, caplog):
    json_file = tmp_path / "pets.json"
    categories = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
    json_file.write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
    register_coco_instances("pets_for_classes", {}, str(json_file), str(tmp_path))
    try:
        assert dataset_classes(("pets_for_classes",), 2) == Classes(NAMES, [3, 7])
        with pytest.raises(ValueError, match=r"2 classes.*NUM_CLASSES is 5"):
            dataset_classes(("pets_for_classes",), 5)
    finally:
        DatasetCatalog.remove("pets_for_classes")
        MetadataCatalog.remove("pets_for_classes")
    caplog.set_level("INFO")
    assert dataset_classes((), 2) == dataset_classes(("unheard_of",), 2) == Classes(["0", "1"], [0, 1])
    assert "classes go by their numbers" in caplog.text
    assert dataset_classes(("coco_2017_val",), 80).category_ids[-1] == 90
