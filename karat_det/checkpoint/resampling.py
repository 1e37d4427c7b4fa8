"""Resamples weights from one grid of tokens to another: a model made for 224 × 224 pixels starts one for 512 × 512.

Functions and projector of an operator belong to tokens, and tokens lie on an (H, W) grid; so do relative and absolute
positions. Values of neighbouring tokens are interpolated. An operator sums over its N tokens: with N' instead of N
tokens each is weighted by N / N', and the sums keep their size.
"""

import math
from collections.abc import Mapping, MutableMapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import KArAtAttention, KArAtOperator

# A ViT's other tokens, in their order before its patches.
PREFIX_TOKENS = ("cls_token", "dist_token", "reg_token")


class TokenGrid(NamedTuple):
    """Tokens in rows and columns, row by row, after class tokens if there are any; registers count as class tokens."""

    height: int
    width: int
    class_tokens: int = 0

    @classmethod
    def of_square(cls, num_tokens: int, class_tokens: int = 1) -> "TokenGrid | None":
        """The square grid of all tokens, or of all but one, or of all but `class_tokens`; None if there is none."""
        for count in (0, 1, class_tokens):
            side = math.isqrt(max(0, num_tokens - count))
            if side and side**2 == num_tokens - count:
                return cls(side, side, count)
        return None

    @property
    def area(self) -> int:
        return self.height * self.width

    @property
    def num_tokens(self) -> int:
        return self.class_tokens + self.area

    def __str__(self) -> str:
        classes = " and a class token" if self.class_tokens == 1 else f" and {self.class_tokens} class tokens"
        return f"{self.height} × {self.width}" + classes * bool(self.class_tokens)


def token_grids(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name of each operator in the model, and the (H, W) of its tokens, or (H, W, n) with n class tokens or registers.

    These n come before the grid. Operators whose attention has no grid are left out.
    """
    known = {}
    for module in model.modules():
        if isinstance(module, KArAtAttention) and module.input_size:
            class_tokens = module.operator.num_tokens - math.prod(module.input_size)
            known[id(module.operator)] = (*module.input_size, *([class_tokens] if class_tokens else []))
    return {name: known[id(module)] for name, module in model.named_modules() if id(module) in known}


def class_tokens(state: Mapping[str, Tensor], prefix: str) -> int:
    """Number of tokens before the patches of a ViT whose keys begin with `prefix`."""
    return sum(state[prefix + name].shape[1] for name in PREFIX_TOKENS if prefix + name in state)


def position_grid(state: Mapping[str, Tensor], key: str) -> TokenGrid | None:
    """The grid of a ViT's absolute position embedding; its class tokens are those that have a position."""
    return TokenGrid.of_square(state[key].shape[1], class_tokens(state, key.removesuffix("pos_embed")))


def resample_state(
    state: MutableMapping[str, Tensor], model: nn.Module, grids: Mapping[str, Sequence[int]]
) -> tuple[dict[str, str], dict[str, str]]:
    """Resamples tensors of tokens in a state dict to the grids of a model, in place. Other tensors stay.

    These are operators, relative positions, decomposed or in Swin's tables, and absolute position embeddings. A tensor
    that differs from the model's only in its tokens is resampled; one that also differs in heads, rank or grid size
    stays.

    Args:
        state: another model's, of the same kind.
        model: the model that will load it.
        grids: `token_grids` of the model that the state is from. An operator that it lacks has the model's grid if it
            has the model's number of tokens, else a square one.

    Returns:
        Keys of resampled tensors, with both grids; and keys of those that could not be resampled, with the reason.
    """
    resampled, refused = _resample_operators(state, model, grids)
    return resampled | _resample_positions(state, model), refused


def resample_operator(
    state: Mapping[str, Tensor], operator: KArAtOperator, source: TokenGrid, target: TokenGrid
) -> dict[str, Tensor]:
    """Resamples an operator's tensors from one grid of tokens to another, to compute the same on the same image.

    With e the effective coefficients, the tensor times the operator's fixed factor for N tokens, e' is e interpolated,
    times N / N' for each of its axes that runs over tokens. A class token has the weight of one token on either grid.
    Functions that are not linear in all their coefficients, such as wavelets with a width, have factors on the
    amplitudes alone.

    Args:
        state: tensors of an operator that differs from `operator` in its tokens only, by name.
        operator: the operator for the result. `can_resample` must hold for it.
        source: grid of the tokens of `state`.
        target: grid of the operator's tokens, with no more class tokens than `source`.

    Returns:
        The tensors for `operator`, by name.
    """
    before = _with_tokens(operator, source.num_tokens)
    ours = operator.fixed_factors()
    factors = {key: factor / ours[key] for key, factor in before.fixed_factors().items() if key in state}
    weights = dict.fromkeys(state, source.area / target.area)
    if operator.config.base_function != "zero":
        # b(x) has no amplitude. W, which is linear, takes the factor of the sums that b is part of.
        factors["projector"] *= factors["coefficients"] * weights["coefficients"]
        factors["coefficients"] = weights["coefficients"] = 1.0
    result = {}
    for key, axes in _token_axes(operator).items():
        plain = weighted = state[key]
        for axis in axes:
            plain = resample_tokens(plain, axis, source, target)
            weighted = resample_tokens(weighted, axis, source, target, weights[key])
        amplitudes = slice(None) if key == "projector" else operator.basis.amplitudes
        plain[:, amplitudes] = factors[key] * weighted[:, amplitudes]
        result[key] = plain
    return result


def can_resample(operator: KArAtOperator) -> bool:
    """Whether factors on the operator's tensors can compensate for another number of tokens.

    A base function has no factor of its own. Where W follows the functions it can have that factor instead.
    """
    config = operator.config
    return config.base_function == "zero" or (config.order == "project_after" and config.rank is not None)


def resample_tokens(tensor: Tensor, axis: int, source: TokenGrid, target: TokenGrid, weight: float = 1.0) -> Tensor:
    """Interpolates along an axis of tokens, in the two dimensions of their grid.

    Args:
        tensor: any shape, with the tokens of `source` along `axis`.
        axis: index of that axis.
        source, target: `target` has no more class tokens than `source`, whose first ones are kept, the others dropped.
        weight: factor of the interpolated values.

    Returns:
        A tensor of the same shape but for the tokens of `target` along `axis`, in float32 or wider.
    """
    tokens = _exact(tensor).movedim(axis, -1)
    class_tokens, on_grid = tokens.split([source.class_tokens, source.area], dim=-1)
    # With antialiasing every token counts if the grid shrinks.
    on_grid = F.interpolate(
        on_grid.reshape(1, -1, source.height, source.width),
        size=(target.height, target.width),
        mode="bicubic",
        antialias=True,
    ).reshape(*tokens.shape[:-1], target.area)
    return torch.cat([class_tokens[..., : target.class_tokens], weight * on_grid], dim=-1).movedim(-1, axis)


def _resample_operators(
    state: MutableMapping[str, Tensor], model: nn.Module, grids: Mapping[str, Sequence[int]]
) -> tuple[dict[str, str], dict[str, str]]:
    """`resample_state` for operators."""
    resampled, refused = {}, {}
    targets = token_grids(model)
    for name, operator in model.named_modules():
        if not isinstance(operator, KArAtOperator):
            continue
        prefix = f"{name}." if name else ""
        names = list(operator.state_dict())
        if not all(prefix + key in state for key in names):
            continue
        held = {key: state[prefix + key] for key in names}
        num_tokens = _num_tokens(held, operator)
        if num_tokens is None:
            continue
        if num_tokens == operator.num_tokens and not (name in grids and name in targets):
            continue
        told = TokenGrid(*grids[name]) if name in grids else None
        source = told if told and told.num_tokens == num_tokens else TokenGrid.of_square(num_tokens)
        target = TokenGrid(*targets[name]) if name in targets else TokenGrid.of_square(operator.num_tokens)
        if source == target:
            continue
        if not can_resample(operator):
            reason = f"base function {operator.config.base_function} and order {operator.config.order} fix its tokens"
            refused |= {prefix + key: reason for key in held}
            continue
        if source is None or target is None or source.class_tokens < target.class_tokens:
            reason = (
                f"its {num_tokens} tokens are no square grid, and the file does not say which one they are"
                if source is None
                else f"a grid of {source} cannot be brought to the model's {operator.num_tokens} tokens"
            )
            refused |= {prefix + key: reason for key in held}
            continue
        for key, tensor in resample_operator(held, operator, source, target).items():
            state[prefix + key] = tensor
            resampled[prefix + key] = f"{source} to {target}"
    return resampled, refused


def _resample_positions(state: MutableMapping[str, Tensor], model: nn.Module) -> dict[str, str]:
    """`resample_state` for positions, relative and absolute. Returns what was resampled."""
    resampled = {}
    ours = model.state_dict()
    for key, tensor in ours.items():
        if key not in state or state[key].shape == tensor.shape:
            continue
        if key.endswith(("rel_pos_h", "rel_pos_w")) and state[key].shape[1:] == tensor.shape[1:]:
            resampled[key] = f"{len(state[key])} to {len(tensor)}"
            state[key] = F.interpolate(_exact(state[key]).T[None], size=len(tensor), mode="linear")[0].T
        elif key.endswith("relative_position_bias_table") and state[key].shape[1:] == tensor.shape[1:]:
            # (2 M − 1)² offsets within windows of M × M tokens
            source, target = (TokenGrid.of_square(len(each)) for each in (state[key], tensor))
            if source is None or target is None or source.class_tokens or target.class_tokens:
                continue
            resampled[key] = f"{source} to {target}"
            state[key] = resample_tokens(state[key], 0, source, target)
        elif key.endswith("pos_embed") and state[key].ndim == 3 and state[key].shape[::2] == tensor.shape[::2]:
            source, target = (position_grid(each, key) for each in (state, ours))
            if source is None or target is None:
                continue
            resampled[key] = f"{source} to {target}"
            # A class token's row that the file lacks stays the model's; detectors do not read it.
            kept = min(source.class_tokens, target.class_tokens)
            lacking = tensor[:, kept : target.class_tokens]
            on_grid = resample_tokens(state[key], 1, source, target._replace(class_tokens=0))
            state[key] = torch.cat([state[key][:, :kept], lacking.to(on_grid.device), on_grid], dim=1)
    return resampled


def _exact(tensor: Tensor) -> Tensor:
    """The tensor in float32 or wider: not every device interpolates in less."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _num_tokens(state: Mapping[str, Tensor], operator: KArAtOperator) -> int | None:
    """N of an operator's tensors; None if they differ from the operator's in more than that."""
    axes = _token_axes(operator)
    sizes = {tensor.shape[axis] for key, tensor in state.items() for axis in axes[key] if axis < tensor.ndim}
    if len(sizes) != 1:
        return None
    num_tokens, ours = sizes.pop(), operator.state_dict()
    for key, tensor in state.items():
        expected = list(ours[key].shape)
        for axis in axes[key]:
            expected[axis] = num_tokens
        if list(tensor.shape) != expected:
            return None
    return num_tokens


def _token_axes(operator: KArAtOperator) -> dict[str, list[int]]:
    """The axes of each of the operator's tensors that run over tokens: those that grow with their number."""
    larger = _with_tokens(operator, operator.num_tokens + 1).state_dict()
    return {
        key: [axis for axis, size in enumerate(tensor.shape) if size != larger[key].shape[axis]]
        for key, tensor in operator.state_dict().items()
    }


def _with_tokens(operator: KArAtOperator, num_tokens: int) -> KArAtOperator:
    """An operator of the same kind for another number of tokens: shapes and fixed factors, no values."""
    with torch.device("meta"):
        return KArAtOperator(operator.num_heads, num_tokens, operator.config)
