"""AdamW with layer-wise learning rate decay, as ViTDet trains (arXiv 2203.16527, appendix A.2), and its saved state."""

import logging
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from detectron2.solver.build import maybe_add_gradient_clipping, reduce_param_groups
from torch import Tensor, nn

logger = logging.getLogger(__name__)

# SOLVER.CLIP_GRADIENTS.CLIP_TYPE for clipping by the total norm of all gradients, which the trainer does.
FULL_MODEL = "full_model"
# Names of parameters within their modules. Norms and biases are recognised by their one dimension.
NO_WEIGHT_DECAY = (
    *("pos_embed", "rel_pos_h", "rel_pos_w", "absolute_pos_embed", "relative_position_bias_table"),
    "coefficients",
)
# AdamW's averages of a parameter, beside the count of its steps.
_AVERAGES = ("exp_avg", "exp_avg_sq")
_OPERATOR = ("coefficients", "projector")


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.AdamW:
    """Builds AdamW from SOLVER.

    Positions, norms, biases and the operator's coefficients have no weight decay. SOLVER.LAYER_DECAY lowers the rate of
    early blocks as in Detectron2's get_vit_lr_decay_rate; a universal operator counts as the last block.
    SOLVER.OPERATOR_LR_FACTOR multiplies the rate of operators.

    Args:
        cfg: a config with the keys of `add_karat_config`.
        model: the detector, not wrapped; with layer decay, its ViT is `backbone.net`.
    """
    solver = cfg.SOLVER
    groups = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        own_name = name.rpartition(".")[2]
        lr = solver.BASE_LR * lr_factor(name, solver.LAYER_DECAY, cfg.MODEL.VIT.DEPTH)
        decays = parameter.ndim > 1 and own_name not in NO_WEIGHT_DECAY
        groups.append(
            {
                "params": [parameter],
                "lr": lr * solver.OPERATOR_LR_FACTOR if own_name in _OPERATOR else lr,
                "weight_decay": solver.WEIGHT_DECAY if decays else 0.0,
            }
        )
    optimizer = torch.optim.AdamW(
        reduce_param_groups(groups), lr=solver.BASE_LR, betas=tuple(solver.BETAS), eps=solver.EPS, fused=True
    )
    if solver.CLIP_GRADIENTS.CLIP_TYPE != FULL_MODEL:
        # Detectron2's own ways of clipping go parameter by parameter; the trainer clips by the total norm.
        maybe_add_gradient_clipping(cfg, optimizer)
    return optimizer


def lr_factor(name: str, decay: float, depth: int) -> float:
    """Factor of the base learning rate for a parameter: decay^(depth + 1 − i) for layer i, 1 for pyramid and heads.

    Args:
        name: the parameter's name in the detector, for example "backbone.net.blocks.3.attn.qkv.weight".
        decay: SOLVER.LAYER_DECAY.
        depth: number of blocks; positions and patches are layer 0, blocks 1 to depth.
    """
    if name.startswith("backbone.net.operator."):
        return decay
    return get_vit_lr_decay_rate(name, decay, depth)


def optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """The optimiser's state_dict; its groups also name their parameters, and its state has an entry for each.

    A parameter that has had no gradient has an empty state.

    Args:
        optimizer: the optimiser of the model's parameters.
        model: the model that is trained.
    """
    state = optimizer.state_dict()
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
        saved["param_names"] = [names[parameter] for parameter in group["params"]]
    indices = [index for group in state["param_groups"] for index in group["params"]]
    state["state"] = {index: state["state"].get(index, {}) for index in indices}
    return state


def load_optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module, state: Any) -> None:
    """Loads the state of each parameter by its name. Rates, decay and grouping stay the optimiser's.

    Args:
        optimizer, model: as for `optimizer_state`; groups may differ from those of the run that was saved.
        state: a checkpoint's; anything is accepted, and checked before use.

    Raises:
        ValueError: it is not an AdamW's of these parameters.
    """
    saved, settings = _by_name(state)
    names = {parameter: name for name, parameter in model.named_parameters()}
    loaded, index, changed = {}, 0, {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[parameter]
            if name not in saved:
                raise ValueError(f"The optimizer's state lacks that of {name}.")
            if entry := saved.pop(name):
                _check_entry(name, parameter, entry)
                # Copies, since tensors of a file may share memory, with others or within themselves.
                averages = {key: torch.empty_like(parameter).copy_(entry[key]) for key in _AVERAGES}
                loaded[index] = {"step": torch.tensor(float(entry["step"])), **averages}
            for key, what in (("initial_lr", "learning rate"), ("weight_decay", "weight decay")):
                if key in group and settings[name].get(key) != group[key]:
                    changed.setdefault(what, []).append(name)
            index += 1
    if saved:
        raise ValueError(
            f"The optimizer's state is that of {len(saved)} parameters more than the model trains: "
            f"{', '.join(list(saved)[:3])}{', …' if len(saved) > 3 else ''}."
        )
    for what, named in changed.items():
        logger.info("The %s of %d of %d parameters is the config's now, and was another.", what, len(named), index)
    optimizer.load_state_dict({"state": loaded, "param_groups": optimizer.state_dict()["param_groups"]})


def _by_name(state: Any) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Each parameter's entry in an optimiser's state dict, and the settings of its group."""
    entries, groups = (state.get(key) for key in ("state", "param_groups")) if isinstance(state, dict) else (None, None)
    if not isinstance(entries, dict) or not isinstance(groups, list):
        raise ValueError("The optimizer's state is none that an optimizer has saved.")
    saved, settings = {}, {}
    for group in groups:
        names, indices = (group.get(key) for key in ("param_names", "params")) if isinstance(group, dict) else (0, 0)
        if not isinstance(names, list) or not isinstance(indices, list) or len(names) != len(indices):
            raise ValueError("The optimizer's state does not name its parameters, so its owner is unknown.")
        for name, index in zip(names, indices, strict=True):
            if type(name) is not str or type(index) is not int or name in saved or index not in entries:
                raise ValueError(f"The optimizer's state of {name!r}, number {index!r}, is missing or there twice.")
            saved[name], settings[name] = entries[index], group
    if len(entries) != len(saved):
        raise ValueError(f"The optimizer's state has {len(entries)} entries for {len(saved)} parameters.")
    return saved, settings


def _check_entry(name: str, parameter: Tensor, entry: Any) -> None:
    """Raises ValueError unless `entry` is AdamW's state of a parameter."""
    if not isinstance(entry, dict) or set(entry) != {"step", *_AVERAGES}:
        what = sorted(map(str, entry)) if isinstance(entry, dict) else type(entry).__name__
        raise ValueError(f"The optimizer's state of {name} must have step, exp_avg and exp_avg_sq, and has {what}.")
    for key in _AVERAGES:
        value = entry[key]
        if not isinstance(value, Tensor) or value.shape != parameter.shape or not value.is_floating_point():
            found = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"The optimizer's state of {name} has as {key} {found}, where the parameter is "
                f"{tuple(parameter.shape)} {parameter.dtype}."
            )
        if value.layout != torch.strided or not value.isfinite().all() or (key == "exp_avg_sq" and (value < 0).any()):
            raise ValueError(f"The optimizer's state of {name} has an {key} with values that none can have.")
    step = torch.as_tensor(entry["step"]) if isinstance(entry["step"], int | float | Tensor) else None
    if step is None or step.numel() != 1 or step.is_complex() or not 0 <= step.item() < 2**63:
        raise ValueError(f"The optimizer's state of {name} has the step {entry['step']!r}, which is no count.")
