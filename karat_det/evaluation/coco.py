"""COCO evaluation: Detectron2's COCOEvaluator with faster-coco-eval doing the sums.

Detectron2 gathers the predictions, makes metrics of the sums and tabulates; the C++ evaluator of faster-coco-eval
matches, accumulates and summarizes in place of pycocotools' Python one. The twelve figures of the COCO summary, and the
precision array of shape (IoU thresholds, recall thresholds, classes, area ranges, maximum detections) that the AP of
each class is read from, are those of pycocotools.
"""

import json
import logging
import os
from collections.abc import Sequence
from typing import Any

from detectron2.evaluation import COCOEvaluator
from detectron2.utils.file_io import PathManager
from faster_coco_eval import COCO, COCOeval_faster, __version__

logger = logging.getLogger(__name__)


class FasterCOCOEvaluator(COCOEvaluator):
    """Box and mask AP of a model on one dataset.

    The results are Detectron2's: for each task "AP", "AP50", "AP75", "APs", "APm", "APl", and with more than one class
    "AP-<class name>", in percent; nan where nothing can be measured (a class without ground truth, or no prediction
    at all). Where the JSON has no "annotations", as COCO's test sets, there are none. Under torch.distributed the
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
            dataset_name: a registered dataset with instance annotations.
            tasks: any of "bbox" and "segm"; None reads them off the predictions, so that a model that has not
                predicted anything is measured by its boxes alone.
            distributed: gather the predictions of all processes.
            output_dir: folder for `coco_instances_results.json` and `instances_predictions.pth`; None writes neither.
        """
        # Asking Detectron2 for its own compiled evaluator would log that it is missing: this class has no use for it.
        super().__init__(dataset_name, tasks, distributed, output_dir, use_fast_impl=False)
        self._coco_api = COCO(self._coco_api.dataset)

    def _eval_predictions(self, predictions: list[dict[str, Any]], img_ids: Sequence[int] | None = None) -> None:
        """Takes the place of Detectron2's method, which can use no evaluators but its own two.

        Args:
            predictions: for each image "image_id" and "instances", a list of COCO results with class numbers.
            img_ids: the images to evaluate; None for all.
        """
        id_of_class = {i: id for id, i in self._metadata.get("thing_dataset_id_to_contiguous_id", {}).items()}
        results = [
            {**result, "category_id": id_of_class.get(result["category_id"], result["category_id"])}
            for prediction in predictions
            for result in prediction["instances"]
        ]
        if self._output_dir:
            path = os.path.join(self._output_dir, "coco_instances_results.json")
            logger.info("Saving %d predictions to %s", len(results), path)
            with PathManager.open(path, "w") as file:
                file.write(json.dumps(results))
        if not self._do_evaluation:
            logger.info("The dataset has no annotations: nothing is measured.")
            return
        logger.info("Evaluating with faster-coco-eval %s", __version__)
        for task in self._tasks or self._tasks_from_predictions(results):
            sums = self._sums(results, task, img_ids) if results else None
            self._results[task] = self._derive_coco_results(sums, task, self._metadata.get("thing_classes"))

    def _sums(self, results: list[dict[str, Any]], task: str, img_ids: Sequence[int] | None) -> COCOeval_faster:
        """Matches, accumulates and summarizes; the summary is one entry of the log."""
        # Beside a box, a mask would count as small or large by the box's area. Loading writes to what it is given, so
        # it gets copies for either task.
        unused = "bbox" if task == "segm" else ""
        loaded = self._coco_api.loadRes([{k: v for k, v in result.items() if k != unused} for result in results])
        lines: list[str] = []
        sums = COCOeval_faster(self._coco_api, loaded, task, print_function=lines.append)
        if img_ids is not None:
            sums.params.imgIds = img_ids
        sums.evaluate()
        sums.accumulate()
        lines.clear()
        sums.summarize()
        logger.info("COCO summary for %s, from 0 to 1 (-1: no such object):\n%s", task, "\n".join(lines))
        return sums
