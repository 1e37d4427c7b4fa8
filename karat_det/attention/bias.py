"""Biases and masks of attention scores."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Bias(NamedTuple):
    """The bias of the scores of N queries and M keys: the sum of the terms that are not None.

    The last two are for keys on a grid of H · W = M places, and come together: a query has a term for each row and one
    for each column of the grid, and a key gets those of its own. Decomposed relative positions are of this kind
    (section 4 of MViTv2, arXiv 2112.01526).

    Args:
        full: broadcastable to (..., heads, N, M). It must be finite.
        vertical: of shape (..., heads, N, H).
        horizontal: of shape (..., heads, N, W).
    """

    full: Tensor | None = None
    vertical: Tensor | None = None
    horizontal: Tensor | None = None

    def add_to(self, scores: Tensor) -> Tensor:
        """The scores, (..., heads, N, M), with the terms."""
        if self.full is not None:
            scores = scores + self.full
        if self.vertical is not None:
            grid = self.vertical.shape[-1], self.horizontal.shape[-1]
            on_grid = scores.unflatten(-1, grid) + self.vertical.unsqueeze(-1) + self.horizontal.unsqueeze(-2)
            scores = on_grid.flatten(-2)
        return scores

    def of_heads(self, heads: slice) -> "Bias":
        """The part for some heads."""
        return Bias(*(of_heads(term, heads) for term in self))


def of_heads(tensor: Tensor | None, heads: slice) -> Tensor | None:
    """The part for some heads of a mask or a term of a bias, broadcastable to (..., heads, N, *)."""
    if tensor is None or tensor.ndim < 3 or tensor.shape[-3] == 1:
        return tensor
    return tensor[..., heads, :, :]


def split_mask(bias: Tensor, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Separates a bias into finite values and a mask.

    Args:
        bias: a boolean mask, False where a query does not see a key; or floats, −∞ there, as torch's
            scaled_dot_product_attention takes them.
        mask: boolean; a key that it hides stays hidden.

    Returns:
        A finite bias and a boolean mask, each None if there is none.
    """
    if bias.dtype == torch.bool:
        return None, bias if mask is None else mask & bias
    hidden = bias == -torch.inf
    # Compiled code cannot branch on values: it has a mask in either case.
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or hidden.any():
        bias, mask = bias.masked_fill(hidden, 0.0), ~hidden if mask is None else mask & ~hidden
    return bias, mask


def check_broadcast(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    """Raises ValueError if a bias or mask cannot be broadcast to a shape."""
    sizes = zip(reversed(tensor.shape), reversed(shape), strict=False)
    if tensor.ndim > len(shape) or any(size not in (1, whole) for size, whole in sizes):
        raise ValueError(
            f"{name} has the shape {tuple(tensor.shape)}. It must be broadcastable to {tuple(shape)}: each size, "
            "counted from the last, is the same, or 1."
        )
