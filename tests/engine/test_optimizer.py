import math

import pytest
import torch
from detectron2.modeling import build_model

from karat_det.engine.optimizer import build_optimizer, lr_factor
from karat_det.engine.setup import load_cfg


@pytest.fixture(scope="module")
def settings(configs):
    """Name -> (learning rate, weight decay) of every parameter of the quickstart detector with layer decay."""
    opts = "SOLVER.LAYER_DECAY 0.5 SOLVER.BASE_LR 1.0 SOLVER.WEIGHT_DECAY 0.1".split()
    cfg = load_cfg(str(configs / "quickstart.yaml"), opts)
    model = build_model(cfg)
    names = {parameter: name for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(cfg, model)
    settings = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert names[parameter] not in settings
            settings[names[parameter]] = (group["lr"], group["weight_decay"])
    assert set(settings) == set(names.values())
    return settings


@pytest.mark.parametrize(
    ("name", "lr"),
    [
        ("backbone.net.pos_embed", 0.5**7),
        ("backbone.net.patch_embed.proj.weight", 0.5**7),
        ("backbone.net.blocks.0.attn.qkv.weight", 0.5**6),
        ("backbone.net.blocks.3.mlp.fc1.bias", 0.5**3),
        ("backbone.net.blocks.5.norm1.weight", 0.5),
        ("backbone.net.operator.coefficients", 0.5),
        ("backbone.net.operator.projector", 0.5),
        ("backbone.simfp_2.0.weight", 1.0),
        ("roi_heads.box_head.fc1.weight", 1.0),
        ("proposal_generator.rpn_head.objectness_logits.weight", 1.0),
    ],
)
def test_learning_rate_decays_by_layer_and_the_universal_operator_is_the_last_block(settings, name, lr):
    assert settings[name][0] == pytest.approx(lr)


def test_blockwise_operators_have_the_rate_of_their_block():
    assert lr_factor("backbone.net.blocks.2.attn.operator.projector", 0.5, 6) == pytest.approx(0.5**4)


def test_positions_norms_biases_and_coefficients_have_no_weight_decay_and_all_else_has(settings):
    without = {name for name, (_, decay) in settings.items() if decay == 0}
    for name, (_, decay) in settings.items():
        leaf = name.rpartition(".")[2]
        is_norm = ".norm" in name and leaf in ("weight", "bias")
        exempt = leaf in ("pos_embed", "rel_pos_h", "rel_pos_w", "coefficients", "bias") or is_norm
        # The norms of the pyramid's second layer of 2× levels carry a number for a name.
        if not exempt and leaf == "weight":
            exempt = name in without and not any(word in name for word in ("qkv", "proj", "fc", "conv", "attn"))
        assert (decay == 0) == exempt, name
    assert {"backbone.net.pos_embed", "backbone.net.operator.coefficients", "backbone.net.blocks.0.attn.rel_pos_h"} <= without
    assert settings["backbone.net.operator.projector"][1] == 0.1
    assert settings["backbone.simfp_2.1.norm.weight"][1] == 0


def test_layer_decay_one_is_one_rate_for_all(configs):
    cfg = load_cfg(str(configs / "quickstart.yaml"), [])
    optimizer = build_optimizer(cfg, build_model(cfg))
    assert {group["lr"] for group in optimizer.param_groups} == {cfg.SOLVER.BASE_LR}
    assert (optimizer.defaults["eps"], optimizer.defaults["betas"]) == (1e-6, (0.9, 0.999))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert math.isclose(max(group["weight_decay"] for group in optimizer.param_groups), cfg.SOLVER.WEIGHT_DECAY)
