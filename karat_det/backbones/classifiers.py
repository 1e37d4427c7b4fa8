"""KArAt in image classifiers, for pretraining: timm's ViT, ConViT and Swin with their attention replaced.

"An Image is Worth 16x16 Words", arXiv 2010.11929; "ConViT", arXiv 2103.10697; "Swin Transformer", arXiv 2103.14030, as
in timm.models. Images are (B, 3, IMG_SIZE, IMG_SIZE), outputs logits (B, classes). The blocks of a ViT, and the last
ones of a ConViT, attend to all N tokens: the class token and the patches, 1 + 14² at 224 pixels and patches of 16.
"""

import difflib

import timm
import torch
from fvcore.common.config import CfgNode
from timm.layers import Attention
from timm.models.convit import MHSA, ConVit
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ..attention.module import KArAtAttention
from ..attention.operator import KArAtConfig, KArAtOperator
from ..config import karat_config

# timm's arguments that MODEL's keys of the same name set, by family. ConViT's width, depth and heads hang together with
# the number of its convolutional blocks, Swin's depth and heads are lists.
_OVERRIDES = {
    VisionTransformer: ("IMG_SIZE", "PATCH_SIZE", "EMBED_DIM", "DEPTH", "NUM_HEADS"),
    ConVit: ("IMG_SIZE", "PATCH_SIZE"),
    SwinTransformer: ("IMG_SIZE", "PATCH_SIZE", "EMBED_DIM"),
}
_FAMILIES = {VisionTransformer: "ViT", ConVit: "ConViT", SwinTransformer: "Swin"}


def build_classifier(cfg: CfgNode, num_classes: int) -> nn.Module:
    """Builds a classifier of timm's, from random weights, with KArAt in its blocks, from MODEL.

    With MODEL.KARAT.ENABLED False it is timm's own, key for key. A universal operator, shared by the blocks that have
    KArAt, is `operator`; the operators of blockwise sharing are `attn.operator` of their blocks. Of ConViT, only blocks
    of plain self-attention get KArAt, not those that are gated by positions.

    Args:
        cfg: a config with the keys of `pretrain_config`.
        num_classes: number of classes.

    Raises:
        ValueError: sizes do not fit each other, or a key has a value that is not allowed.
    """
    name = cfg.MODEL.NAME
    overrides = _checked_overrides(cfg)
    model = timm.create_model(name, pretrained=False, num_classes=num_classes, **overrides)
    if cfg.MODEL.KARAT.ENABLED:
        # One seed then trains softmax and KArAt on the same sequence of samples.
        with torch.random.fork_rng(devices=[]):
            _replace_attention(model, cfg)
    return model


def _replace_attention(model: nn.Module, cfg: CfgNode) -> None:
    """Puts KArAt in the place of softmax in every block that is to have it."""
    config = karat_config(cfg)
    blocks = dict(enumerate(model.blocks))
    plain = {index: block for index, block in blocks.items() if _is_plain(getattr(block, "attn", None))}
    if not plain:
        raise ValueError(
            f"MODEL.NAME is {cfg.MODEL.NAME}, none of whose {len(blocks)} blocks has the plain self-attention that "
            "KArAt takes the place of: query, key, value and output projections, and nothing else. Choose another model, or "
            "set MODEL.KARAT.ENABLED False."
        )
    foreign = [index for index in cfg.MODEL.KARAT.BLOCKS if index not in plain]
    if foreign:
        raise ValueError(
            f"MODEL.KARAT.BLOCKS names {foreign}; the blocks of {cfg.MODEL.NAME} that can have KArAt are {list(plain)}."
        )
    chosen = [plain[index] for index in sorted(set(cfg.MODEL.KARAT.BLOCKS))] or list(plain.values())
    num_tokens = model.patch_embed.num_patches + (1 if isinstance(model, ConVit) else model.num_prefix_tokens)
    num_heads = chosen[0].attn.num_heads
    _check_operator(config, num_tokens, num_heads)
    shared = None
    if config.sharing == "universal":
        shared = model.operator = KArAtOperator(num_heads, num_tokens, config)
    for block in chosen:
        softmax = block.attn
        attention = KArAtAttention(
            softmax.qkv.in_features,
            num_heads,
            num_tokens,
            config,
            qkv_bias=softmax.qkv.bias is not None,
            operator=shared,
        )
        # The linear layers keep the weights that timm drew, so that one seed starts KArAt and softmax alike.
        attention.qkv, attention.proj = softmax.qkv, softmax.proj
        block.attn = attention


def _is_plain(attention: nn.Module | None) -> bool:
    """Whether an attention is multi-head self-attention and no more: neither gated nor with norms of its own."""
    if type(attention) not in (Attention, MHSA):
        return False
    names = {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}
    return attention.state_dict().keys() <= names and attention.qkv.out_features == 3 * attention.qkv.in_features


def _check_operator(config: KArAtConfig, num_tokens: int, num_heads: int) -> None:
    if config.rank is not None and config.rank > num_tokens:
        raise ValueError(
            f"MODEL.KARAT.RANK is {config.rank}, above N = {num_tokens}, the number of tokens that attend to each "
            f"other (MODEL.IMG_SIZE, PATCH_SIZE). It must be from 1 to {num_tokens}."
        )
    if config.num_karat_heads is not None and config.num_karat_heads > num_heads:
        raise ValueError(
            f"MODEL.KARAT.NUM_KARAT_HEADS is {config.num_karat_heads}, above {num_heads}, the heads of a block. It "
            f"must be from 1 to {num_heads}, or None for all."
        )


def _checked_overrides(cfg: CfgNode) -> dict[str, int | float]:
    """timm's arguments that differ from its own, by name. Everything about them is checked here, before it builds."""
    name = cfg.MODEL.NAME
    if not timm.is_model(name):
        similar = difflib.get_close_matches(name, timm.list_models())
        raise ValueError(
            f"MODEL.NAME is {name!r}, which timm {timm.__version__} does not have."
            + (f" Similar: {', '.join(similar)}." if similar else "")
        )
    with torch.device("meta"):  # shapes, no values
        original = timm.create_model(name, pretrained=False)
    family = next((family for family in _FAMILIES if isinstance(original, family)), None)
    if family is None:
        raise ValueError(
            f"MODEL.NAME is {name}, a {type(original).__name__}. It must be of one of timm's families of "
            f"{', '.join(_FAMILIES.values())}."
        )
    keys = [key for keys in _OVERRIDES.values() for key in keys]
    given = {key: cfg.MODEL[key] for key in dict.fromkeys(keys) if cfg.MODEL[key] is not None}
    for key, value in given.items():
        if key not in _OVERRIDES[family]:
            raise ValueError(
                f"MODEL.{key} is {value}, but {name} is a {_FAMILIES[family]}, of which only "
                f"{', '.join(_OVERRIDES[family])} can be set. Set it to None."
            )
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(
                f"MODEL.{key} is {value!r}. It must be a whole number, at least 1, or None for timm's own."
            )
    image, patch = (
        given.get("IMG_SIZE", original.patch_embed.img_size[0]),
        given.get("PATCH_SIZE", original.patch_embed.patch_size[0]),
    )
    if image % patch:
        raise ValueError(
            f"The images of {name} have {image} pixels on a side (MODEL.IMG_SIZE), which MODEL.PATCH_SIZE, {patch}, "
            "does not divide. Change one of them."
        )
    rate = cfg.MODEL.DROP_PATH_RATE
    if rate is not None and not (isinstance(rate, int | float) and 0 <= rate < 1):
        raise ValueError(f"MODEL.DROP_PATH_RATE is {rate!r}. It must be from 0 to below 1, or None for timm's own.")
    return {key.lower(): value for key, value in given.items()} | ({} if rate is None else {"drop_path_rate": rate})
