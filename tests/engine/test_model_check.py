import pytest
import torch
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, ShapeSpec
from torch import nn

from karat_det.engine.model_check import check_model
from karat_det.engine.setup import load_cfg


class _Own(Backbone):
    def __init__(self, cfg, input_shape):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)

    def forward(self, images):
        raise AssertionError("it is only built")

    def output_shape(self):
        return {f"p{level}": ShapeSpec(channels=8, stride=2**level) for level in range(2, 7)}


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(3) + torch.arange(3),
        lambda: torch.cat([torch.zeros(2), torch.arange(2.0)]),
        lambda: torch.where(torch.arange(3) > 1, torch.zeros(3), torch.arange(3.0)),
        lambda: torch.zeros(3).numpy(),
        lambda: torch.ones(3).sum().item(),
    ],
)
def test_a_backbone_of_ones_own_may_read_what_it_makes(configs, monkeypatch, make):
    class Own(_Own):
        def __init__(self, cfg, input_shape):
            super().__init__(cfg, input_shape)
            make()

    monkeypatch.setitem(BACKBONE_REGISTRY._obj_map, "Own", Own)
    opts = ["MODEL.BACKBONE.NAME", "Own", "MODEL.DEVICE", "cpu"]
    check_model(load_cfg(str(configs / "quickstart.yaml"), opts), training=True)


def test_what_such_a_backbone_raises_is_told(configs, monkeypatch):
    class Own(_Own):
        def __init__(self, cfg, input_shape):
            raise RuntimeError(f"{torch.zeros(3).sum().item():g} is too few")

    monkeypatch.setitem(BACKBONE_REGISTRY._obj_map, "Own", Own)
    with pytest.raises(ValueError, match=r"The model of this config cannot be built: 0 is too few"):
        check_model(load_cfg(str(configs / "quickstart.yaml"), ["MODEL.BACKBONE.NAME", "Own"]), training=True)


@pytest.mark.parametrize("norm", ["", "BN", "FrozenBN", "GN", "naiveSyncBN", "naiveSyncBN_N", "LN"])
def test_every_norm_of_detectron2_for_the_cpu_is_taken(configs, norm):
    opts = ["MODEL.ROI_MASK_HEAD.NORM", norm, "MODEL.DEVICE", "cpu"]
    check_model(load_cfg(str(configs / "quickstart.yaml"), opts), training=True)
