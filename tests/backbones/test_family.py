"""The family of operators learns in ViTDet, chosen by the keys of MODEL.KARAT."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage

from karat_det.attention import KArAtConfig
from karat_det.backbones.vitdet import karat_config
from karat_det.engine.setup import load_cfg

BASES = ("fourier", "bspline", "rational", "mexican_hat", "morlet", "dog", "meyer", "shannon")

# Two blocks that attend to all of 4 × 4 patches.
TINY = {
    "MODEL.VIT.IMG_SIZE": 32,
    "MODEL.VIT.PATCH_SIZE": 8,
    "MODEL.VIT.EMBED_DIM": 16,
    "MODEL.VIT.DEPTH": 2,
    "MODEL.VIT.NUM_HEADS": 2,
    "MODEL.VIT.WINDOW_BLOCKS": [],
    "MODEL.VIT.PRETRAIN_IMG_SIZE": 32,
    "MODEL.VIT.DROP_PATH_RATE": 0.0,
    "MODEL.VIT.SCALE_FACTORS": [1.0, 0.5],
    "MODEL.FPN.OUT_CHANNELS": 8,
    "MODEL.RPN.IN_FEATURES": ["p3", "p4"],
    "MODEL.ROI_HEADS.IN_FEATURES": ["p3", "p4"],
    "MODEL.ANCHOR_GENERATOR.SIZES": [[8], [16]],
    "MODEL.KARAT.RANK": 3,
}
TINY_HEADS = {
    "MODEL.PIXEL_MEAN": [0.0, 0.0, 0.0],
    "MODEL.PIXEL_STD": [1.0, 1.0, 1.0],
    "MODEL.ROI_HEADS.NUM_CLASSES": 2,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 8,
    "MODEL.ROI_BOX_HEAD.NUM_CONV": 0,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 16,
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 8,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 50,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 20,
    "MODEL.DEVICE": "cpu",
}

STRUCTURES = [
    {"SHARING": "blockwise"},
    {"SHARING": "blockwise", "ORDER": "project_before"},
    {"SHARING": "universal", "ORDER": "two_operators", "RESIDUAL": "softmax"},
    {"SHARING": "universal", "RANK": None},
    {"SHARING": "blockwise", "NUM_KARAT_HEADS": 1, "RESIDUAL": "softmax"},
    {"SHARING": "universal", "NUM_KARAT_HEADS": 1, "PROJECTION": "simplex"},
    {"SHARING": "universal", "BASE_FUNCTION": "gelu", "INIT": "paper"},
    {"SHARING": "blockwise", "BASE_FUNCTION": "silu", "RESIDUAL": "softmax", "GRID_SIZE": 5},
]
# Each basis and each structure twice.
ALL = [
    {"BASIS": basis, **STRUCTURES[(place + offset) % len(STRUCTURES)]}
    for offset in (0, 3)
    for place, basis in enumerate(BASES)
] + [{"BASIS": "bspline", "SPLINE_ORDER": 2, "SPLINE_RANGE": 1.5, "GRID_SIZE": 4}]


def load(configs, keys, sections):
    values = sections | {f"MODEL.KARAT.{key}": value for key, value in keys.items()}
    return load_cfg(str(configs / "base_vitdet.yaml"), [str(part) for item in values.items() for part in item])


def train(model, loss_of, steps=8):
    """Trains for some steps; the loss falls, stays finite, and every tensor of the operators has moved."""
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        loss = loss_of(model)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        losses.append(loss.item())
    assert all(np.isfinite(losses))
    assert losses[-1] < 0.97 * losses[0]
    operators = {name for name in start if ".operator." in name}
    assert operators
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        assert name not in operators or not torch.equal(parameter, start[name]), name


@pytest.mark.parametrize("keys", ALL, ids=lambda keys: "-".join(str(value) for value in keys.values()))
def test_it_learns(configs, keys):
    cfg = load(configs, keys, TINY)
    torch.manual_seed(0)
    backbone = build_backbone(cfg, ShapeSpec(channels=3))
    images, target = torch.randn(4, 3, 32, 32), torch.randn(4, 8, 4, 4)
    train(backbone, lambda backbone: (backbone(images)["p3"] - target).square().mean())


@pytest.mark.parametrize(
    "keys",
    [
        {"RESIDUAL": "softmax", "GRID_SIZE": 3},
        {"BASIS": "rational", "SHARING": "blockwise", "NUM_KARAT_HEADS": 1},
        {"BASIS": "bspline", "ORDER": "two_operators", "INIT": "paper"},
    ],
    ids=str,
)
def test_it_learns_in_mask_rcnn(configs, keys):
    cfg = load(configs, keys, TINY | TINY_HEADS)
    torch.manual_seed(1)
    model = build_model(cfg)
    instances = Instances((32, 32))
    instances.gt_boxes = Boxes(torch.tensor([[4.0, 6.0, 24.0, 28.0]]))
    instances.gt_classes = torch.tensor([1])
    instances.gt_masks = PolygonMasks([[np.array([4.0, 6, 24, 6, 24, 28, 4, 28])]])
    batch = [{"image": torch.randn(3, 32, 32), "instances": instances}]

    def loss(model):
        torch.manual_seed(2)  # the heads draw the same samples in each step
        with EventStorage():
            return sum(model(batch).values())

    train(model, loss, steps=25)


def test_every_field_of_the_config_is_read_from_its_key(configs):
    values = {
        "basis": "bspline",
        "grid_size": 4,
        "rank": 5,
        "base_function": "silu",
        "order": "two_operators",
        "projection": "simplex",
        "residual": "none",
        "num_karat_heads": 1,
        "init": "paper",
        "spline_order": 2,
        "spline_range": 1.5,
        "triton": False,
    }
    assert set(values) == {field.name for field in fields(KArAtConfig)}
    cfg = load(configs, {name.upper(): value for name, value in values.items()}, TINY)
    assert karat_config(cfg) == KArAtConfig(**values)
    assert karat_config(load(configs, {"RANK": None}, {})).rank is None


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"NUM_KARAT_HEADS": 0}, "MODEL.KARAT.NUM_KARAT_HEADS is 0. It must be a whole number, at least 1"),
        ({"RANK": None, "ORDER": "two_operators"}, 'MODEL.KARAT.RANK is None, but order "two_operators"'),
        ({"SPLINE_RANGE": 0.0}, "MODEL.KARAT.SPLINE_RANGE is 0.0. It must be a finite number above 0"),
        (
            {"RANK": None, "RESIDUAL": "softmax", "BASE_FUNCTION": "silu"},
            'MODEL.KARAT.BASE_FUNCTION is "silu", which with residual "softmax" needs a W',
        ),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_by_the_name_of_its_key(configs, keys, message):
    with pytest.raises(ValueError, match=message):
        build_backbone(load(configs, keys, TINY), ShapeSpec(channels=3))
