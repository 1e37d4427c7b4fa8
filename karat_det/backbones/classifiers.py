"""KArAt in image classifiers, for pretraining: timm's ViT, ConViT and Swin, with their attention replaced.

"An Image is Worth 16x16 Words", arXiv 2010.11929; "ConViT", arXiv 2103.10697; "Swin Transformer", arXiv 2103.14030, as
in timm.models. Images are (B, 3, IMG_SIZE, IMG_SIZE), outputs logits (B, classes). The blocks of a ViT, and the last
ones of a ConViT, attend to all N tokens: class token and patches, 1 + 14² at 224 pixels and patches of 16. Those of a
Swin attend to windows, of 7² tokens.
"""

import difflib
from functools import cache

import timm
import torch
from fvcore.common.config import CfgNode
from timm.models.convit import ConVit
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ..config import karat_config, named_by_key
from .replace import replace_attention

_FAMILIES = {VisionTransformer: "ViT", ConVit: "ConViT", SwinTransformer: "Swin"}
# Keys of MODEL that set timm's argument of the same name. ConViT's depth and heads depend on the number of its
# convolutional blocks; Swin has a depth and a number of heads for each stage.
_SIZES = {
    VisionTransformer: ("IMG_SIZE", "PATCH_SIZE", "EMBED_DIM", "DEPTH", "NUM_HEADS"),
    ConVit: ("IMG_SIZE", "PATCH_SIZE"),
    SwinTransformer: ("IMG_SIZE", "PATCH_SIZE", "EMBED_DIM"),
}


def build_classifier(cfg: CfgNode, num_classes: int) -> nn.Module:
    """Builds a classifier of timm's with KArAt in its blocks, from MODEL, with random weights.

    With MODEL.KARAT.ENABLED False it is timm's own, key for key. A universal operator, shared by the blocks that have
    KArAt, is `operator`; those of blockwise sharing are `attn.operator` of their blocks. In ConViT the blocks of plain
    self-attention get KArAt, not those that are gated by positions.

    Args:
        cfg: a config with the keys of `pretrain_config`.
        num_classes: number of classes.

    Raises:
        ValueError: sizes do not fit each other, or a key has a value that is not allowed.
    """
    overrides = _checked_overrides(cfg)
    model = timm.create_model(cfg.MODEL.NAME, pretrained=False, num_classes=num_classes, **overrides)
    if cfg.MODEL.KARAT.ENABLED:
        _replace_attention(model, cfg)
    return model


def _replace_attention(model: nn.Module, cfg: CfgNode) -> None:
    """Replaces softmax by KArAt in the chosen blocks."""
    name, karat = cfg.MODEL.NAME, cfg.MODEL.KARAT
    config = karat_config(cfg)
    try:
        replace_attention(model, config, sharing=karat.SHARING, blocks=karat.BLOCKS or None)
    except ValueError as error:
        place = "the smallest window" if isinstance(model, SwinTransformer) else "an image"
        notes = {
            "sharing": f"Set MODEL.KARAT.SHARING blockwise for {name}.",
            "rank": f"N is that of {place} in {name} (MODEL.IMG_SIZE, PATCH_SIZE).",
            "blocks": f"MODEL.NAME is {name}.",
            "num_karat_heads": f"{name} has no more in the block that has the fewest.",
            "model": "Name another model, or set MODEL.KARAT.ENABLED False.",
            "img_size": f"MODEL.NAME is {name}, patches are of MODEL.PATCH_SIZE.",
        }
        keys = {"model": f"MODEL.NAME is {name}. It", "img_size": "MODEL.IMG_SIZE"}
        raise named_by_key(error, notes, keys) from None


def _checked_overrides(cfg: CfgNode) -> dict[str, int | float]:
    """Arguments for timm where they differ from its own, by name; checks MODEL before anything is built from it."""
    name = cfg.MODEL.NAME
    if not timm.is_model(name):
        similar = difflib.get_close_matches(name, timm.list_models())
        raise ValueError(
            f"MODEL.NAME is {name!r}, a model that timm {timm.__version__} does not have."
            + (f" Similar names: {', '.join(similar)}." if similar else "")
        )
    original = _original(name)
    family = next((family for family in _FAMILIES if isinstance(original, family)), None)
    if family is None:
        raise ValueError(
            f"MODEL.NAME is {name}, a {type(original).__name__}. It must be one of timm's "
            f"{', '.join(_FAMILIES.values())}."
        )
    given = {key: cfg.MODEL[key] for key in _SIZES[VisionTransformer] if cfg.MODEL[key] is not None}
    for key, value in given.items():
        if key not in _SIZES[family]:
            raise ValueError(
                f"MODEL.{key} is {value}, but {name} is a {_FAMILIES[family]}, which takes only "
                f"{', '.join(_SIZES[family])}. Leave it at None."
            )
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(
                f"MODEL.{key} is {value!r}. It must be a whole number, at least 1, or None for timm's own."
            )
    _check_sizes(original, given)
    rate = cfg.MODEL.DROP_PATH_RATE
    if rate is not None and not (isinstance(rate, int | float) and 0 <= rate < 1):
        raise ValueError(f"MODEL.DROP_PATH_RATE is {rate!r}. It must be from 0 to below 1, or None for timm's own.")
    init = cfg.MODEL.WEIGHT_INIT
    if init not in ("", "jax"):
        raise ValueError(f"MODEL.WEIGHT_INIT is {init!r}. It must be 'jax', or '' for timm's own.")
    if init and family is not VisionTransformer:
        raise ValueError(f"MODEL.WEIGHT_INIT is {init!r}, which is for a ViT. For {name} it must be ''.")
    others = ({} if rate is None else {"drop_path_rate": rate}) | ({"weight_init": init} if init else {})
    return {key.lower(): value for key, value in given.items()} | others


@cache  # it takes a third of a second
def _original(name: str) -> nn.Module:
    """timm's model of a name, for its kind and sizes; its tensors have no values."""
    with torch.device("meta"):
        return timm.create_model(name, pretrained=False)


def _check_sizes(original: nn.Module, given: dict[str, int]) -> None:
    """Checks that the sizes given, and timm's own of the others, divide each other as they must."""
    image = given.get("IMG_SIZE", original.patch_embed.img_size[0])
    patch = given.get("PATCH_SIZE", original.patch_embed.patch_size[0])
    if image % patch:
        raise ValueError(f"MODEL.IMG_SIZE is {image}, which MODEL.PATCH_SIZE, {patch}, does not divide.")
    width = given.get("EMBED_DIM", original.embed_dim)
    if isinstance(original, SwinTransformer):
        stages = [(width * 2**stage, layer.blocks[0].attn.num_heads) for stage, layer in enumerate(original.layers)]
    else:
        own = next(module.num_heads for module in original.modules() if hasattr(module, "num_heads"))
        stages = [(width, given.get("NUM_HEADS", own))]
    for width, num_heads in stages:
        if width % num_heads:
            raise ValueError(
                f"MODEL.EMBED_DIM is {stages[0][0]}: the number of heads, {num_heads}, does not divide the width of a "
                f"block, {width}. Change MODEL.EMBED_DIM" + (" or NUM_HEADS." if len(stages) == 1 else ".")
            )
