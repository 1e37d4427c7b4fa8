"""KArAt in Swin: Detectron2's SwinTransformer and FPN, built from YAML, with its window attention replaced.

"Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", arXiv 2103.14030, as in
detectron2.modeling.backbone.swin. A block attends within windows of M × M tokens (W-MSA); every second one shifts them
by M / 2 (SW-MSA), rolling the feature map, so that windows at its edge hold tokens that are no neighbours. Feature maps
are padded to whole windows. Softmax masks pairs of such tokens by −100 and attends to padding; KArAt attends to
neither.
"""

import math

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool
from detectron2.modeling.backbone.swin import SwinTransformer

from ..config import karat_config, named_by_key
from .levels import check_levels
from .replace import replace_attention


@BACKBONE_REGISTRY.register()
def build_swin_karat_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Builds Swin and a feature pyramid, with KArAt in Swin's blocks, from MODEL.SWIN, MODEL.KARAT and MODEL.FPN.

    With MODEL.KARAT.ENABLED False it is Detectron2's own, key for key. It takes images of any size that its strides
    divide, and Detectron2's detectors pad images to that. Levels of the pyramid are named after their stride: p2 has
    one of 2² pixels. Operators are `bottom_up.layers.<stage>.blocks.<i>.attn.operator`.

    Args:
        cfg: a config with the keys of `add_karat_config`.
        input_shape: the image's; its channels are used.

    Raises:
        ValueError: sizes do not fit each other, or a key has a value that is not allowed.
    """
    swin = cfg.MODEL.SWIN
    _check_sizes(cfg)
    net = SwinTransformer(
        pretrain_img_size=swin.PRETRAIN_IMG_SIZE,
        patch_size=swin.PATCH_SIZE,
        in_chans=input_shape.channels,
        embed_dim=swin.EMBED_DIM,
        depths=swin.DEPTHS,
        num_heads=swin.NUM_HEADS,
        window_size=swin.WINDOW_SIZE,
        mlp_ratio=swin.MLP_RATIO,
        qkv_bias=swin.QKV_BIAS,
        drop_path_rate=swin.DROP_PATH_RATE,
        ape=swin.APE,
        out_indices=[_stages(cfg).index(name) for name in swin.OUT_FEATURES],
    )
    # Detectron2 assumes patches of 4 pixels here.
    net._out_feature_strides = {name: swin.PATCH_SIZE * 2 ** _stages(cfg).index(name) for name in swin.OUT_FEATURES}
    if cfg.MODEL.KARAT.ENABLED:
        _replace_attention(net, cfg)
    top_block = LastLevelMaxPool()
    top_block.in_feature = f"p{round(math.log2(net._out_feature_strides[swin.OUT_FEATURES[-1]]))}"  # the coarsest level
    pyramid = FPN(
        net,
        in_features=swin.OUT_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
    made_of = f"MODEL.SWIN.PATCH_SIZE {swin.PATCH_SIZE} and OUT_FEATURES {swin.OUT_FEATURES}"
    check_levels(cfg, list(pyramid.output_shape()), made_of)
    return pyramid


def _replace_attention(net: SwinTransformer, cfg: CfgNode) -> None:
    """Replaces softmax by KArAt in the chosen blocks."""
    swin, karat = cfg.MODEL.SWIN, cfg.MODEL.KARAT
    config = karat_config(cfg)
    try:
        replace_attention(net, config, sharing=karat.SHARING, blocks=karat.BLOCKS or None)
    except ValueError as error:
        notes = {
            "sharing": "Set MODEL.KARAT.SHARING blockwise.",
            "rank": f"Windows are of {swin.WINDOW_SIZE} × {swin.WINDOW_SIZE} tokens (MODEL.SWIN.WINDOW_SIZE).",
            "blocks": f"MODEL.SWIN.DEPTHS is {swin.DEPTHS}, and blocks are counted through all stages.",
            "num_karat_heads": f"The fewest heads of a block that gets KArAt count: MODEL.SWIN.NUM_HEADS is "
            f"{swin.NUM_HEADS}.",
        }
        raise named_by_key(error, notes) from None


def _stages(cfg: CfgNode) -> list[str]:
    """Names of Swin's stages, as its outputs have them."""
    return [f"p{stage}" for stage in range(len(cfg.MODEL.SWIN.DEPTHS))]


def _check_sizes(cfg: CfgNode) -> None:
    """Checks MODEL.SWIN and MODEL.FPN before anything is built."""
    swin = cfg.MODEL.SWIN
    for key, least in (("EMBED_DIM", 1), ("IMG_SIZE", 1), ("IMG_WIDTH", 0), ("WINDOW_SIZE", 2), ("PATCH_SIZE", 2)):
        if swin[key] < least:
            raise ValueError(f"MODEL.SWIN.{key} is {swin[key]}. It must be at least {least}.")
    if not math.log2(swin.PATCH_SIZE).is_integer():
        raise ValueError(f"MODEL.SWIN.PATCH_SIZE is {swin.PATCH_SIZE}. It must be a power of 2, as Swin's strides are.")
    if swin.APE and swin.PRETRAIN_IMG_SIZE < swin.PATCH_SIZE:
        raise ValueError(
            f"MODEL.SWIN.PRETRAIN_IMG_SIZE is {swin.PRETRAIN_IMG_SIZE}. With MODEL.SWIN.APE it must be at least "
            f"MODEL.SWIN.PATCH_SIZE, {swin.PATCH_SIZE}."
        )
    for key in ("DEPTHS", "NUM_HEADS"):
        if not swin[key] or min(swin[key]) < 1:
            raise ValueError(f"MODEL.SWIN.{key} is {swin[key]}. It must have a number for each stage, each at least 1.")
    if len(swin.DEPTHS) != len(swin.NUM_HEADS):
        raise ValueError(
            f"MODEL.SWIN.DEPTHS is {swin.DEPTHS}, NUM_HEADS is {swin.NUM_HEADS}. Both must have one number for each "
            "stage."
        )
    for stage, num_heads in enumerate(swin.NUM_HEADS):
        width = swin.EMBED_DIM * 2**stage
        if width % num_heads:
            raise ValueError(
                f"MODEL.SWIN.NUM_HEADS is {swin.NUM_HEADS}: {num_heads} does not divide {width}, the width of stage "
                f"{stage} (MODEL.SWIN.EMBED_DIM · 2^{stage})."
            )
    stages = _stages(cfg)
    neighbours = [stages[i:j] for i in range(len(stages)) for j in range(i + 1, len(stages) + 1)]
    if list(swin.OUT_FEATURES) not in neighbours:
        raise ValueError(
            f"MODEL.SWIN.OUT_FEATURES is {swin.OUT_FEATURES}. It must be neighbours among {stages}, which are the "
            "stages of MODEL.SWIN.DEPTHS, in this order."
        )
    if cfg.MODEL.FPN.FUSE_TYPE not in ("sum", "avg"):
        raise ValueError(f"MODEL.FPN.FUSE_TYPE is {cfg.MODEL.FPN.FUSE_TYPE!r}, which is unknown. Known: sum, avg.")
