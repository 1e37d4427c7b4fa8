"""What several processes make of the same images: DistributedDataParallel's mean of each process's gradient."""

import numpy as np
import pytest
import torch
from detectron2.engine import create_ddp_model
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from forked import in_processes

from karat_det.backbones.classifiers import build_classifier
from karat_det.engine.pretraining import load_pretrain_cfg
from karat_det.engine.pretraining_builders import WithLoss
from karat_det.engine.setup import load_cfg

# Every anchor and proposal counts, so that none is drawn, and each image has as many.
ALL_PROPOSALS = {
    "MODEL.DEVICE": "cpu",
    "MODEL.VIT.EMBED_DIM": 24,
    "MODEL.VIT.DEPTH": 2,
    "MODEL.VIT.DROP_PATH_RATE": 0.0,
    "MODEL.FPN.OUT_CHANNELS": 8,
    "MODEL.ROI_BOX_HEAD.CONV_DIM": 8,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 8,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 8,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 100_000,
    "MODEL.RPN.NMS_THRESH": 1.0,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 60,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 1000,
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": 1.0,
}
MEANS_OVER_ALL = ("loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg")


@pytest.fixture(scope="module")
def cfg(configs):
    return load_cfg(str(configs / "quickstart.yaml"), [str(word) for pair in ALL_PROPOSALS.items() for word in pair])


@pytest.fixture(scope="module")
def images(cfg):
    """Four images with two objects each."""
    generator = torch.Generator().manual_seed(0)
    size = cfg.MODEL.VIT.IMG_SIZE
    made = []
    for _ in range(4):
        corners = torch.rand(2, 2, generator=generator) * size / 2
        sizes = size / 8 + torch.rand(2, 2, generator=generator) * size / 4
        instances = Instances((size, size))
        instances.gt_boxes = Boxes(torch.cat([corners, corners + sizes], dim=1))
        instances.gt_classes = torch.randint(cfg.MODEL.ROI_HEADS.NUM_CLASSES, (2,), generator=generator)
        masks = torch.zeros(2, size, size, dtype=torch.bool)
        for mask, (left, top, right, bottom) in zip(masks, instances.gt_boxes.tensor.int().tolist(), strict=True):
            mask[top:bottom, left:right] = True
        instances.gt_masks = BitMasks(masks)
        made.append({"image": torch.randint(256, (3, size, size), generator=generator), "instances": instances})
    return made


def gradients(cfg, images, terms):
    """Gradients of the sum of some loss terms over this process's share of the images, as the trainer has them."""
    torch.manual_seed(0)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.INPUT.MASK_FORMAT = "bitmask"
    model = build_model(cfg).train()
    in_parallel = create_ddp_model(model, broadcast_buffers=False, device_ids=None)
    with EventStorage():
        losses = in_parallel(images[comm.get_rank() :: comm.get_world_size()])
    # The others count nothing, but DistributedDataParallel waits for the gradient of each parameter.
    sum(loss * (name in terms) for name, loss in losses.items()).backward()
    return {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}


def classifier_gradients(cfg, images, labels):
    """Of a classifier's loss over this process's share."""
    torch.manual_seed(0)
    with_loss = WithLoss(build_classifier(cfg, num_classes=5), cfg).train()
    in_parallel = create_ddp_model(with_loss, broadcast_buffers=False, device_ids=None)
    share = slice(comm.get_rank(), None, comm.get_world_size())
    in_parallel((images[share], labels[share]))["loss"].backward()
    return {name: parameter.grad.numpy() for name, parameter in with_loss.named_parameters()}


def distance(some, others):
    """Largest difference of two gradients, over the largest entry of the first."""
    assert some.keys() == others.keys()
    largest = max(np.abs(gradient).max() for gradient in some.values())
    return max(np.abs(some[name] - others[name]).max() for name in some) / largest


def test_gradients_of_two_processes_are_those_of_one_where_losses_are_means_over_all_proposals(cfg, images, tmp_path):
    alone = gradients(cfg, images, MEANS_OVER_ALL)
    first, second = in_processes(tmp_path, 2, gradients, cfg, images, MEANS_OVER_ALL)
    assert distance(first, second) == 0
    assert distance(alone, first) < 1e-6


def test_a_classifiers_gradients_of_two_processes_are_those_of_one(tmp_path):
    sizes = "MODEL.IMG_SIZE 16 MODEL.PATCH_SIZE 8 MODEL.EMBED_DIM 12 MODEL.DEPTH 2 MODEL.NUM_HEADS 2 MODEL.KARAT.RANK 3"
    cfg = load_pretrain_cfg("", [*sizes.split(), "MODEL.DEVICE", "cpu", "MODEL.DROP_PATH_RATE", "0.0"])
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(6, 3, 16, 16, generator=generator)
    labels = torch.rand(6, 5, generator=generator).softmax(dim=1)
    alone = classifier_gradients(cfg, images, labels)
    first, _ = in_processes(tmp_path, 2, classifier_gradients, cfg, images, labels)
    assert distance(alone, first) < 1e-6


def test_a_loss_that_is_a_mean_over_a_processs_objects_is_averaged_over_processes(cfg, images, tmp_path):
    terms = ("loss_mask",)
    halves = [gradients(cfg, images[rank::2], terms) for rank in range(2)]
    together, _ = in_processes(tmp_path, 2, gradients, cfg, images, terms)
    assert distance({name: (halves[0][name] + halves[1][name]) / 2 for name in together}, together) < 1e-6
    # Proposals that meet an object are not as many in both.
    assert distance(gradients(cfg, images, terms), together) > 1e-4
