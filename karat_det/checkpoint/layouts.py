"""Known layouts of weights, and their conversion to the names of a model.

A ViT has the same names within its blocks everywhere. Layouts differ in the prefix of these names, in whether query,
key and value are one matrix, and in the file's other content: a class token, a classifier, the decoder of masked
pretraining. timm's Swin merges patches at the start of a stage, the original one and Detectron2's at the end of the
stage before. A KArAt classifier has timm's names, and its operators' names within their blocks.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .resampling import class_tokens, position_grid

LAYOUTS = (
    "timm's ViT, DeiT, ConViT and Swin, the original Swin, MAE, and Detectron2's detectors with a ViT or Swin backbone"
)

# Prefixes of a model within another one.
_WRAPPERS = ("module.", "_orig_mod.", "model.")
_PATCHES = "patch_embed.proj.weight"
# Left out if the model has no such key: the reason, and the pattern of such keys.
_IGNORABLE = {
    "class tokens, which the model does not have": r"cls_token|dist_token",
    "the classifier's head": r"(head|head_dist|fc_norm|pre_logits)\..+",
    "the classifier's last norm": r"norm\.(weight|bias)",
    "of masked pretraining": r"mask_token|decoder[_.].+",
    "ConViT's attention to positions": r"blocks\.\d+\.attn\.(gating_param|pos_proj\..+)",
}
# Tokens after the class token, whose positions are left out with them.
_DROPPED = ("dist_token", "reg_token")
# Always left out.
_CONSTANT = re.compile(r".+\.(relative_position_index|attn_mask)")
_OPERATOR = re.compile(r"(^|\.)operator\.coefficients$")
_OPERATOR_OF_BLOCK = re.compile(r"(?P<operator>(.+\.)?blocks\.\d+\.attn\.operator)\.(?P<leaf>.+)")
# The last layer of a classifier, whose shape depends on its classes.
HEAD = re.compile(r"(head|head_dist)(\.fc)?\.(weight|bias)")
# Keys of a transformer that every file has: patches, blocks and the merging between stages.
_OWN = re.compile(r"(?P<part>patch_embed|(layers\.\d+\.)?blocks\.\d+|layers\.\d+\.downsample)\.(?P<leaf>.+)")
# Except these: softmax weights have no operator, classifiers no decomposed positions, some models no bias.
_OPTIONAL = re.compile(r"(.+\.)?(operator\..+|rel_pos_[hw]|relative_position_index|attn_mask|qkv\.bias)")
_SPLIT = re.compile(r"(?P<attention>.*\battn\.)(?P<part>qk|q|k|v)(_proj)?\.(?P<leaf>weight|bias)")


class _Host(NamedTuple):
    """A transformer: a key that every one has, and the prefix of its keys in a detector."""

    name: str
    block: str
    in_detector: str


_HOSTS = (
    _Host("ViT", "blocks.0.norm1.weight", "backbone.net."),
    _Host("Swin", "layers.0.blocks.0.norm1.weight", "backbone.bottom_up."),
)


class Conversion(NamedTuple):
    """A state dict in the names of a model.

    Attributes:
        state: the state dict.
        token_grids: its operators'.
        source: the layout in words; "" if it is unknown.
        ignored: keys of the file that are left out, and why.
    """

    state: dict[str, Tensor]
    token_grids: dict[str, Sequence[int]]
    source: str
    ignored: dict[str, str]


def convert_state(
    state: Mapping[str, Tensor], token_grids: Mapping[str, Sequence[int]], expected: Collection[str] | None = None
) -> Conversion:
    """Brings a state dict to the names of a model. Unknown keys keep their names.

    Args:
        state: in any of the LAYOUTS.
        token_grids: its operators', by their names there; {} if they are not known.
        expected: keys of the model that is to load it; None for a detector of the same kind.

    Raises:
        ValueError: the file has a ViT and the model a Swin, or the other way round.
    """
    state = _unwrap(state, expected or ())
    host, source = _find_host(state)
    wanted, target = _find_host(expected) if expected is not None else (host, host.in_detector if host else "")
    if host is None or wanted is None:
        return Conversion(state, dict(token_grids), "", {})
    if host != wanted:
        raise ValueError(
            f"The file holds the weights of a {host.name}, and the model is a {wanted.name}. Name a file that is for a "
            f"{wanted.name}, or the config of a {host.name}."
        )
    merges_later = _merges_at_start(expected, target) if expected is not None else False
    stage_shift = merges_later - _merges_at_start(state, source)
    has_operators = any(_OPERATOR.search(key) for key in state)
    converted, ignored = {}, {}
    for key, tensor in state.items():
        inside = key.startswith(source)
        name = key.removeprefix(source)
        new_key = target + _shift_merging(name, stage_shift) if inside else key
        if reason := _reason_to_ignore(name, new_key, expected or (), has_operators):
            ignored[key] = reason
        else:
            converted[new_key] = tensor
    _drop_positions(converted, target, state, source, [name for name in _DROPPED if source + name in ignored])
    _adapt_positions(converted, target)
    _fuse_query_key_value(converted, expected or ())
    token_grids = _untold_grids(state, source) | dict(token_grids)
    grids = {target + name.removeprefix(source): grid for name, grid in token_grids.items()}
    return Conversion(converted, grids, _describe(host, state, source), ignored)


def copy_operator_to_blocks(
    state: dict[str, Tensor], grids: dict[str, Sequence[int]], expected: Collection[str]
) -> int:
    """If the file has one operator for all blocks and the model one for each, gives each block a copy, in place.

    Args:
        state: in the names of the model.
        grids: token grids of its operators; those of the copies are added.
        expected: keys of the model.

    Returns:
        Number of blocks that got a copy: 0 if the two operators have different tensors.
    """
    host, prefix = _find_host(expected)
    universal = f"{prefix}operator"
    tensors = {key.removeprefix(f"{universal}."): key for key in state if key.startswith(f"{universal}.")}
    own = [match for key in expected if (match := _OPERATOR_OF_BLOCK.fullmatch(key))]
    if host is None or not own or {match["leaf"] for match in own} != tensors.keys():
        return 0
    for match in own:
        state[match[0]] = state[tensors[match["leaf"]]]
        if universal in grids:
            grids[match["operator"]] = grids[universal]
    for key in tensors.values():
        del state[key]
    return len({match["operator"] for match in own})


def required_tensors(expected: Collection[str]) -> tuple[str, dict[str, dict[str, str]]]:
    """The tensors that a file of the model's kind of transformer has in any case, whatever it was trained for.

    These exclude what pretraining may lack: operators, relative and absolute positions, class tokens, the bias of
    query, key and value, last norms, heads, and all that a detector adds to its transformer.

    Args:
        expected: keys of the model.

    Returns:
        "ViT" or "Swin", and by part of it, such as a block, the key of each tensor by its name in there. "" and {} for
        a model without one.
    """
    host, prefix = _find_host(expected)
    if host is None:
        return "", {}
    parts: dict[str, dict[str, str]] = {}
    for key in expected:
        match = _OWN.fullmatch(key.removeprefix(prefix)) if key.startswith(prefix) else None
        if match and not _OPTIONAL.fullmatch(match["leaf"]):
            parts.setdefault(prefix + match["part"], {})[match["leaf"]] = key
    return host.name, parts


def _unwrap(state: Mapping[str, Tensor], expected: Collection[str]) -> dict[str, Tensor]:
    """Removes the prefix of a whole model, unless the other one has it too."""
    state = dict(state)
    while state:
        prefix = next((prefix for prefix in _WRAPPERS if all(key.startswith(prefix) for key in state)), None)
        if prefix is None or any(key.startswith(prefix) for key in expected):
            break
        state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    return state


def _find_host(keys: Collection[str]) -> tuple[_Host | None, str]:
    """The transformer among the keys, and its prefix."""
    for host in _HOSTS:
        for key in keys:
            prefix = key.removesuffix(host.block)
            if key.endswith(host.block) and prefix + _PATCHES in keys:
                return host, prefix
    return None, ""


def _describe(host: _Host, state: Mapping[str, Tensor], source: str) -> str:
    kind = _kind(host, state, source)
    return f"{kind}, with KArAt" if any(_OPERATOR.search(key) for key in state) else kind


def _kind(host: _Host, state: Mapping[str, Tensor], source: str) -> str:
    if source == host.in_detector:
        return f"a detector with a {host.name} backbone"
    if host.name == "Swin":
        return "timm's Swin" if _merges_at_start(state, source) else "the original Swin"
    kinds = {
        "ConViT": f"{source}blocks.0.attn.gating_param",
        "a distilled DeiT": f"{source}dist_token",
    }
    return next((kind for kind, key in kinds.items() if key in state), "a ViT of timm, DeiT or MAE")


def _merges_at_start(keys: Collection[str], prefix: str) -> bool:
    return f"{prefix}layers.0.downsample.reduction.weight" not in keys


def _shift_merging(name: str, stages: int) -> str:
    return re.sub(r"(?<=^layers\.)\d+(?=\.downsample\.)", lambda stage: str(int(stage[0]) + stages), name)


def _reason_to_ignore(name: str, new_key: str, expected: Collection[str], has_operators: bool) -> str | None:
    if _CONSTANT.fullmatch(name):
        return "a constant that the model computes"
    if new_key in expected:
        return None
    if name == "reg_token" and has_operators:
        # Their functions are dropped with them. Softmax takes a part of its weights from registers: it stops.
        return "register tokens, which the model does not have"
    return next((reason for reason, pattern in _IGNORABLE.items() if re.fullmatch(pattern, name)), None)


def _drop_positions(
    converted: dict[str, Tensor], target: str, state: Mapping[str, Tensor], source: str, dropped: Sequence[str]
) -> None:
    """Removes the positions of dropped tokens after the class token, if they have positions."""
    key, count = f"{target}pos_embed", sum(state[source + name].shape[1] for name in dropped)
    if not count or key not in converted:
        return
    grid = position_grid(state, f"{source}pos_embed")
    if grid is None or grid.class_tokens:
        first = class_tokens(state, source) - count
        converted[key] = torch.cat([converted[key][:, :first], converted[key][:, first + count :]], dim=1)


def _untold_grids(state: Mapping[str, Tensor], source: str) -> dict[str, tuple[int, int, int]]:
    """Grids of the operators of a ViT with several class tokens, which their number of tokens does not show."""
    count, positions = class_tokens(state, source), f"{source}pos_embed"
    grid = position_grid(state, positions) if count > 1 and positions in state else None
    if grid is None:
        return {}
    operators = [key.removesuffix(".coefficients") for key in state if _OPERATOR.search(key)]
    return dict.fromkeys(operators, (grid.height, grid.width, count))


def _adapt_positions(state: dict[str, Tensor], target: str) -> None:
    key = f"{target}absolute_pos_embed"
    if key in state and state[key].ndim == 3:
        # (1, N, C) in the original Swin, (1, C, H, W) in Detectron2's.
        side = math.isqrt(state[key].shape[1])
        if side**2 == state[key].shape[1]:
            state[key] = state[key].mT.unflatten(2, (side, side))


def _fuse_query_key_value(state: dict[str, Tensor], expected: Collection[str]) -> None:
    """Makes qkv from q, k and v, or from ConViT's qk and v, if all exist and the model has them as one."""
    parts: dict[str, dict[str, str]] = {}
    for key in state:
        if (match := _SPLIT.fullmatch(key)) and key not in expected:
            parts.setdefault(f"{match['attention']}qkv.{match['leaf']}", {})[match["part"]] = key
    for fused, keys in parts.items():
        names = next((names for names in (("q", "k", "v"), ("qk", "v")) if set(names) == set(keys)), None)
        if names and len({state[keys[name]].shape[1:] for name in names}) == 1:
            state[fused] = torch.cat([state.pop(keys[name]) for name in names])
