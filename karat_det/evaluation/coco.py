"""COCO evaluation: Detectron2's COCOEvaluator with faster-coco-eval doing the sums.

Detectron2 gathers the predictions, maps class numbers to category ids, writes the results JSON and tabulates; the C++
evaluator of faster-coco-eval matches, accumulates and summarizes in place of pycocotools' Python one. The twelve
figures of the COCO summary, and the precision array of shape (IoU thresholds, recall thresholds, classes, area ranges,
maximum detections) that the AP of each class is read from, are those of pycocotools.
"""

import logging
from collections.abc import Sequence
from unittest import mock

import faster_coco_eval
from detectron2.evaluation import COCOEvaluator, coco_evaluation

logger = logging.getLogger(__name__)


class _COCOeval(faster_coco_eval.COCOeval_faster):
    """faster-coco-eval's evaluator, called as Detectron2 calls one, with its summary as one entry of the log."""

    def __init__(self, coco_gt: faster_coco_eval.COCO, coco_dt: faster_coco_eval.COCO, iou_type: str):
        super().__init__(coco_gt, coco_dt, iou_type, print_function=logger.debug)

    def summarize(self) -> None:
        lines: list[str] = []
        self.print_function = lines.append
        super().summarize()
        logger.info("COCO summary for %s:\n%s", self.params.iouType, "\n".join(lines))


class FasterCOCOEvaluator(COCOEvaluator):
    """Box and mask AP of a model on one dataset.

    The results are Detectron2's: for each task "AP", "AP50", "AP75", "APs", "APm", "APl", and with more than one class
    "AP-<class name>", in percent; nan where nothing can be measured (a class without ground truth, or no prediction
    at all). Under torch.distributed the predictions are gathered on the main process, and the others return {}.
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
        self._use_fast_impl = True
        self._coco_api = faster_coco_eval.COCO(self._coco_api.dataset)

    def _eval_predictions(self, predictions, img_ids=None):
        logger.info("faster-coco-eval %s does the sums.", faster_coco_eval.__version__)
        # Detectron2 looks its evaluator up in a global of its module, and offers no argument for another one.
        with mock.patch.object(coco_evaluation, "COCOeval_opt", _COCOeval):
            super()._eval_predictions(predictions, img_ids)
