"""AdamW with layer-wise learning rate decay, as ViTDet trains (arXiv 2203.16527, appendix A.2)."""

import torch
from detectron2.config import CfgNode
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from detectron2.solver.build import maybe_add_gradient_clipping, reduce_param_groups
from torch import nn

# SOLVER.CLIP_GRADIENTS.CLIP_TYPE that clips by the total norm of all gradients; the trainer does it.
FULL_MODEL = "full_model"
# By the name of the parameter within its module. Norms and biases are known by having one dimension.
NO_WEIGHT_DECAY = (
    *("pos_embed", "rel_pos_h", "rel_pos_w", "absolute_pos_embed", "relative_position_bias_table"),
    *("coefficients", "outer_coefficients"),
)
_OPERATOR = ("coefficients", "projector", "outer_coefficients")


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
