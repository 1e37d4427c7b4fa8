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
from timm.models.convit import MHSA, ConVit
from timm.models.swin_transformer import SwinTransformer, WindowAttention
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import nn

from ..attention.module import KArAtAttention
from ..attention.operator import KArAtOperator
from ..attention.window import KArAtSwinWindowAttention
from ..config import karat_config, karat_sharing

_FAMILIES = {VisionTransformer: "ViT", ConVit: "ConViT", SwinTransformer: "Swin"}
# Keys of MODEL that set timm's argument of the same name. ConViT's depth and heads hang together with the number of its
# convolutional blocks; Swin has a depth and a number of heads for each stage.
_SIZES = {
    VisionTransformer: ("IMG_SIZE", "PATCH_SIZE", "EMBED_DIM", "DEPTH", "NUM_HEADS"),
    ConVit: ("IMG_SIZE", "PATCH_SIZE"),
    SwinTransformer: ("IMG_SIZE", "PATCH_SIZE", "EMBED_DIM"),
}


def build_classifier(cfg: CfgNode, num_classes: int) -> nn.Module:
    """Builds a classifier of timm's with KArAt in its blocks, from MODEL, with random weights.

    With MODEL.KARAT.ENABLED False it is timm's own, key for key. A universal operator, shared by the blocks that have
    KArAt, is `operator`; those of blockwise sharing are `attn.operator` of their blocks. Of ConViT, the blocks of plain
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
        # One seed then draws the same for softmax and KArAt after this.
        with torch.random.fork_rng(devices=[]):
            _replace_attention(model, cfg)
    return model


def _replace_attention(model: nn.Module, cfg: CfgNode) -> None:
    """Puts KArAt in the place of softmax in every block that is to have it."""
    config = karat_config(cfg)
    name, karat = cfg.MODEL.NAME, cfg.MODEL.KARAT
    is_swin = isinstance(model, SwinTransformer)
    blocks = [block for layer in model.layers for block in layer.blocks] if is_swin else model.blocks
    plain = {index: block for index, block in enumerate(blocks) if _is_plain(getattr(block, "attn", None))}
    if not plain:
        raise ValueError(
            f"MODEL.NAME is {name}, none of whose {len(blocks)} blocks has the plain self-attention that KArAt takes "
            "the place of: projections to query, key and value and of the output, and nothing else. Name another "
            "model, or set MODEL.KARAT.ENABLED False."
        )
    foreign = [index for index in karat.BLOCKS if index not in plain]
    if foreign:
        raise ValueError(f"MODEL.KARAT.BLOCKS names {foreign}; in {name} the blocks for KArAt are {list(plain)}.")
    chosen = [plain[index] for index in sorted(set(karat.BLOCKS))] or list(plain.values())
    if is_swin:
        _check_windows(model, chosen, cfg)
        num_tokens = min(block.window_area for block in chosen)
    else:
        num_tokens = model.patch_embed.num_patches + (1 if isinstance(model, ConVit) else model.num_prefix_tokens)
    if config.rank is not None and config.rank > num_tokens:
        raise ValueError(
            f"MODEL.KARAT.RANK is {config.rank}, above N = {num_tokens}, the number of tokens that attend to each other"
            + (" in the smallest window" if is_swin else "")
            + f" (MODEL.IMG_SIZE, PATCH_SIZE). It must be from 1 to {num_tokens}."
        )
    num_heads = min(block.attn.num_heads for block in chosen)
    if config.num_karat_heads is not None and config.num_karat_heads > num_heads:
        raise ValueError(
            f"MODEL.KARAT.NUM_KARAT_HEADS is {config.num_karat_heads}, above {num_heads}, the"
            + (" fewest" if is_swin else "")
            + f" heads of a block. It must be from 1 to {num_heads}, or None for all."
        )
    shared = None
    if karat_sharing(cfg) == "universal":
        shared = model.operator = KArAtOperator(num_heads, num_tokens, config)
    for block in chosen:
        if is_swin:
            operator = KArAtOperator(block.attn.num_heads, block.window_area, config)
            attention = KArAtSwinWindowAttention(block.attn, operator, block.shift_size[0])
            attention.map_size = block.input_resolution
        else:
            qkv = block.attn.qkv
            attention = KArAtAttention(
                qkv.in_features,
                num_heads,
                shared or KArAtOperator(num_heads, num_tokens, config),
                shares_operator=shared is not None,
                qkv_bias=qkv.bias is not None,
                # The other tokens, for a class or as registers, stand before these.
                input_size=model.patch_embed.grid_size,
            )
            # The linear layers keep the weights that timm drew, so that one seed starts KArAt and softmax alike.
            attention.qkv, attention.proj = qkv, block.attn.proj
        block.attn = attention


def _is_plain(attention: nn.Module | None) -> bool:
    """Whether an attention is multi-head self-attention and no more: neither gated nor with norms of its own."""
    names = {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias", "relative_position_bias_table"}
    return (
        type(attention) in (Attention, MHSA, WindowAttention)
        and attention.state_dict().keys() <= names
        and attention.qkv.out_features == 3 * attention.qkv.in_features
    )


def _check_windows(model: SwinTransformer, blocks: list[nn.Module], cfg: CfgNode) -> None:
    """Checks what Swin's windows ask of KArAt."""
    if cfg.MODEL.KARAT.SHARING == "universal":
        heads = [layer.blocks[0].attn.num_heads for layer in model.layers]
        raise ValueError(
            f"MODEL.KARAT.SHARING is universal, but the stages of {cfg.MODEL.NAME} differ in their number of heads, "
            f"{heads}, and an operator has functions for each head. Set MODEL.KARAT.SHARING blockwise."
        )
    image, patch = (sizes[0] for sizes in (model.patch_embed.img_size, model.patch_embed.patch_size))
    for block in blocks:
        side, window = block.input_resolution[0], block.window_size[0]
        if side % window:
            # timm pads such maps; softmax learns to live with it, an operator would sum over the padding.
            raise ValueError(
                f"MODEL.IMG_SIZE is {image} and PATCH_SIZE {patch}, for which {cfg.MODEL.NAME} has a feature map of "
                f"{side} × {side} tokens, and its windows of {window} × {window} do not tile it. With KArAt they must: "
                f"multiples of {patch * window * 2 ** (len(model.layers) - 1)} pixels fit."
            )


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
    """timm's model of a name, for its kind and sizes: it has no values."""
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
