"""KArAt in ViTDet: Detectron2's ViT and SimpleFeaturePyramid, built from YAML, with its attention replaced.

"Exploring Plain Vision Transformer Backbones for Object Detection", arXiv 2203.16527, as in
detectron2.modeling.backbone.vit. Feature maps are (B, C, H / stride, W / stride) for images (B, 3, H, W).
"""

import itertools
import math
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.vit import SimpleFeaturePyramid, ViT

from ..config import image_size, karat_config, named_by_key
from .levels import check_levels
from .replace import replace_attention

GLOBAL_BLOCKS = ("operator", "softmax", "window")
SCALE_FACTORS = (4.0, 2.0, 1.0, 0.5)


@BACKBONE_REGISTRY.register()
def build_vitdet_karat_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> SimpleFeaturePyramid:
    """Builds ViTDet's backbone with KArAt in its blocks, from MODEL.VIT, MODEL.KARAT and MODEL.FPN.

    With MODEL.KARAT.ENABLED False it is Detectron2's own, key for key. A universal operator, shared by the blocks that
    have KArAt, is `net.operator`; the operators of blockwise sharing are `net.blocks.<i>.attn.operator`. Images smaller
    than MODEL.VIT.IMG_SIZE and IMG_WIDTH are padded to them. Larger ones are refused if a global block has an operator,
    and else accepted.

    Args:
        cfg: a config with the keys of `add_karat_config`.
        input_shape: the image's; its channels are used.

    Raises:
        ValueError: sizes do not fit each other, or a key has a value that is not allowed.
    """
    vit = cfg.MODEL.VIT
    _check_sizes(cfg)
    height, width = image_size(cfg)
    net = ViT(
        img_size=height,
        patch_size=vit.PATCH_SIZE,
        in_chans=input_shape.channels,
        embed_dim=vit.EMBED_DIM,
        depth=vit.DEPTH,
        num_heads=vit.NUM_HEADS,
        mlp_ratio=vit.MLP_RATIO,
        qkv_bias=vit.QKV_BIAS,
        drop_path_rate=vit.DROP_PATH_RATE,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=vit.USE_REL_POS,
        window_size=vit.WINDOW_SIZE,
        window_block_indexes=_window_blocks(cfg),
        pretrain_img_size=vit.PRETRAIN_IMG_SIZE,
        pretrain_use_cls_token=vit.PRETRAIN_USE_CLS_TOKEN,
    )
    if vit.USE_REL_POS and height != width:
        for block in net.blocks:
            if not block.window_size:
                # Detectron2 makes it for a square, and would resize it with every image.
                columns = 2 * (width // vit.PATCH_SIZE) - 1
                block.attn.rel_pos_w = nn.Parameter(torch.zeros(columns, block.attn.rel_pos_w.shape[1]))
    if cfg.MODEL.KARAT.ENABLED:
        _replace_attention(net, cfg)
    top_block = LastLevelMaxPool()
    # It pools the coarsest level, which is p5 only for strides of up to 32 pixels.
    top_block.in_feature = f"p{round(math.log2(vit.PATCH_SIZE / vit.SCALE_FACTORS[-1]))}"
    pyramid = PaddingFeaturePyramid(
        net,
        image_size=(height, width),
        is_size_fixed=cfg.MODEL.KARAT.ENABLED and not set(_karat_blocks(cfg)) <= set(_window_blocks(cfg)),
        in_feature="last_feat",
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        scale_factors=vit.SCALE_FACTORS,
        top_block=top_block,
        norm=cfg.MODEL.FPN.NORM,
    )
    made_of = f"MODEL.VIT.PATCH_SIZE {vit.PATCH_SIZE} and SCALE_FACTORS {vit.SCALE_FACTORS}"
    check_levels(cfg, list(pyramid.output_shape()), made_of)
    return pyramid


class PaddingFeaturePyramid(SimpleFeaturePyramid):
    """Detectron2's pyramid, which pads images, on the right and below, to the size that its ViT was made for.

    Detectron2 itself pads a batch to its largest image, or to a square, to which it crops larger ones. Its coarsest
    levels lose the edge of a map with an odd number of tokens; here every level covers the whole image.

    Args:
        net: the ViT.
        image_size: (height, width), in pixels.
        is_size_fixed: whether the ViT takes images of this size only. Else a larger image is padded to whole patches.
        arguments: those of SimpleFeaturePyramid.
    """

    def __init__(self, net: ViT, image_size: tuple[int, int], is_size_fixed: bool, **arguments):
        super().__init__(net, **arguments)
        self.image_size = image_size
        self.is_size_fixed = is_size_fixed
        for layer in itertools.chain(*self.stages):
            if isinstance(layer, nn.MaxPool2d):
                layer.ceil_mode = True  # an odd number of tokens keeps its last row and column

    @property
    def padding_constraints(self) -> dict[str, int]:
        """None: Detectron2's detectors pad a batch to its largest image, `forward` does the rest."""
        return {}

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Args:
            x: images (B, C, height, width).

        Returns:
            Levels of the pyramid, by name.

        Raises:
            ValueError: the size is fixed, and the images are larger.
        """
        (height, width), given = self.image_size, x.shape[-2:]
        if self.is_size_fixed and (given[0] > height or given[1] > width):
            raise ValueError(
                f"An image, or the largest height and width in a batch, is {given[0]} × {given[1]} pixels. With "
                f"MODEL.KARAT.GLOBAL_BLOCKS operator it must not exceed MODEL.VIT.IMG_SIZE and IMG_WIDTH, {height} × "
                f"{width}. Make images smaller, as karat_det.data.mapper.build_augmentation does, and "
                f"Detectron2's DefaultPredictor with INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST {min(height, width)}; or "
                "build the model for a larger MODEL.VIT.IMG_SIZE."
            )
        patch = self.net.output_shape()[self.in_feature].stride
        missing = [
            max(own, math.ceil(size / patch) * patch) - size for own, size in zip(self.image_size, given, strict=True)
        ]
        return super().forward(F.pad(x, (0, missing[1], 0, missing[0])) if any(missing) else x)


def _replace_attention(net: ViT, cfg: CfgNode) -> None:
    """Replaces softmax by KArAt in the chosen blocks."""
    vit, karat = cfg.MODEL.VIT, cfg.MODEL.KARAT
    config = karat_config(cfg)
    try:
        replace_attention(net, config, sharing=karat.SHARING, blocks=_karat_blocks(cfg), image_size=image_size(cfg))
    except ValueError as error:
        window, image = (
            f"{rows} × {columns} = {rows * columns}"
            for rows, columns in ((vit.WINDOW_SIZE,) * 2, [size // vit.PATCH_SIZE for size in image_size(cfg)])
        )
        tokens = (
            f"N is {window} in window blocks (MODEL.VIT.WINDOW_SIZE), {image} in global ones (MODEL.VIT.IMG_SIZE and "
            "IMG_WIDTH / PATCH_SIZE)."
        )
        notes = {
            "sharing": f"{tokens} Set MODEL.KARAT.SHARING blockwise, or MODEL.KARAT.GLOBAL_BLOCKS "
            '"softmax" or "window", or choose MODEL.KARAT.BLOCKS of one kind.',
            "rank": tokens,
            "num_karat_heads": f"MODEL.VIT.NUM_HEADS is {vit.NUM_HEADS}.",
        }
        raise named_by_key(error, notes) from None


def _karat_blocks(cfg: CfgNode) -> list[int]:
    """Indices of the blocks that get KArAt."""
    windows = _window_blocks(cfg)
    return [index for index in _chosen_blocks(cfg) if index in windows or cfg.MODEL.KARAT.GLOBAL_BLOCKS == "operator"]


def _window_blocks(cfg: CfgNode) -> list[int]:
    blocks = set(cfg.MODEL.VIT.WINDOW_BLOCKS)
    if cfg.MODEL.KARAT.ENABLED and cfg.MODEL.KARAT.GLOBAL_BLOCKS == "window":
        blocks.update(_chosen_blocks(cfg))
    return sorted(blocks)


def _chosen_blocks(cfg: CfgNode) -> list[int]:
    return sorted(set(cfg.MODEL.KARAT.BLOCKS)) or list(range(cfg.MODEL.VIT.DEPTH))


def _check_sizes(cfg: CfgNode) -> None:
    """Checks MODEL.VIT and the choice of blocks before anything is built."""
    vit, karat = cfg.MODEL.VIT, cfg.MODEL.KARAT
    for key in ("IMG_SIZE", "PATCH_SIZE", "EMBED_DIM", "DEPTH", "NUM_HEADS", "PRETRAIN_IMG_SIZE"):
        if vit[key] < 1:
            raise ValueError(f"MODEL.VIT.{key} is {vit[key]}. It must be at least 1.")
    if vit.IMG_WIDTH < 0:
        raise ValueError(f"MODEL.VIT.IMG_WIDTH is {vit.IMG_WIDTH}. It must be at least 1, or 0 for a square.")
    for key in ("IMG_SIZE", "IMG_WIDTH"):
        if vit[key] % vit.PATCH_SIZE:
            raise ValueError(
                f"MODEL.VIT.{key} is {vit[key]}, which MODEL.VIT.PATCH_SIZE, {vit.PATCH_SIZE}, does not divide. "
                f"Sizes that fit: {_multiples_near(vit[key], vit.PATCH_SIZE)}."
            )
    if vit.EMBED_DIM % vit.NUM_HEADS:
        raise ValueError(
            f"MODEL.VIT.EMBED_DIM is {vit.EMBED_DIM}, which MODEL.VIT.NUM_HEADS, {vit.NUM_HEADS}, does not divide."
        )
    if vit.EMBED_DIM < 4:
        raise ValueError(
            f"MODEL.VIT.EMBED_DIM is {vit.EMBED_DIM}. It must be at least 4: the finest level of the pyramid has a "
            "quarter of the channels."
        )
    if vit.PRETRAIN_IMG_SIZE < vit.PATCH_SIZE:
        raise ValueError(
            f"MODEL.VIT.PRETRAIN_IMG_SIZE is {vit.PRETRAIN_IMG_SIZE}. It must be at least MODEL.VIT.PATCH_SIZE, "
            f"{vit.PATCH_SIZE}."
        )
    for section, key in (("VIT", "WINDOW_BLOCKS"), ("KARAT", "BLOCKS")):
        foreign = [index for index in cfg.MODEL[section][key] if index not in range(vit.DEPTH)]
        if foreign:
            raise ValueError(
                f"MODEL.{section}.{key} names {foreign}; MODEL.VIT.DEPTH is {vit.DEPTH}, so blocks are 0 to "
                f"{vit.DEPTH - 1}."
            )
    levels = [SCALE_FACTORS[i:j] for i in range(len(SCALE_FACTORS)) for j in range(i + 1, len(SCALE_FACTORS) + 1)]
    if tuple(vit.SCALE_FACTORS) not in levels:
        raise ValueError(
            f"MODEL.VIT.SCALE_FACTORS is {vit.SCALE_FACTORS}. It must be neighbours among {list(SCALE_FACTORS)}, from "
            "the largest to the smallest."
        )
    finest_stride = vit.PATCH_SIZE / vit.SCALE_FACTORS[0]
    if not math.log2(finest_stride).is_integer() or finest_stride < 1:
        raise ValueError(
            f"MODEL.VIT.PATCH_SIZE is {vit.PATCH_SIZE}, the first of MODEL.VIT.SCALE_FACTORS {vit.SCALE_FACTORS[0]}: "
            f"the finest level of the pyramid would have a stride of {finest_stride:g} pixels. It must be a power of 2."
        )
    if not cfg.MODEL.FPN.NORM and vit.SCALE_FACTORS[0] == SCALE_FACTORS[0]:
        raise ValueError(
            "MODEL.FPN.NORM is ''. The finest level of SimpleFeaturePyramid has a norm between its two layers: it must "
            f"be LN, as in ViTDet, or GN or BN; or MODEL.VIT.SCALE_FACTORS begins below {SCALE_FACTORS[0]}."
        )
    if not karat.ENABLED:
        return

    if karat.GLOBAL_BLOCKS not in GLOBAL_BLOCKS:
        raise ValueError(
            f"MODEL.KARAT.GLOBAL_BLOCKS is {karat.GLOBAL_BLOCKS!r}, which is unknown. "
            f"Known: {', '.join(GLOBAL_BLOCKS)}."
        )
    if not _karat_blocks(cfg):
        raise ValueError(
            f"MODEL.KARAT.GLOBAL_BLOCKS is softmax, and none of MODEL.KARAT.BLOCKS, {karat.BLOCKS or 'all'}, is among "
            f"MODEL.VIT.WINDOW_BLOCKS, {vit.WINDOW_BLOCKS}: no block would have KArAt. Name other blocks, set "
            'GLOBAL_BLOCKS "operator" or "window", or MODEL.KARAT.ENABLED False for a softmax model.'
        )
    windows = _window_blocks(cfg)
    if windows and vit.WINDOW_SIZE < 1:
        raise ValueError(
            f"MODEL.VIT.WINDOW_SIZE is {vit.WINDOW_SIZE}, but there are window blocks. It must be at least 1; "
            "MODEL.VIT.WINDOW_BLOCKS [] is for none."
        )


def _multiples_near(size: int, divisor: int) -> str:
    lower = size // divisor * divisor
    return f"{lower} and {lower + divisor}" if lower else str(divisor)
