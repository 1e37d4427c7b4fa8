import math

import detectron2.layers.batch_norm
import pytest
import torch
from detectron2.modeling import build_model

from karat_det.engine.optimizer import build_optimizer, lr_factor
from karat_det.engine.setup import load_cfg


@pytest.fixture(scope="module")
def cfg(configs):
    opts = "SOLVER.LAYER_DECAY 0.5 SOLVER.BASE_LR 1.0 SOLVER.WEIGHT_DECAY 0.1"
    return load_cfg(str(configs / "quickstart.yaml"), opts.split())


@pytest.fixture(scope="module")
def model(cfg):
    return build_model(cfg)


@pytest.fixture(scope="module")
def settings(cfg, model):
    """Name -> (learning rate, weight decay) of every parameter of the quickstart detector with layer decay."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = build_optimizer(cfg, model).param_groups
    members = [(names[parameter], group) for group in groups for parameter in group["params"]]
    assert sorted(name for name, _ in members) == sorted(names.values())
    return {name: (group["lr"], group["weight_decay"]) for name, group in members}


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


def test_positions_norms_biases_and_coefficients_have_no_weight_decay_and_all_else_has(settings, model):
    norms = (torch.nn.LayerNorm, detectron2.layers.batch_norm.LayerNorm)
    exempt = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, norms)}
    assert {"backbone.net.blocks.5.norm1.weight", "backbone.simfp_2.1.norm.weight"} <= exempt
    leaves = ("pos_embed", "rel_pos_h", "rel_pos_w", "coefficients", "bias")
    exempt |= {name for name in settings if name.rpartition(".")[2] in leaves}
    assert {name for name, (_, decay) in settings.items() if decay == 0.0} == exempt
    assert {decay for name, (_, decay) in settings.items() if name not in exempt} == {0.1}
    assert "backbone.net.operator.projector" not in exempt


def test_layer_decay_one_is_one_rate_for_all(configs):
    cfg = load_cfg(str(configs / "quickstart.yaml"), [])
    optimizer = build_optimizer(cfg, build_model(cfg))
    assert {group["lr"] for group in optimizer.param_groups} == {cfg.SOLVER.BASE_LR}
    assert (optimizer.defaults["eps"], optimizer.defaults["betas"]) == (1e-6, (0.9, 0.999))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert math.isclose(max(group["weight_decay"] for group in optimizer.param_groups), cfg.SOLVER.WEIGHT_DECAY)


def test_swins_positions_have_no_weight_decay(configs):
    opts = "MODEL.SWIN.APE True MODEL.SWIN.DEPTHS [1] MODEL.SWIN.NUM_HEADS [3] MODEL.SWIN.OUT_FEATURES ['p0']"
    levels = "MODEL.RPN.IN_FEATURES ['p2','p3'] MODEL.ROI_HEADS.IN_FEATURES ['p2'] MODEL.ANCHOR_GENERATOR.SIZES [[32]]"
    cfg = load_cfg(str(configs / "swin" / "swin_t_g1b.yaml"), f"{opts} {levels}".split())
    model = build_model(cfg)
    groups = build_optimizer(cfg, model).param_groups
    decay = {parameter: group["weight_decay"] for group in groups for parameter in group["params"]}
    exempt = {name for name, parameter in model.named_parameters() if decay[parameter] == 0 and parameter.ndim > 1}
    assert exempt == {
        f"backbone.bottom_up.{name}"
        for name in (
            "absolute_pos_embed",
            "layers.0.blocks.0.attn.relative_position_bias_table",
            "layers.0.blocks.0.attn.operator.coefficients",
        )
    }
