import copy
import math

import detectron2.layers.batch_norm
import pytest
import torch
from detectron2.modeling import build_model

from karat_det.engine.optimizer import build_optimizer, load_optimizer_state, lr_factor, optimizer_state
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


def small_optimizer(*groups):
    """AdamW of a small model with a bias that no gradient reaches; a group is the names of its parameters."""
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 2), "b": torch.nn.Linear(2, 1)})
    parameters = dict(model.named_parameters())
    made = [{"params": [parameters[name] for name in names], "lr": 0.1 * (i + 1)} for i, names in enumerate(groups)]
    return torch.optim.AdamW(made), model


ONE_GROUP = (["a.weight", "a.bias", "b.weight", "b.bias"],)


@pytest.fixture
def small_state():
    optimizer, model = small_optimizer(*ONE_GROUP)
    for _ in range(2):
        optimizer.zero_grad()
        (model["a"](torch.ones(3)) @ model["b"].weight.T).sum().backward()
        optimizer.step()
    return copy.deepcopy(optimizer_state(optimizer, model))


def test_the_state_of_a_parameter_finds_it_by_name_in_other_groups(small_state):
    optimizer, model = small_optimizer(["b.bias", "b.weight"], ["a.bias", "a.weight"])
    load_optimizer_state(optimizer, model, small_state)
    order = ["a.weight", "a.bias", "b.weight"]
    for index, name in enumerate(order):
        loaded, saved = optimizer.state[model.get_parameter(name)], small_state["state"][index]
        assert loaded["step"] == saved["step"] == 2
        assert all(torch.equal(loaded[key], saved[key]) for key in ("exp_avg", "exp_avg_sq"))
        assert loaded["exp_avg"].data_ptr() != saved["exp_avg"].data_ptr()
    # No gradient has reached it.
    assert not optimizer.state.get(model["b"].bias)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]


def other_shape(state):
    state["state"][0]["exp_avg"] = torch.zeros(2, 2)


def transposed(state):
    state["state"][0]["exp_avg_sq"] = torch.zeros(3, 2)


def whole_numbers(state):
    state["state"][0]["exp_avg"] = torch.zeros(2, 3, dtype=torch.int64)


def no_tensor(state):
    state["state"][0]["exp_avg"] = [0.0] * 6


def sparse(state):
    state["state"][0]["exp_avg"] = torch.zeros(2, 3).to_sparse()


def not_finite(state):
    state["state"][1]["exp_avg_sq"][0] = math.nan


def negative_square(state):
    state["state"][1]["exp_avg_sq"][0] = -1.0


def without_squares(state):
    del state["state"][2]["exp_avg_sq"]


def of_another_optimizer(state):
    state["state"][2] = {"momentum_buffer": torch.zeros(1, 2)}


def steps_of_one_parameter(state):
    state["state"][0]["step"] = torch.zeros(2)


def negative_steps(state):
    state["state"][0]["step"] = torch.tensor(-1.0)


def without_an_entry(state):
    del state["state"][1]


def with_one_entry_more(state):
    state["state"][9] = state["state"][0]


def with_a_number_twice(state):
    state["param_groups"][0]["params"][1] = 0


def without_names(state):
    del state["param_groups"][0]["param_names"]


def with_another_name(state):
    state["param_groups"][0]["param_names"][1] = "a.gain"


def with_a_name_more(state):
    state["param_groups"].append({"params": [4], "param_names": ["c"]})
    state["state"][4] = {}


def with_a_list_for_groups(state):
    state["param_groups"][0] = [1]


def without_groups(state):
    del state["param_groups"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (other_shape, r"of a\.weight has as exp_avg \(2, 2\) torch\.float32, where the parameter is \(2, 3\)"),
        (transposed, r"of a\.weight has as exp_avg_sq \(3, 2\)"),
        (whole_numbers, r"of a\.weight has as exp_avg \(2, 3\) torch\.int64"),
        (no_tensor, r"of a\.weight has as exp_avg list"),
        (sparse, r"of a\.weight has an exp_avg with values that none can have"),
        (not_finite, r"of a\.bias has an exp_avg_sq with values"),
        (negative_square, r"of a\.bias has an exp_avg_sq with values"),
        (without_squares, r"of b\.weight must have step, exp_avg and exp_avg_sq, and has \['exp_avg', 'step'\]"),
        (of_another_optimizer, r"of b\.weight must have .* and has \['momentum_buffer'\]"),
        (steps_of_one_parameter, r"of a\.weight has the step .* no count"),
        (negative_steps, r"of a\.weight has the step .* no count"),
        (without_an_entry, r"of 'a\.bias', number 1, is missing or there twice"),
        (with_one_entry_more, r"has 5 entries for 4 parameters"),
        (with_a_number_twice, r"of a\.bias has as exp_avg \(2, 3\)"),
        (without_names, r"does not name its parameters"),
        (with_another_name, r"lacks that of a\.bias"),
        (with_a_name_more, r"is that of 1 parameters more than the model trains: c"),
        (with_a_list_for_groups, r"does not name its parameters"),
        (without_groups, r"is none that an optimizer has saved"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_state_of_other_parameters_is_refused_before_it_is_used(small_state, spoil, message):
    spoil(small_state)
    optimizer, model = small_optimizer(*ONE_GROUP)
    with pytest.raises(ValueError, match=message):
        load_optimizer_state(optimizer, model, small_state)
    assert not optimizer.state
