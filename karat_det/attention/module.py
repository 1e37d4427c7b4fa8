"""Multi-head self-attention with a KArAt operator in softmax's place.

It replaces Detectron2's `modeling.backbone.vit.Attention` and timm's `layers.Attention`, and keeps their parameter
names, so that their checkpoints load by name: `qkv`, `proj`, `rel_pos_h`, `rel_pos_w`.
"""

import math

import torch
from torch import Tensor, nn

from .bias import Bias
from .operator import KArAtOperator, at_least_float32


class KArAtAttention(nn.Module):
    """Multi-head self-attention whose scores pass through learnable functions in place of softmax.

    Args:
        dim: number of channels C.
        num_heads: number of heads; must divide dim.
        operator: in softmax's place, for the same number of heads. Its num_tokens is N, the number of tokens that
            attend to each other.
        shares_operator: whether other attentions have the same operator. It is then used but not registered here: the
            model must register it, once.
        qkv_bias: whether query, key and value have a bias.
        use_rel_pos: whether decomposed relative positions are added to the scores (section 4 of MViTv2,
            arXiv 2112.01526, as in Detectron2).
        rel_pos_zero_init: whether these start at zero; else from a truncated normal of deviation 0.02.
        input_size: (H, W) of the token grid, without class tokens. Required for relative positions, which need
            H · W = N, and for resampling the operator to another grid.
        proj_drop: dropout after the output projection.

    Raises:
        ValueError: sizes do not fit each other, or the operator is of another number of heads or tokens.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        operator: KArAtOperator,
        *,
        shares_operator: bool = False,
        qkv_bias: bool = True,
        use_rel_pos: bool = False,
        rel_pos_zero_init: bool = True,
        input_size: tuple[int, int] | None = None,
        proj_drop: float = 0.0,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads is {num_heads}, which does not divide dim, {dim}.")
        if use_rel_pos and input_size is None:
            raise ValueError("input_size is None. With use_rel_pos it must be the (H, W) of the token grid.")
        area = math.prod(input_size or ())
        check_operator(operator, num_heads, area if use_rel_pos else max(area, operator.num_tokens))
        self.num_heads = num_heads
        self.input_size = input_size
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

        self.use_rel_pos = use_rel_pos
        if use_rel_pos:
            head_dim = dim // num_heads
            self.rel_pos_h = nn.Parameter(torch.zeros(2 * input_size[0] - 1, head_dim))
            self.rel_pos_w = nn.Parameter(torch.zeros(2 * input_size[1] - 1, head_dim))
            if not rel_pos_zero_init:
                nn.init.trunc_normal_(self.rel_pos_h, std=0.02)
                nn.init.trunc_normal_(self.rel_pos_w, std=0.02)

        if shares_operator:
            # nn.Module.__setattr__ would register it, and the state dict would hold it once for every block.
            object.__setattr__(self, "operator", operator)
        else:
            self.operator = operator

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """
        Args:
            x: tokens on a grid (B, H, W, C), as in Detectron2, or in a row (B, N, C), as in timm.
            attn_mask: broadcastable to (B, heads, N, N). Finite floats are added to the scores; a boolean mask is False
                where a query does not see a key, as in torch's scaled_dot_product_attention.
            is_causal: must be False; timm's blocks pass it.

        Returns:
            A tensor of the shape of x.

        Raises:
            ValueError: x has another number of tokens than the operator, or is_causal is True.
        """
        if is_causal:
            raise ValueError("is_causal is True. Tokens of an image have no order: give an attn_mask, or False.")
        batch_size, num_tokens, channels = x.shape[0], x.shape[1:-1].numel(), x.shape[-1]
        self.operator.check_tokens(num_tokens)
        # (3, B, heads, N, d)
        qkv = self.qkv(x).reshape(batch_size, num_tokens, 3, self.num_heads, channels // self.num_heads)
        qkv = qkv.permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        positions = rel_pos_terms(query, self.rel_pos_h, self.rel_pos_w) if self.use_rel_pos else ()
        attended = self.operator.attend(query, key, value, Bias(attn_mask, *positions))  # (B, heads, N, d)
        return self.proj_drop(self.proj(attended.transpose(1, 2).reshape(x.shape)))


def check_operator(operator: KArAtOperator, num_heads: int, num_tokens: int) -> None:
    """Raises ValueError unless an operator is for these numbers of heads and tokens."""
    if (operator.num_heads, operator.num_tokens) != (num_heads, num_tokens):
        raise ValueError(
            f"operator is for {operator.num_heads} heads and N = {operator.num_tokens} tokens, but this attention has "
            f"{num_heads} heads and N = {num_tokens}. Give it a KArAtOperator({num_heads}, {num_tokens}, config)."
        )


def rel_pos_terms(query: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor) -> tuple[Tensor, Tensor]:
    """Decomposed relative positions: terms of a score for the row and for the column of its key in the grid.

    Args:
        query: of shape (B, heads, H · W, d), without the scores' scale, as in Detectron2.
        rel_pos_h: of shape (2H − 1, d), one row for each difference of rows of the grid.
        rel_pos_w: of shape (2W − 1, d).

    Returns:
        The vertical and the horizontal term of a Bias, of shape (B, heads, H · W, H or W). They are float32 under
        autocast, as scores are.

    Source: section 4 of MViTv2, arXiv 2112.01526. Unlike Detectron2's add_decomposed_rel_pos it never resizes the
    tables, since the operator fixes the grid.
    """
    height, width = (len(rel_pos_h) + 1) // 2, (len(rel_pos_w) + 1) // 2
    with torch.autocast(query.device.type, enabled=False):
        on_grid = at_least_float32(query).unflatten(2, (height, width))
        rows, columns = at_least_float32(rel_pos_h), at_least_float32(rel_pos_w)
        vertical = torch.einsum("bnhwd,hkd->bnhwk", on_grid, rows[_differences(height, query.device)])
        horizontal = torch.einsum("bnhwd,wkd->bnhwk", on_grid, columns[_differences(width, query.device)])
    return vertical.flatten(2, 3), horizontal.flatten(2, 3)


def _differences(size: int, device: torch.device) -> Tensor:
    """Row of a relative position table for each pair (query, key) of coordinates, of shape (size, size)."""
    coordinates = torch.arange(size, device=device)
    return coordinates[:, None] - coordinates[None, :] + size - 1
