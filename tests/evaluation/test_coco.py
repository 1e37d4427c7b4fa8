"""karat_det.evaluation.coco against pycocotools and Detectron2's own evaluator."""

import contextlib
import copy
import io
import json
import logging
import math
import os
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
import torch.multiprocessing as mp
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator, coco_evaluation
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.visualizer import GenericMask
from faster_coco_eval import COCO as FasterCOCO
from faster_coco_eval import COCOeval_faster
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from karat_det.data.coco_datasets import load_coco
from karat_det.evaluation.coco import FasterCOCOEvaluator

TASKS = ("bbox", "segm")


def rle_of(mask: np.ndarray) -> dict:
    rle = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def box_mask(box: np.ndarray, height: int, width: int) -> np.ndarray:
    """The ellipse inside an XYWH box, as a mask of shape (height, width)."""
    x, y, w, h = box
    rows, columns = np.mgrid[:height, :width] + 0.5
    return ((columns - x - w / 2) / (w / 2)) ** 2 + ((rows - y - h / 2) / (h / 2)) ** 2 <= 1


def random_dataset(rng: np.random.Generator, num_images: int, num_classes: int, crowds: bool) -> dict:
    """A COCO dataset of ellipses of all three area ranges; some images and some classes stay empty."""
    height, width = 150, 180
    images = [{"id": 7 * i + 3, "height": height, "width": width, "file_name": f"{i}.jpg"} for i in range(num_images)]
    annotations = []
    for image in images[: max(1, num_images - 1)]:
        for _ in range(rng.integers(0, 9)):
            w, h = rng.uniform(2, 140, 2)
            box = np.array([rng.uniform(0, width - w), rng.uniform(0, height - h), w, h])
            mask = box_mask(box, height, width)
            if mask.any():
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image["id"],
                        "category_id": int(rng.integers(num_classes)) * 2 + 1,
                        "bbox": box.tolist(),
                        "area": float(mask.sum()),
                        "iscrowd": int(crowds and rng.random() < 0.2),
                        "segmentation": rle_of(mask),
                    }
                )
    # The last category has no ground truth.
    categories = [{"id": 2 * i + 1, "name": f"class {i}"} for i in range(num_classes + 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def perturbed(dataset: dict, rng: np.random.Generator, score_levels: int, copies: int) -> list[dict]:
    """COCO results: shifted copies of the ground truth, some in a wrong class, with few enough scores that many tie."""
    api = quiet_coco(COCO, dataset)
    category_ids = [category["id"] for category in dataset["categories"]]
    results = []
    for annotation in dataset["annotations"]:
        mask = api.annToMask(annotation)
        for _ in range(rng.integers(0, copies + 1)):
            shift = rng.integers(-6, 7, 2)
            box = np.array(annotation["bbox"]) + np.concatenate([shift[::-1], rng.normal(0, 3, 2)])
            wrong = rng.random() < 0.2
            results.append(
                {
                    "image_id": annotation["image_id"],
                    "category_id": int(rng.choice(category_ids)) if wrong else annotation["category_id"],
                    "bbox": box.clip(0.5).tolist(),
                    "segmentation": rle_of(np.roll(mask, shift, (0, 1))),
                    "score": float(rng.integers(1, score_levels + 1) / score_levels),
                }
            )
    for image in dataset["images"]:
        for _ in range(rng.integers(0, 3)):
            box = np.array([*rng.uniform(0, 60, 2), *rng.uniform(5, 60, 2)])
            mask = box_mask(box, image["height"], image["width"])
            results.append(
                {
                    "image_id": image["id"],
                    "category_id": int(rng.choice(category_ids)),
                    "bbox": box.tolist(),
                    "segmentation": rle_of(mask),
                    "score": float(rng.integers(1, score_levels + 1) / score_levels),
                }
            )
    return results


def quiet_coco(cls: type, dataset: dict):
    api = cls()
    api.dataset = copy.deepcopy(dataset)
    with contextlib.redirect_stdout(io.StringIO()):
        api.createIndex()
    return api


def sums(coco_class: type, eval_class: type, dataset: dict, results: list[dict], task: str):
    """The evaluator after evaluate, accumulate and summarize, on masks' own areas for "segm" as Detectron2 does it."""
    results = copy.deepcopy(results)
    if task == "segm":
        for result in results:
            del result["bbox"]
    gt = quiet_coco(coco_class, dataset)
    with contextlib.redirect_stdout(io.StringIO()):
        coco_eval = eval_class(gt, gt.loadRes(results), task)
        coco_eval.evaluate()
        coco_eval.accumulate()
        coco_eval.summarize()
    return coco_eval


def assert_same_figures(dataset: dict, results: list[dict], task: str) -> np.ndarray:
    plain = sums(COCO, COCOeval, dataset, results, task)
    fast = sums(FasterCOCO, COCOeval_faster, dataset, results, task)
    assert len(plain.stats) == len(fast.stats) == 12
    np.testing.assert_allclose(fast.stats, plain.stats, rtol=0, atol=1e-12)
    for name in ("precision", "recall", "scores"):
        np.testing.assert_allclose(fast.eval[name], plain.eval[name], rtol=0, atol=1e-12)
    return plain.stats


def register(name: str, dataset: dict, folder: Path, detectron2: bool = False) -> None:
    """Registers a COCO dataset; loaded by Detectron2 its metadata has what Detectron2's own evaluator needs."""
    json_file = folder / f"{name}.json"
    json_file.write_text(json.dumps(dataset))
    register_coco_instances(name, {}, str(json_file), str(folder))
    if detectron2:
        DatasetCatalog.get(name)


@pytest.fixture
def named_dataset(tmp_path):
    """A function that registers a dataset under a name of its own, for one test."""
    names = []

    def add(dataset: dict, detectron2: bool = False) -> str:
        name = f"{tmp_path.name}_{len(names)}"
        register(name, dataset, tmp_path, detectron2)
        names.append(name)
        return name

    yield add
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def as_outputs(dataset: dict, results: list[dict]) -> list[tuple[dict, dict]]:
    """COCO results as the pairs of inputs and outputs that a model gives an evaluator, an image at a time."""
    class_of = {category["id"]: i for i, category in enumerate(dataset["categories"])}
    pairs = []
    for image in dataset["images"]:
        own = [result for result in results if result["image_id"] == image["id"]]
        instances = Instances((image["height"], image["width"]))
        boxes = torch.tensor([result["bbox"] for result in own], dtype=torch.float64).reshape(-1, 4)
        instances.pred_boxes = Boxes(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1))
        instances.scores = torch.tensor([result["score"] for result in own], dtype=torch.float64)
        instances.pred_classes = torch.tensor([class_of[result["category_id"]] for result in own], dtype=torch.long)
        masks = [mask_util.decode(result["segmentation"]) for result in own]
        instances.pred_masks = torch.tensor(np.array(masks), dtype=torch.bool).reshape(-1, *instances.image_size)
        pairs.append(({"image_id": image["id"]}, {"instances": instances}))
    return pairs


def approximately(results: dict) -> dict:
    """What results must equal up to rounding; nan equals nan."""
    return {task: pytest.approx(figures, rel=0, abs=1e-9, nan_ok=True) for task, figures in results.items()}


def evaluate(evaluator, pairs: list[tuple[dict, dict]], img_ids: list[int] | None = None) -> dict:
    evaluator.reset()
    for inputs, outputs in pairs:
        evaluator.process([inputs], [outputs])
    with contextlib.redirect_stdout(io.StringIO()):
        return evaluator.evaluate(img_ids)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32 - 1),
    num_images=st.integers(1, 4),
    num_classes=st.integers(1, 3),
    crowds=st.booleans(),
    score_levels=st.sampled_from([1, 3, 1000]),
)
def test_figures_equal_pycocotools_on_random_scenes(seed, num_images, num_classes, crowds, score_levels):
    rng = np.random.default_rng(seed)
    dataset = random_dataset(rng, num_images, num_classes, crowds)
    results = perturbed(dataset, rng, score_levels, copies=3)
    if results:
        for task in TASKS:
            assert_same_figures(dataset, results, task)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("score_levels", [1, 4, 10**6])
def test_figures_equal_pycocotools_with_more_than_100_detections_an_image(task, score_levels):
    rng = np.random.default_rng(1)
    dataset = random_dataset(rng, num_images=3, num_classes=1, crowds=True)
    results = perturbed(dataset, rng, score_levels, copies=70)
    most = max(np.unique([result["image_id"] for result in results], return_counts=True)[1])
    assert most > 100
    stats = assert_same_figures(dataset, results, task)
    assert 0 < stats[0] < 1


@pytest.mark.parametrize("task", TASKS)
def test_figures_equal_pycocotools_on_coco(task):
    folder = os.environ.get("KARAT_COCO_TINY")
    if not folder:
        pytest.skip("set KARAT_COCO_TINY to a folder that holds coco/annotations/instances_val2017.json")
    dataset = json.loads(Path(folder, "coco/annotations/instances_val2017.json").read_text())
    assert any(annotation["iscrowd"] for annotation in dataset["annotations"])
    results = perturbed(dataset, np.random.default_rng(0), score_levels=20, copies=3)
    stats = assert_same_figures(dataset, results, task)
    assert all(0 < stat < 1 for stat in stats)


def test_results_on_coco_equal_detectron2s(named_dataset):
    folder = os.environ.get("KARAT_COCO_TINY")
    if not folder:
        pytest.skip("set KARAT_COCO_TINY to a folder that holds coco/annotations/instances_val2017.json")
    dataset = json.loads(Path(folder, "coco/annotations/instances_val2017.json").read_text())
    assert any(annotation["iscrowd"] for annotation in dataset["annotations"])
    pairs = as_outputs(dataset, perturbed(dataset, np.random.default_rng(1), score_levels=20, copies=3))
    name = named_dataset(dataset, detectron2=True)
    expected = evaluate(COCOEvaluator(name, TASKS, distributed=False, use_fast_impl=False), pairs)
    assert evaluate(FasterCOCOEvaluator(name, TASKS, distributed=False), pairs) == approximately(expected)
    assert expected["segm"]["AP"] > 0


def test_results_and_files_equal_detectron2s(named_dataset, tmp_path):
    rng = np.random.default_rng(2)
    dataset = random_dataset(rng, num_images=4, num_classes=3, crowds=True)
    pairs = as_outputs(dataset, perturbed(dataset, rng, score_levels=5, copies=3))
    name = named_dataset(dataset, detectron2=True)
    plain = COCOEvaluator(name, TASKS, distributed=False, output_dir=str(tmp_path / "plain"), use_fast_impl=False)
    fast = FasterCOCOEvaluator(name, TASKS, distributed=False, output_dir=str(tmp_path / "fast"))
    expected, found = evaluate(plain, pairs), evaluate(fast, pairs)
    assert list(found) == list(TASKS)
    assert found == approximately(expected)
    for task in TASKS:
        assert found[task]["AP"] > 0
        assert np.isnan(found[task]["AP-class 3"])
    results = [tmp_path / side / "coco_instances_results.json" for side in ("plain", "fast")]
    assert results[0].read_text() == results[1].read_text()


def test_log_has_summary_and_classes_and_names_who_did_the_sums(named_dataset, caplog):
    rng = np.random.default_rng(3)
    dataset = random_dataset(rng, num_images=3, num_classes=2, crowds=False)
    caplog.set_level(logging.INFO)
    evaluator = FasterCOCOEvaluator(named_dataset(dataset), TASKS, distributed=False)
    evaluate(evaluator, as_outputs(dataset, perturbed(dataset, rng, score_levels=9, copies=2)))
    assert "faster-coco-eval" in caplog.text
    assert "COCO summary for segm" in caplog.text
    assert "Average Precision  (AP) @[ IoU=0.50:0.95 | area=   all | maxDets=100 ] = 0." in caplog.text
    assert "Per-category segm AP" in caplog.text
    assert "class 1" in caplog.text
    assert "Falling back" not in caplog.text
    # Its progress, in the words of its functions, is nobody's concern.
    assert "COCOeval_opt" not in caplog.text
    assert "with official COCO API" not in caplog.text


def test_neither_of_detectron2s_own_evaluators_is_used(named_dataset, monkeypatch):
    for name in ("COCOeval", "COCOeval_opt"):
        monkeypatch.setattr(coco_evaluation, name, None)
    rng = np.random.default_rng(4)
    dataset = random_dataset(rng, num_images=2, num_classes=2, crowds=False)
    evaluator = FasterCOCOEvaluator(named_dataset(dataset), TASKS, distributed=False)
    assert evaluate(evaluator, as_outputs(dataset, perturbed(dataset, rng, 10, 2)))["segm"]["AP"] > 0


def test_some_of_the_images_and_tasks_read_off_the_predictions_equal_detectron2s(named_dataset):
    rng = np.random.default_rng(9)
    dataset = random_dataset(rng, num_images=4, num_classes=2, crowds=True)
    pairs = as_outputs(dataset, perturbed(dataset, rng, score_levels=5, copies=3))
    name = named_dataset(dataset, detectron2=True)
    some = [image["id"] for image in dataset["images"][1:3]]
    plain = evaluate(COCOEvaluator(name, distributed=False, use_fast_impl=False), pairs, some)
    assert evaluate(FasterCOCOEvaluator(name, distributed=False), pairs, some) == approximately(plain)
    assert evaluate(FasterCOCOEvaluator(name, distributed=False), pairs) != approximately(plain)


def test_a_json_without_annotations_gets_its_predictions_written_and_nothing_measured(named_dataset, tmp_path, caplog):
    rng = np.random.default_rng(10)
    dataset = random_dataset(rng, num_images=2, num_classes=1, crowds=False)
    results = perturbed(dataset, rng, score_levels=5, copies=3)
    pairs = as_outputs(dataset, results)
    del dataset["annotations"]
    evaluator = FasterCOCOEvaluator(named_dataset(dataset), TASKS, distributed=False, output_dir=str(tmp_path / "out"))
    caplog.set_level(logging.INFO)
    assert evaluate(evaluator, pairs) == {}
    assert "has no annotations: nothing is measured" in caplog.text
    assert len(json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())) == len(results)


def test_no_predictions_gives_nan(named_dataset):
    dataset = random_dataset(np.random.default_rng(5), num_images=3, num_classes=2, crowds=False)
    evaluator = FasterCOCOEvaluator(named_dataset(dataset), TASKS, distributed=False)
    found = evaluate(evaluator, as_outputs(dataset, []))
    assert set(found) == set(TASKS)
    assert all(np.isnan(value) for task in TASKS for value in found[task].values())


def test_wrong_predictions_give_zero(named_dataset):
    dataset = random_dataset(np.random.default_rng(6), num_images=3, num_classes=1, crowds=False)
    image = dataset["images"][-1]  # The image without annotations.
    mask = box_mask(np.array([10, 10, 30, 30]), image["height"], image["width"])
    result = {"image_id": image["id"], "category_id": 1, "bbox": [10, 10, 30, 30], "score": 0.9}
    evaluator = FasterCOCOEvaluator(named_dataset(dataset), TASKS, distributed=False)
    found = evaluate(evaluator, as_outputs(dataset, [{**result, "segmentation": rle_of(mask)}]))
    assert found["bbox"]["AP"] == found["segm"]["AP"] == 0


@pytest.mark.parametrize("header", [{}, {"info": None, "licenses": []}])
def test_json_without_info_and_licenses(named_dataset, header):
    rng = np.random.default_rng(7)
    dataset = {**header, **random_dataset(rng, num_images=2, num_classes=1, crowds=False)}
    evaluator = FasterCOCOEvaluator(named_dataset(dataset), TASKS, distributed=False)
    assert evaluate(evaluator, as_outputs(dataset, perturbed(dataset, rng, 10, 2)))["segm"]["AP"] >= 0


def renamed(dataset: dict, image_ids, annotation_ids, category_ids, names=str) -> dict:
    """The dataset with other ids in the same order: functions of the place of an image, an annotation, a category."""
    dataset = copy.deepcopy(dataset)
    images = {image["id"]: image_ids(i) for i, image in enumerate(dataset["images"])}
    categories = {category["id"]: category_ids(i) for i, category in enumerate(dataset["categories"])}
    for image in dataset["images"]:
        image["id"] = images[image["id"]]
    for i, category in enumerate(dataset["categories"]):
        category.update(id=categories[category["id"]], name=names(i))
    for i, annotation in enumerate(dataset["annotations"]):
        annotation["id"] = annotation_ids(i)
        annotation["image_id"] = images[annotation["image_id"]]
        annotation["category_id"] = categories[annotation["category_id"]]
    return dataset


def as_they_are(i):
    return i


IDS = {
    "from 0": (as_they_are, as_they_are, as_they_are),
    "above 2^53": (lambda i: 2**62 + i, lambda i: 2**70 + i, lambda i: 2**53 + i),
    "digits": (lambda i: f"{i:04}", lambda i: f"{i}", lambda i: f"{i}"),
    "words": (lambda i: f"frame_{i:03}_cam", lambda i: f"object {chr(97 + i % 26)}{i}", lambda i: f"class {i}"),
    "mixed": (lambda i: i or "0", lambda i: None, lambda i: float(i)),
}


@pytest.mark.parametrize("kind", IDS)
@settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=[*HealthCheck])
@given(seed=st.integers(0, 2**32 - 1), crowds=st.booleans())
def test_any_ids_give_pycocotools_figures_of_the_renumbered_data(named_dataset, tmp_path, kind, seed, crowds):
    rng = np.random.default_rng(seed)
    dataset = random_dataset(rng, num_images=3, num_classes=2, crowds=crowds)
    own = renamed(dataset, *IDS[kind], names=lambda i: "weed")
    results = perturbed(dataset, rng, score_levels=3, copies=2)
    own_ids = {image["id"]: other["id"] for image, other in zip(dataset["images"], own["images"], strict=True)}
    inputs = [({"image_id": own_ids[each["image_id"]]}, outputs) for each, outputs in as_outputs(dataset, results)]
    evaluator = FasterCOCOEvaluator(named_dataset(own), TASKS, distributed=False, output_dir=str(tmp_path))
    found = evaluate(evaluator, inputs)
    written = json.loads((tmp_path / "coco_instances_results.json").read_text())
    class_ids = {one["id"]: other["id"] for one, other in zip(dataset["categories"], own["categories"], strict=True)}
    # The dataset's own ids, in the order of the images.
    assert [(each["image_id"], each["category_id"]) for each in written] == [
        (own_ids[each["image_id"]], class_ids[each["category_id"]])
        for image in dataset["images"]
        for each in results
        if each["image_id"] == image["id"]
    ]
    for task in TASKS if results else ():
        plain = sums(COCO, COCOeval, dataset, results, task)
        stats = [100 * stat if stat >= 0 else math.nan for stat in plain.stats[:6]]
        assert list(found[task].values())[:6] == pytest.approx(stats, rel=0, abs=1e-9, nan_ok=True)
        names = {id: int(own) if type(own) is float else own for id, own in class_ids.items()}
        of_class = [figures[figures > -1] for figures in np.moveaxis(plain.eval["precision"][:, :, :, 0, -1], 2, 0)]
        expected = {
            f"AP-weed (id {names[category['id']]})": 100 * figures.mean() if figures.size else math.nan
            for category, figures in zip(dataset["categories"], of_class, strict=True)
        }
        assert dict(list(found[task].items())[6:]) == pytest.approx(expected, rel=0, abs=1e-9, nan_ok=True)


def spoiled(dataset: dict, rng: np.random.Generator) -> dict:
    """The dataset with what the reader puts right or leaves out."""
    dataset = copy.deepcopy(dataset)
    for i, annotation in enumerate(dataset["annotations"]):
        x, y, w, h = annotation["bbox"]
        kind = rng.integers(8)
        if kind == 0:
            annotation["bbox"] = [x + w, y + h, -w, -h]
        elif kind == 1:
            annotation["bbox"] = [200, 10, 5, 5]
        elif kind == 2:
            annotation["area"] = None
        elif kind == 3:
            annotation["iscrowd"] = None
        elif kind == 4:
            polygon = [[x, y], [x + w, y], [x + w, y + h], [x, y + h]]
            annotation["segmentation"] = [polygon]
        elif kind == 5:
            polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
            annotation["segmentation"] = [polygon, [x, y]]
        elif kind == 6:
            annotation["segmentation"] = {"size": [150, 180], "counts": [150 * 180]}
        annotation["id"] = i
    return dataset


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[*HealthCheck])
@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(sorted(IDS)),
    crowds=st.booleans(),
    num_classes=st.integers(1, 3),
    masks=st.booleans(),
)
def test_perfect_predictions_are_100_whatever_the_reader_puts_right(
    named_dataset, seed, kind, crowds, num_classes, masks
):
    rng = np.random.default_rng(seed)
    dataset = renamed(random_dataset(rng, num_images=3, num_classes=num_classes, crowds=crowds), *IDS[kind])
    name = named_dataset(spoiled(dataset, rng))
    # What is trained on is what is predicted.
    records = load_coco(name, masks=masks, keep=True)
    pairs = []
    for record in records:
        annotations = record["annotations"]
        instances = Instances((record["height"], record["width"]))
        boxes = torch.tensor([each["bbox"] for each in annotations], dtype=torch.float64).reshape(-1, 4)
        instances.pred_boxes = Boxes(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1).double())
        instances.scores = torch.ones(len(annotations))
        instances.pred_classes = torch.tensor([each["category_id"] for each in annotations], dtype=torch.long)
        if masks:
            decoded = [GenericMask(each["segmentation"], *instances.image_size).mask for each in annotations]
            instances.pred_masks = torch.tensor(np.array(decoded), dtype=torch.bool).reshape(-1, *instances.image_size)
        pairs.append(({"image_id": record["image_id"]}, {"instances": instances}))
    found = evaluate(FasterCOCOEvaluator(name, TASKS if masks else ("bbox",), distributed=False), pairs)
    objects = [each for record in records for each in record["annotations"] if not each["iscrowd"]]
    for task in found:
        assert {value for value in found[task].values() if not np.isnan(value)} == ({100.0} if objects else set())


def test_a_prediction_of_a_class_or_an_image_that_the_dataset_lacks_is_an_error(named_dataset):
    dataset = random_dataset(np.random.default_rng(11), num_images=2, num_classes=1, crowds=False)
    evaluator = FasterCOCOEvaluator(named_dataset(dataset), TASKS, distributed=False)
    pairs = as_outputs(dataset, perturbed(dataset, np.random.default_rng(0), 5, 2))
    evaluator.reset()
    for wrong in (2, 80, -1):
        outputs = copy.deepcopy(pairs[0][1])
        outputs["instances"].pred_classes[-1] = wrong
        with pytest.raises(ValueError, match=rf"image 3 is of class {wrong}, but .*\.json .* has 2 classes"):
            evaluator.process([pairs[0][0]], [outputs])
    outputs = copy.deepcopy(pairs[0][1])
    outputs["instances"].remove("pred_masks")
    with pytest.raises(ValueError, match=r"predictions of image 3 have no masks.*MODEL\.MASK_ON False"):
        evaluator.process([pairs[0][0]], [outputs])
    with pytest.raises(ValueError, match=r"of image 5, which .*\.json .* does not have"):
        evaluator.process([{"image_id": 5}], [pairs[0][1]])


def test_masks_of_objects_without_masks_are_not_measured(named_dataset):
    dataset = random_dataset(np.random.default_rng(12), num_images=2, num_classes=1, crowds=False)
    pairs = as_outputs(dataset, perturbed(dataset, np.random.default_rng(0), 5, 2))
    dataset["annotations"][1]["segmentation"] = []
    name = named_dataset(dataset)
    with pytest.raises(ValueError, match=r"annotation with id 2 of image 3 has no mask.*MODEL\.MASK_ON False"):
        evaluate(FasterCOCOEvaluator(name, TASKS, distributed=False), pairs)
    assert evaluate(FasterCOCOEvaluator(name, ("bbox",), distributed=False), pairs)["bbox"]["AP"] > 0


def test_proposals_are_measured_by_the_datasets_own_ids(named_dataset, tmp_path):
    dataset = random_dataset(np.random.default_rng(13), num_images=2, num_classes=1, crowds=False)
    dataset = renamed(dataset, *IDS["words"])
    evaluator = FasterCOCOEvaluator(named_dataset(dataset), distributed=False, output_dir=str(tmp_path))
    pairs = []
    for image in dataset["images"]:
        boxes = [each["bbox"] for each in dataset["annotations"] if each["image_id"] == image["id"]]
        proposals = Instances((image["height"], image["width"]))
        boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        proposals.proposal_boxes = Boxes(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1))
        proposals.objectness_logits = torch.ones(len(boxes))
        pairs.append(({"image_id": image["id"]}, {"proposals": proposals}))
    assert evaluate(evaluator, pairs)["box_proposals"]["AR@100"] == pytest.approx(100)


def test_a_json_whose_records_come_from_elsewhere_keeps_the_order_of_their_classes(named_dataset, tmp_path):
    rng = np.random.default_rng(15)
    dataset = random_dataset(rng, num_images=3, num_classes=2, crowds=False)
    pairs = as_outputs(dataset, perturbed(dataset, rng, score_levels=5, copies=3))
    name = named_dataset(dataset)
    expected = evaluate(FasterCOCOEvaluator(name, TASKS, distributed=False), pairs)
    last = len(dataset["categories"]) - 1
    for _, outputs in pairs:
        outputs["instances"].pred_classes = last - outputs["instances"].pred_classes
    other = f"{name}_reversed"
    MetadataCatalog.get(other).set(
        json_file=MetadataCatalog.get(name).json_file,
        thing_classes=MetadataCatalog.get(name).thing_classes[::-1],
        thing_dataset_id_to_contiguous_id={each["id"]: last - i for i, each in enumerate(dataset["categories"])},
    )
    try:
        found = evaluate(FasterCOCOEvaluator(other, TASKS, distributed=False), pairs)
    finally:
        MetadataCatalog.remove(other)
    assert found == approximately(expected)
    assert expected["bbox"]["AP-class 0"] != expected["bbox"]["AP-class 1"]


def test_datasets_of_other_formats_are_converted(named_dataset, tmp_path):
    rng = np.random.default_rng(14)
    dataset = random_dataset(rng, num_images=2, num_classes=2, crowds=True)
    name = named_dataset(dataset)
    records = load_coco(name, masks=True, keep=False)
    for record in records:
        for annotation in record["annotations"]:
            annotation["segmentation"]["counts"] = annotation["segmentation"]["counts"].encode()
    other = f"{name}_records"
    DatasetCatalog.register(other, lambda: records)
    MetadataCatalog.get(other).set(thing_classes=MetadataCatalog.get(name).thing_classes)
    pairs = as_outputs(dataset, perturbed(dataset, rng, score_levels=5, copies=3))
    try:
        with pytest.raises(ValueError, match=r"not in COCO format.*output_dir"):
            FasterCOCOEvaluator(other, TASKS, distributed=False)
        found = evaluate(FasterCOCOEvaluator(other, TASKS, distributed=False, output_dir=str(tmp_path)), pairs)
    finally:
        DatasetCatalog.remove(other)
        MetadataCatalog.remove(other)
    expected = evaluate(FasterCOCOEvaluator(name, TASKS, distributed=False), pairs)
    # The conversion rounds boxes to a thousandth of a pixel.
    assert found["segm"] == pytest.approx(expected["segm"], nan_ok=True)
    assert found["bbox"] == pytest.approx(expected["bbox"], abs=0.1, nan_ok=True)


def _evaluate_a_half(rank: int, folder: str, rendezvous: str) -> None:
    # A forked process has none of its parent's threads.
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    comm.create_local_process_group(2)
    rng = np.random.default_rng(8)
    dataset = random_dataset(rng, num_images=4, num_classes=2, crowds=True)
    pairs = as_outputs(dataset, perturbed(dataset, rng, score_levels=10**6, copies=3))
    register(f"half_{rank}", dataset, Path(folder))
    found = evaluate(FasterCOCOEvaluator(f"half_{rank}", TASKS), pairs[2 * rank : 2 * rank + 2])
    Path(folder, f"found_{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def test_two_processes_find_what_one_finds(named_dataset, tmp_path):
    arguments = (str(tmp_path), str(tmp_path / "rendezvous"))
    mp.start_processes(_evaluate_a_half, arguments, nprocs=2, start_method="fork")
    rng = np.random.default_rng(8)
    dataset = random_dataset(rng, num_images=4, num_classes=2, crowds=True)
    pairs = as_outputs(dataset, perturbed(dataset, rng, score_levels=10**6, copies=3))
    expected = evaluate(FasterCOCOEvaluator(named_dataset(dataset), TASKS, distributed=False), pairs)
    found = [json.loads((tmp_path / f"found_{rank}.json").read_text()) for rank in range(2)]
    assert found[1] == {}
    for task in TASKS:
        assert found[0][task] == pytest.approx(expected[task], nan_ok=True)
