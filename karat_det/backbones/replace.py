"""Puts KArAt into a built transformer: Detectron2's ViT and Swin, timm's ViT, ConViT and Swin.

Projections, relative positions and dropout of the softmax attention stay, under their names: the transformer keeps its
weights, and checkpoints load by name before and after.
"""

import math
from collections.abc import Collection
from functools import partial

import torch
from detectron2.modeling.backbone import swin as detectron2_swin
from detectron2.modeling.backbone import vit as detectron2_vit
from timm.models import convit, swin_transformer, vision_transformer
from torch import nn

from ..attention import KArAtAttention, KArAtConfig, KArAtOperator
from ..attention.window import KArAtSwinWindowAttention, KArAtViTDetWindowAttention

_SWINS = (detectron2_swin.SwinTransformer, swin_transformer.SwinTransformer)
_HOSTS = (detectron2_vit.ViT, vision_transformer.VisionTransformer, convit.ConVit, *_SWINS)
_SOFTMAX = (
    *(detectron2_vit.Attention, detectron2_swin.WindowAttention),
    *(vision_transformer.Attention, convit.MHSA, swin_transformer.WindowAttention),
)
_KARAT = (KArAtAttention, KArAtSwinWindowAttention)


def replace_attention(
    model: nn.Module,
    config: KArAtConfig,
    *,
    sharing: str = "blockwise",
    blocks: Collection[int] | None = None,
    image_size: tuple[int, int] | None = None,
) -> nn.Module:
    """Replaces softmax by KArAt in the attention of a transformer's blocks.

    One seed draws the same for softmax and KArAt after this: the state of PyTorch's generator is kept.

    Args:
        model: Detectron2's ViT or SwinTransformer, timm's VisionTransformer, ConVit or SwinTransformer. It is changed.
        config: the operators'.
        sharing: "blockwise" gives each block an operator of its own, `attn.operator` of the block; "universal" gives
            all the same one, `operator` of the model, which must be for one number of heads and tokens.
        blocks: indices of the blocks that get KArAt, counted through all stages of a Swin. None is all blocks for
            KArAt: in ConViT, those that are not gated by positions.
        image_size: (height, width), in pixels, of the images of a Detectron2 ViT. Only global blocks without relative
            positions need it: other attention has a known number of tokens.

    Returns:
        The model, so that a LazyConfig can build it: `LazyCall(replace_attention)(model=LazyCall(ViT)(…), …)`.

    Raises:
        ValueError: the model is another, a block is none for KArAt or has it already, sizes do not fit each other, or
            an argument has a value that is not allowed. The message begins with the argument; nothing is changed.
    """
    if not isinstance(model, _HOSTS):
        known = ", ".join(f"{host.__module__.partition('.')[0]}'s {host.__name__}" for host in _HOSTS)
        raise ValueError(
            f"model is a {type(model).__name__}. It must be one of {known}: give the transformer itself, or put "
            "KArAtAttention in the place of its attention."
        )
    if sharing not in ("blockwise", "universal"):
        raise ValueError(f"sharing is {sharing!r}, which is unknown. Known: blockwise, universal.")
    if image_size is not None and not isinstance(model, detectron2_vit.ViT):
        raise ValueError(f"image_size is {image_size}. It must be None: the model was built for images of one size.")
    chosen = _chosen_blocks(model, blocks)
    sizes = {index: _size(model, block, image_size) for index, block in chosen.items()}
    if sharing == "universal":
        _check_universal(model, sizes)
    with torch.device("meta"):  # checks the config against the least of each
        KArAtOperator(*map(min, zip(*sizes.values(), strict=True)), config)

    make_operator = partial(KArAtOperator, config=config)
    with torch.random.fork_rng(devices=[]):
        shared = make_operator(*next(iter(sizes.values()))) if sharing == "universal" else None
        for index, block in chosen.items():
            operator = (shared or make_operator(*sizes[index])).to(block.attn.qkv.weight)
            block.attn = _karat_attention(model, block, operator, shared is not None, image_size)
    if shared is not None:
        model.operator = shared
    return model


def _chosen_blocks(model: nn.Module, indices: Collection[int] | None) -> dict[int, nn.Module]:
    """The blocks that get KArAt, by index."""
    blocks = [block for layer in model.layers for block in layer.blocks] if isinstance(model, _SWINS) else model.blocks
    attentions = dict(enumerate(getattr(block, "attn", None) for block in blocks))
    chosen = attentions.keys() if indices is None else set(indices)
    plain = [index for index, attention in attentions.items() if _is_plain(attention)]
    replaced = [index for index in sorted(chosen) if isinstance(attentions.get(index), _KARAT)]
    if replaced:
        named = "is None, for all" if indices is None else f"names {sorted(chosen)}"
        raise ValueError(f"blocks {named}, but {replaced} have KArAt already. Those that have softmax are {plain}.")
    if not plain:
        raise ValueError(
            f"model is a {type(model).__name__}, none of whose {len(blocks)} blocks has the plain self-attention that "
            "KArAt takes the place of: projections to query, key and value and of the output, and nothing else."
        )
    foreign = sorted(chosen - set(plain))
    if indices is not None and (foreign or not chosen):
        raise ValueError(f"blocks names {foreign or 'none'}; the blocks for KArAt are {plain}.")
    chosen = sorted(chosen & set(plain))
    dropped = [index for index in chosen if getattr(getattr(attentions[index], "attn_drop", None), "p", 0)]
    if dropped:
        raise ValueError(
            f"model drops attention in blocks {dropped}, which KArAt does not. Build it with an attention dropout of 0."
        )
    return {index: blocks[index] for index in chosen}


def _is_plain(attention: nn.Module | None) -> bool:
    """Whether an attention is plain multi-head self-attention, neither gated nor with norms."""
    names = {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias", "rel_pos_h", "rel_pos_w"}
    names |= {"relative_position_bias_table", "relative_position_index"}
    return (
        type(attention) in _SOFTMAX
        and attention.state_dict().keys() <= names
        and attention.qkv.out_features == 3 * attention.qkv.in_features
    )


def _size(model: nn.Module, block: nn.Module, image_size: tuple[int, int] | None) -> tuple[int, int]:
    """Number of heads, and of tokens that attend to each other."""
    if isinstance(model, detectron2_vit.ViT):
        return block.attn.num_heads, math.prod(_vit_grid(model, block, image_size))
    if isinstance(model, _SWINS):
        if isinstance(model, swin_transformer.SwinTransformer):
            _check_windows(model, block)
        return block.attn.num_heads, math.prod(block.attn.window_size)
    # A class token, of which ConVit does not know the number, and registers.
    return block.attn.num_heads, model.patch_embed.num_patches + getattr(model, "num_prefix_tokens", 1)


def _vit_grid(model: nn.Module, block: nn.Module, image_size: tuple[int, int] | None) -> tuple[int, int]:
    """(H, W) of the tokens that attend to each other in a block of Detectron2's ViT."""
    if block.window_size:
        return block.window_size, block.window_size
    image = image_size and tuple(
        size // stride for size, stride in zip(image_size, model.patch_embed.proj.stride, strict=True)
    )
    positions = None
    if block.attn.use_rel_pos:
        positions = (len(block.attn.rel_pos_h) + 1) // 2, (len(block.attn.rel_pos_w) + 1) // 2
    if image and positions and image != positions:
        raise ValueError(
            f"image_size is {image_size}, for {image[0]} × {image[1]} patches, but relative positions of the model are "
            f"those of {positions[0]} × {positions[1]}. Build it for such images."
        )
    if not (image or positions):
        raise ValueError(
            "image_size is None. It must be the (height, width), in pixels, of the images that the model is for, since "
            "its global blocks have no relative positions that show it."
        )
    return image or positions


def _check_windows(model: nn.Module, block: nn.Module) -> None:
    """Checks that the windows of timm's Swin tile its feature maps."""
    (height, width), (rows, columns) = block.input_resolution, block.window_size
    if rows != columns or height % rows or width % columns:
        # timm pads such maps; softmax learns to live with it, an operator would sum over the padding.
        image, patch = (sizes[0] for sizes in (model.patch_embed.img_size, model.patch_embed.patch_size))
        raise ValueError(
            f"img_size is {image}, with patches of {patch}, for which a feature map has {height} × {width} tokens, and "
            f"its windows of {rows} × {columns} do not tile it. With KArAt they must, and be squares: "
            f"multiples of {patch * rows * 2 ** (len(model.layers) - 1)} pixels fit."
        )


def _check_universal(model: nn.Module, sizes: dict[int, tuple[int, int]]) -> None:
    """Checks that one operator fits all blocks."""
    if isinstance(model, _SWINS):
        heads = [layer.blocks[0].attn.num_heads for layer in model.layers]
        raise ValueError(
            "sharing is universal, but the operators of a Swin are blockwise only: they have functions for each head "
            f"and each of N tokens, and stages differ in these, here in {heads} heads. It must be blockwise."
        )
    if len(set(sizes.values())) > 1:
        kinds = {size: [index for index in sizes if sizes[index] == size] for size in sizes.values()}
        found = ", ".join(f"{size[1]} in blocks {indices}" for size, indices in kinds.items())
        raise ValueError(
            f"sharing is universal, but N, the number of tokens that attend to each other, differs between blocks: "
            f"{found}. It must be blockwise, or blocks of one kind."
        )
    if hasattr(model, "operator"):
        raise ValueError("sharing is universal, but the model has a universal operator already. It must be blockwise.")


def _karat_attention(
    model: nn.Module, block: nn.Module, operator: KArAtOperator, is_shared: bool, image_size: tuple[int, int] | None
) -> nn.Module:
    """The attention of a block with an operator in softmax's place."""
    softmax = block.attn
    if isinstance(model, _SWINS):
        shift_size = block.shift_size if isinstance(block.shift_size, int) else block.shift_size[0]
        attention = KArAtSwinWindowAttention(softmax, operator, shift_size)
        if isinstance(model, swin_transformer.SwinTransformer):
            attention.map_size = block.input_resolution
        else:
            block.register_forward_pre_hook(_pass_map_size)
        return attention.train(softmax.training)

    is_vitdet = isinstance(model, detectron2_vit.ViT)
    # timm's class tokens and registers come before the grid.
    grid = _vit_grid(model, block, image_size) if is_vitdet else model.patch_embed.grid_size
    attention_type = KArAtViTDetWindowAttention if is_vitdet and block.window_size else KArAtAttention
    with torch.device("meta"):  # softmax's layers take the place of its own
        attention = attention_type(
            softmax.qkv.in_features,
            softmax.num_heads,
            operator,
            shares_operator=is_shared,
            use_rel_pos=is_vitdet and softmax.use_rel_pos,
            input_size=grid,
        )
    for name in ("qkv", "proj", "proj_drop", "rel_pos_h", "rel_pos_w"):
        if hasattr(softmax, name):
            setattr(attention, name, getattr(softmax, name))
    if is_vitdet:
        block.window_size = 0  # the attention cuts the map into windows itself: it knows then what is padding
    return attention.train(softmax.training)


def _pass_map_size(block: detectron2_swin.SwinTransformerBlock, inputs: tuple) -> None:
    """Passes the size of the feature map to a block's attention; Detectron2 sets it on the block alone."""
    block.attn.map_size = block.H, block.W
