"""COCO evaluation: Detectron2's COCOEvaluator, with faster-coco-eval for the sums.

Detectron2 gathers the predictions, makes metrics of the sums and tabulates; the C++ evaluator of faster-coco-eval
matches, accumulates and summarizes in place of pycocotools' Python one. Its results equal those of pycocotools: the
twelve figures of the COCO summary, and the precision array of shape (IoU thresholds, recall thresholds, classes, area
ranges, maximum detections), from which the AP of each class is computed.

`karat_det.data.formats.coco` reads the ground truth, as in training. Both evaluators need small positive integers for
ids (id 0 of an annotation is "no match", one above 2^53 is rounded). So images, classes and annotations are numbered
for the sums; the JSON of the results has the dataset's ids.
"""

import json
import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.data import MetadataCatalog
from detectron2.data.datasets import convert_to_coco_json
from detectron2.evaluation import COCOEvaluator
from detectron2.utils.file_io import PathManager
from faster_coco_eval import COCO, COCOeval_faster, __version__
from pycocotools.coco import COCO as PlainCOCO

from ..data.coco_datasets import content_of, source_of
from ..data.formats.coco import CocoContent, read_coco

logger = logging.getLogger(__name__)


class FasterCOCOEvaluator(COCOEvaluator):
    """Box and mask AP of a model on one dataset.

    The results are Detectron2's: for each task "AP", "AP50", "AP75", "APs", "APm", "APl", and with more than one class
    "AP-<class name>", in percent; nan where nothing can be measured (a class without ground truth, or no prediction
    at all). A JSON without "annotations", such as COCO's test sets, gives none. Under torch.distributed the
    predictions are gathered on the main process, and the others return {}.
    """

    def __init__(
        self,
        dataset_name: str,
        tasks: Sequence[str] | None = None,
        distributed: bool = True,
        output_dir: str | None = None,
    ):
        """
        Args:
            dataset_name: a registered dataset with instance annotations. If it is in another format than COCO's, it is
                converted, for which it needs `output_dir`.
            tasks: "bbox", "segm" or both; None takes those that the predictions have, so that a model without
                any prediction is measured by its boxes alone.
            distributed: gather the predictions of all processes.
            output_dir: folder for `coco_instances_results.json` and `instances_predictions.pth`; None writes neither.

        Raises:
            ValueError: the dataset's JSON is not in COCO format, or it is in another format and there is no
                `output_dir`.
            FileNotFoundError: there is no such JSON.
        """
        # Detectron2's __init__ would read the JSON with pycocotools, unchecked. These are its attributes.
        self._logger = logging.getLogger("detectron2.evaluation.coco_evaluation")
        self._distributed = distributed
        self._output_dir = output_dir
        self._tasks = tasks
        self._cpu_device = torch.device("cpu")
        self._metadata = MetadataCatalog.get(dataset_name)
        self._source = source_of(dataset_name)
        if self._metadata.get("json_file") and self._metadata.get("evaluator_type", "coco") == "coco":
            content = content_of(dataset_name)
        elif output_dir is None:
            raise ValueError(f"Dataset {dataset_name!r} is not in COCO format. To convert it, name an output_dir.")
        else:
            json_file = os.path.join(output_dir, f"{dataset_name}_coco_format.json")
            convert_to_coco_json(dataset_name, json_file, allow_cached=False)
            content = read_coco(json_file, self._source)
        self._content = content
        self._do_evaluation = content.annotations is not None
        # Classes are numbered in the order of their ids, unless the dataset was registered with another order.
        order = self._metadata.get("thing_dataset_id_to_contiguous_id", {})
        self._class_of = [order.get(id, i) for i, id in enumerate(content.category_ids)]
        self._category_ids = {number: id for number, id in zip(self._class_of, content.category_ids, strict=True)}
        self._image_numbers = {image.id: i for i, image in enumerate(content.images)}

    def process(self, inputs: Sequence[dict[str, Any]], outputs: Sequence[dict[str, Any]]) -> None:
        """Takes the predictions of some images.

        Args:
            inputs: records with "image_id", the dataset's own id.
            outputs: for each image "instances" or "proposals".

        Raises:
            ValueError: a prediction is of an image or a class that the dataset does not have, or it has no mask where
                masks are evaluated.
        """
        for record, output in zip(inputs, outputs, strict=True):
            if record["image_id"] not in self._image_numbers:
                raise ValueError(
                    f"A prediction is of image {record['image_id']!r}, which {self._source} does not have."
                )
            if "instances" not in output or not len(output["instances"]):
                continue
            if "segm" in (self._tasks or ()) and not output["instances"].has("pred_masks"):
                raise ValueError(
                    f"The predictions of image {record['image_id']!r} have no masks, which are to be evaluated. Set "
                    "MODEL.MASK_ON False for a model that finds boxes only."
                )
            found = output["instances"].pred_classes
            unknown = sorted(set(found.tolist()) - set(self._class_of))
            if unknown:
                raise ValueError(
                    f"A prediction of image {record['image_id']!r} is of class {unknown[0]}, but {self._source} has "
                    f"{len(self._class_of)} classes, from 0 to {len(self._class_of) - 1}. Give the model as many "
                    "classes (MODEL.ROI_HEADS.NUM_CLASSES or what its architecture has instead), or evaluate it on "
                    "its own dataset."
                )
        super().process(inputs, outputs)

    def _eval_predictions(self, predictions: list[dict[str, Any]], img_ids: Sequence[Any] | None = None) -> None:
        """Replaces Detectron2's method, which can use no evaluators but its own two.

        Args:
            predictions: for each image "image_id" and "instances", a list of COCO results with class numbers.
            img_ids: the images to evaluate, by the dataset's ids; None for all.
        """
        results = [result for prediction in predictions for result in prediction["instances"]]
        if self._output_dir:
            path = os.path.join(self._output_dir, "coco_instances_results.json")
            logger.info("Saving %d predictions to %s", len(results), path)
            own = [{**result, "category_id": self._category_ids[result["category_id"]]} for result in results]
            with PathManager.open(path, "w") as file:
                file.write(json.dumps(own))
        if not self._do_evaluation:
            logger.info("The dataset has no annotations: nothing is measured.")
            return
        logger.info("Evaluating with faster-coco-eval %s", __version__)
        tasks = self._tasks or self._tasks_from_predictions(results)
        # A mask takes tens of times the memory of a box.
        truth = COCO(ground_truth(self._content, self._class_of, masks="segm" in tasks)) if results else None
        numbers = None if img_ids is None else [self._image_numbers[id] for id in img_ids]
        for task in tasks:
            sums = self._sums(truth, results, task, numbers) if results else None
            self._results[task] = self._derive_coco_results(sums, task, self._metadata.get("thing_classes"))

    def _eval_box_proposals(self, predictions: list[dict[str, Any]]) -> None:
        # Detectron2 measures these with pycocotools, by the ids of its predictions.
        truth = ground_truth(self._content, self._class_of, masks=False)
        ids = [image.id for image in self._content.images]
        self._coco_api = _ByOwnIds()
        self._coco_api.dataset = {
            **truth,
            "images": [{**image, "id": ids[image["id"]]} for image in truth["images"]],
            "annotations": [{**each, "image_id": ids[each["image_id"]]} for each in truth["annotations"]],
        }
        self._coco_api.createIndex()
        super()._eval_box_proposals(predictions)

    def _sums(
        self, truth: COCO, results: list[dict[str, Any]], task: str, img_ids: Sequence[int] | None
    ) -> COCOeval_faster:
        """Matches, accumulates and summarizes; the summary is one entry of the log."""
        # With a box, a mask would count as small or large by the box's area. Loading writes to its argument, so each
        # task gets a copy.
        unused = "bbox" if task == "segm" else ""
        numbered = [
            {
                **{key: value for key, value in result.items() if key != unused},
                "image_id": self._image_numbers[result["image_id"]],
            }
            for result in results
        ]
        lines: list[str] = []
        sums = COCOeval_faster(truth, truth.loadRes(numbered), task, print_function=lines.append)
        if img_ids is not None:
            sums.params.imgIds = img_ids
        sums.evaluate()
        sums.accumulate()
        lines.clear()
        sums.summarize()
        logger.info("COCO summary for %s, from 0 to 1 (-1: no such object):\n%s", task, "\n".join(lines))
        return sums


class _ByOwnIds(PlainCOCO):
    """pycocotools' COCO with ids of images that may be text, which it would read as a list of letters."""

    def getAnnIds(self, imgIds: Any) -> list[int]:
        return super().getAnnIds([imgIds])


def ground_truth(content: CocoContent, class_of: Sequence[int], masks: bool) -> dict[str, Any]:
    """A dataset in COCO format with numbers for ids: images and classes from 0, annotations from 1.

    Args:
        content: the dataset as it was read.
        class_of: for each category of `content` the number of its class.
        masks: whether to include masks and leave out objects with an empty mask, as in training with masks.

    Returns:
        A new dict; boxes and masks are shared with `content`.

    Raises:
        ValueError: an object has no mask.
    """
    keys = ("bbox", "area", "iscrowd", "segmentation") if masks else ("bbox", "area", "iscrowd")
    annotations: list[dict[str, Any]] = []
    for number, of_image in enumerate(content.annotations or ()):
        for each in of_image:
            if masks and each.get("empty_mask"):
                continue
            if masks and "segmentation" not in each:
                raise ValueError(
                    f"The annotation with id {each['id']!r} of image {content.images[number].id!r} has no mask, so "
                    "masks cannot be evaluated. Add the masks, or evaluate boxes only (MODEL.MASK_ON False)."
                )
            # Matches are marked by ids, 0 for none.
            ids = {"id": len(annotations) + 1, "image_id": number, "category_id": class_of[each["category_id"]]}
            annotations.append({**ids, **{key: each[key] for key in keys}})
    return {
        "images": [{"id": i, "width": image.width, "height": image.height} for i, image in enumerate(content.images)],
        "categories": [{"id": number, "name": str(number)} for number in sorted(class_of)],
        "annotations": annotations,
    }
