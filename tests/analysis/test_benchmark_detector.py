"""karat_det.analysis.benchmark_detector: synthetic batches, and steps whose heads have as much to do."""

import pytest
import torch

from karat_det.analysis.benchmark_detector import make_step, synthetic_batch
from karat_det.engine.setup import load_cfg


def test_a_synthetic_batch_is_the_same_each_time_and_its_boxes_are_in_the_image(configs):
    cfg = load_cfg(str(configs / "quickstart.yaml"), [])
    batch, again = synthetic_batch(cfg, 2), synthetic_batch(cfg, 2)
    assert len(batch) == 2
    for one, other in zip(batch, again, strict=True):
        assert one["image"].shape == (3, 112, 112)
        assert torch.equal(one["image"], other["image"])
        boxes = one["instances"].gt_boxes.tensor
        assert torch.equal(boxes, other["instances"].gt_boxes.tensor)
        assert len(boxes) == len(one["instances"].gt_masks) == 8
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert boxes.min() >= 0
        assert boxes.max() <= 112
        assert one["instances"].gt_classes.max() < 10
    assert not torch.equal(batch[0]["image"], batch[1]["image"])


@pytest.mark.parametrize("enabled", ["True", "False"])
def test_the_heads_of_a_step_get_as_many_positive_proposals_as_they_may(configs, enabled):
    opts = ["MODEL.DEVICE", "cpu", "MODEL.KARAT.ENABLED", enabled]
    cfg = load_cfg(str(configs / "quickstart.yaml"), opts)
    step = make_step(cfg, batch_size=2)
    heads, sampled = step.model.roi_heads, []
    label_and_sample = heads.label_and_sample_proposals
    heads.label_and_sample_proposals = lambda *args: sampled.append(label_and_sample(*args)) or sampled[-1]
    step.train(0, 2)
    assert len(sampled) == 2
    for instances in (instances for of_step in sampled for instances in of_step):
        boxes = instances.proposal_boxes.tensor
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert len(boxes) == cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE
        positives = (instances.gt_classes < cfg.MODEL.ROI_HEADS.NUM_CLASSES).sum()
        assert positives == cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE * cfg.MODEL.ROI_HEADS.POSITIVE_FRACTION
