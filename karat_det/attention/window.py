"""Self-attention within windows, plain and shifted, with a KArAt operator where softmax stood.

Takes the place of Swin's W-MSA and SW-MSA, "Swin Transformer", arXiv 2103.14030. A window is M × M tokens of a feature
map; SW-MSA shifts them by M / 2, rolling the map, so that windows at its edge hold tokens that are no neighbours.
"""

import math

import torch
from torch import Tensor, nn

from .operator import KArAtConfig, KArAtOperator


class KArAtWindowAttention(nn.Module):
    """W-MSA or SW-MSA with a KArAt operator where softmax stood; it takes over the layers of Detectron2's or timm's.

    A token attends to those of its own region of the window. Tokens that the shift has brought together from opposite
    edges of the feature map are in different regions, and so are tokens and padding: neither the score nor the value of
    such a pair has any effect.

    Args:
        softmax: the `WindowAttention` of either. Its `relative_position_bias_table`, `relative_position_index`, `qkv`
            and `proj` become this one's.
        shift_size: by how many tokens the windows are shifted.
        config: see KArAtConfig.

    Attributes:
        map_size: (H, W) of the feature map, in tokens, without padding; to be set before `forward`.
    """

    def __init__(self, softmax: nn.Module, shift_size: int, config: KArAtConfig):
        super().__init__()
        self.window_size = softmax.window_size
        self.shift_size = shift_size
        self.num_heads = softmax.num_heads
        self.scale = softmax.scale
        self.relative_position_bias_table = softmax.relative_position_bias_table
        # Detectron2 has it in its state dict, timm has not.
        persistent = "relative_position_index" in softmax.state_dict()
        self.register_buffer("relative_position_index", softmax.relative_position_index, persistent)
        self.qkv = softmax.qkv
        self.proj = softmax.proj
        self.operator = KArAtOperator(self.num_heads, math.prod(self.window_size), config)
        self.map_size: tuple[int, int] | None = None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """
        Args:
            x: tokens of the windows, (B · windows, N, C).
            mask: that for the shift, which knows nothing of padding. It is there since blocks pass it, and not read.

        Returns:
            A tensor of the shape of x.
        """
        regions = window_regions(self.map_size, self.window_size[0], self.shift_size)  # (windows, N)
        # (3, B, windows, heads, N, d)
        qkv = self.qkv(x).reshape(-1, *regions.shape, 3, self.num_heads, x.shape[-1] // self.num_heads)
        qkv = qkv.permute(3, 0, 1, 4, 2, 5)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)  # (heads, N, N)

        # Few windows are of more than one region. The others need no mask, without which attention is leaner.
        divided = (regions != regions[:, :1]).any(dim=1)
        seen = regions[divided, None, None, :] == regions[divided, None, :, None]  # (windows, 1, N, N)
        attended = qkv.new_empty(qkv.shape[1:])
        for chosen, mask in ((~divided, None), (divided, seen.to(x.device))):
            windows = chosen.nonzero().flatten().to(x.device)
            if len(windows):
                query, key, value = qkv.index_select(2, windows)
                attended[:, windows] = self.operator.attend(query, key, value, bias, self.scale, mask)
        return self.proj(attended.transpose(2, 3).reshape(x.shape))


def window_regions(map_size: tuple[int, int], window_size: int, shift_size: int) -> Tensor:
    """Number of the region that each token of each window belongs to, of shape (windows, N), on the CPU.

    Args:
        map_size: (H, W) of the feature map, in tokens, without padding.
        window_size: side of a window, in tokens.
        shift_size: by how many tokens the map, padded to whole windows, is rolled before it is cut into windows.
    """
    rows, columns = (_axis_regions(size, window_size, shift_size) for size in map_size)
    regions = 4 * rows[:, None] + columns
    in_windows = regions.unflatten(1, (-1, window_size)).unflatten(0, (-1, window_size))
    return in_windows.transpose(1, 2).flatten(2).flatten(0, 1)


def _axis_regions(size: int, window_size: int, shift_size: int) -> Tensor:
    """Along one axis of the map: 1 for what the roll has brought from the opposite edge, plus 2 for padding."""
    places = torch.arange(math.ceil(size / window_size) * window_size).roll(-shift_size)
    return (places < shift_size) + 2 * (places >= size)
