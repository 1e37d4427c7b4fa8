"""Self-attention within windows of a feature map, with a KArAt operator in softmax's place.

A window is M × M tokens of a map that is padded, on the right and below, to whole windows: those of Detectron2's ViT,
and W-MSA of Swin, "Swin Transformer", arXiv 2103.14030. Swin's SW-MSA shifts windows by M / 2, rolling the map, so that
windows at its edge hold tokens that are no neighbours. Padding and the shift divide windows into regions, and a token
attends to those of its own region: neither the score nor the value of another pair has any effect.
"""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .module import KArAtAttention, check_operator
from .operator import KArAtOperator


class KArAtViTDetWindowAttention(KArAtAttention):
    """KArAtAttention within windows of a feature map; nothing attends to padding.

    It pads the map and cuts it into windows itself, so its Detectron2 `vit.Block` must have `window_size` 0. Its
    arguments are KArAtAttention's, with input_size (M, M).
    """

    def forward(self, x: Tensor) -> Tensor:
        """
        Args:
            x: feature map (B, H, W, C).

        Returns:
            A tensor of the shape of x.
        """
        side = self.input_size[0]
        height, width = int(x.shape[1]), int(x.shape[2])
        padded = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))
        windows = padded.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3)  # (B, H / M, W / M, M, M, C)
        attended = attend_by_regions(super().forward, windows.flatten(0, 2), (height, width), side)
        return attended.reshape(windows.shape).transpose(2, 3).reshape(padded.shape)[:, :height, :width]


class KArAtSwinWindowAttention(nn.Module):
    """W-MSA or SW-MSA with a KArAt operator in softmax's place; it takes over the layers of Detectron2's or timm's.

    Args:
        softmax: the `WindowAttention` of either. Its `relative_position_bias_table`, `relative_position_index`, `qkv`,
            `proj` and `proj_drop` become this one's.
        operator: for the same number of heads, and for the tokens of a window.
        shift_size: shift of the windows, in tokens.

    Attributes:
        map_size: (H, W) of the feature map, in tokens, without padding; to be set before `forward`. None: no window
            has padding, and `forward` goes by its mask.

    Raises:
        ValueError: the operator is of another number of heads or tokens.
    """

    def __init__(self, softmax: nn.Module, operator: KArAtOperator, shift_size: int = 0):
        super().__init__()
        check_operator(operator, softmax.num_heads, math.prod(softmax.window_size))
        self.window_size = softmax.window_size
        self.shift_size = shift_size
        self.num_heads = softmax.num_heads
        self.scale = softmax.scale
        self.relative_position_bias_table = softmax.relative_position_bias_table
        # Detectron2 has it in its state dict, timm does not.
        persistent = "relative_position_index" in softmax.state_dict()
        self.register_buffer("relative_position_index", softmax.relative_position_index, persistent)
        self.qkv = softmax.qkv
        self.proj = softmax.proj
        self.proj_drop = softmax.proj_drop
        self.operator = operator
        self.map_size: tuple[int, int] | None = None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """
        Args:
            x: tokens of the windows, (B · windows, N, C).
            mask: for the windows of an image, (windows, N, N), 0 where a query sees a key, as Swin's blocks pass it. It
                ignores padding: if map_size is set, it is not read.

        Returns:
            A tensor of the shape of x.
        """
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)  # (heads, N, N)

        def attend(qkv: Tensor, mask: Tensor | None) -> Tensor:
            query, key, value = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (*, heads, N, d)
            attended = self.operator.attend(query, key, value, bias, self.scale, mask)
            return attended.transpose(1, 2).flatten(2)

        if self.map_size is None:
            visible = None if mask is None else (mask == 0).repeat(len(x) // len(mask), 1, 1).unsqueeze(1)
            return self.proj_drop(self.proj(attend(self.qkv(x), visible)))
        windows = attend_by_regions(attend, self.qkv(x), self.map_size, self.window_size[0], self.shift_size)
        return self.proj_drop(self.proj(windows))


def attend_by_regions(
    attend: Callable[[Tensor, Tensor | None], Tensor],
    x: Tensor,
    map_size: tuple[int, int],
    window_size: int,
    shift_size: int = 0,
) -> Tensor:
    """Applies an attention to windows. Those of several regions get a mask, the others none, which takes less time.

    Args:
        attend: maps some of the windows, (some, ...) like x, and a mask (some, 1, N, N), False where a query does not
            see a key, or None, to tokens of the same shape except for the last dimension.
        x: tokens of the windows, (B · windows, ...).
        map_size, window_size, shift_size: see `window_regions`.

    Returns:
        The results of `attend`, in the order of x.
    """
    # From Python's integers, so that torch.compile knows how many windows are divided.
    rows, columns = (
        [len(set(places)) > 1 for places in _axis_regions(size, window_size, shift_size)] for size in map_size
    )
    is_divided = [row or column for row, column in itertools.product(rows, columns)]
    if not any(is_divided):
        return attend(x, None)
    divided = [index for index, is_so in enumerate(is_divided) if is_so]
    whole = [index for index, is_so in enumerate(is_divided) if not is_so]
    regions = window_regions(map_size, window_size, shift_size)[divided].to(x.device)  # (divided, N)
    seen = regions[:, None, None, :] == regions[:, None, :, None]  # (divided, 1, N, N)
    batch_size = x.shape[0] // len(is_divided)
    mask = seen.repeat(batch_size, 1, 1, 1)
    if not whole:
        return attend(x, mask)
    order = torch.tensor(whole + divided, device=x.device)
    parts = x.unflatten(0, (batch_size, -1))[:, order].split((len(whole), len(divided)), dim=1)
    attended = [
        attend(part.flatten(0, 1), part_mask).unflatten(0, (batch_size, -1))
        for part, part_mask in zip(parts, (None, mask), strict=True)
    ]
    return torch.cat(attended, dim=1)[:, order.argsort()].flatten(0, 1)


def window_regions(map_size: tuple[int, int], window_size: int, shift_size: int) -> Tensor:
    """Number of the region that each token of each window belongs to, of shape (windows, N), on the CPU.

    Args:
        map_size: (H, W) of the feature map, in tokens, without padding.
        window_size: side of a window, in tokens.
        shift_size: roll of the map, padded to whole windows, before it is cut into windows, in tokens.
    """
    # (windows along the axis, M)
    rows, columns = (torch.tensor(_axis_regions(size, window_size, shift_size)) for size in map_size)
    return (4 * rows[:, None, :, None] + columns[:, None, :]).flatten(2).flatten(0, 1)


def _axis_regions(size: int, window_size: int, shift_size: int) -> list[list[int]]:
    """Code of each place of each window along one axis: 1 if the roll has brought it from the opposite edge, plus 2 if
    it is padding."""
    padded = math.ceil(size / window_size) * window_size
    places = [(place + shift_size) % padded for place in range(padded)]
    regions = [(place < shift_size) + 2 * (place >= size) for place in places]
    return [regions[start : start + window_size] for start in range(0, padded, window_size)]
