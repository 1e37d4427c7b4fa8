"""What windows see. Attention within them is compared with plain loops in tests/backbones, in each host's blocks."""

import math

import pytest
import torch
from detectron2.modeling.backbone.swin import WindowAttention
from hypothesis import given
from hypothesis import strategies as st

from karat_det.attention import KArAtConfig, KArAtOperator
from karat_det.attention.window import KArAtSwinWindowAttention, attend_by_regions, window_regions


@given(height=st.integers(1, 11), width=st.integers(1, 11), window=st.integers(2, 5), is_shifted=st.booleans())
def test_tokens_share_a_region_if_they_are_neighbours_on_the_map(height, width, window, is_shifted):
    shift = window // 2 * is_shifted
    rows, columns = (math.ceil(size / window) for size in (height, width))
    regions = window_regions((height, width), window, shift)
    assert regions.shape == (rows * columns, window**2)
    for index in range(rows * columns):
        first_row, first_column = index // columns * window, index % columns * window
        kinds = []
        for token in range(window**2):
            # Where the token was before the map, padded to whole windows, was rolled; and on which side of its edge.
            row = (first_row + token // window + shift) % (rows * window)
            column = (first_column + token % window + shift) % (columns * window)
            kinds.append((row < shift, row >= height, column < shift, column >= width))
        for one in range(window**2):
            same = [kinds[one] == kind for kind in kinds]
            assert torch.equal(regions[index] == regions[index, one], torch.tensor(same))


@pytest.mark.parametrize(("shift", "count"), [(0, 1), (2, 4)])
def test_the_last_of_shifted_windows_is_of_four_regions(shift, count):
    regions = window_regions((8, 12), 4, shift)
    assert [len(window.unique()) for window in regions][-1] == count
    assert len(regions[0].unique()) == 1


@given(height=st.integers(1, 11), width=st.integers(1, 11), window=st.integers(2, 4), is_shifted=st.booleans())
def test_windows_are_attended_in_their_order_and_only_divided_ones_with_a_mask(height, width, window, is_shifted):
    shift = window // 2 * is_shifted
    regions = window_regions((height, width), window, shift)
    x = torch.randn(2, *regions.shape, 3, dtype=torch.float64)

    def sums(x, mask):
        """What each token sees, summed."""
        if mask is not None:
            assert not mask.all(dim=-1).all(dim=-1).any()  # each of these windows is divided
        seen = torch.ones(len(x), 1, window**2, window**2, dtype=torch.bool) if mask is None else mask
        return seen[:, 0].to(x.dtype) @ x

    found = attend_by_regions(sums, x.flatten(0, 1), (height, width), window, shift)
    seen = regions[:, :, None] == regions[:, None, :]
    torch.testing.assert_close(found, (seen.to(x.dtype) @ x).flatten(0, 1))


def test_windows_of_an_unknown_map_go_by_the_mask_of_the_shift():
    """Called alone, with the mask of Detectron2's and timm's blocks: a masked pair contributes nothing."""
    torch.manual_seed(0)
    softmax = WindowAttention(8, (2, 2), 2)
    attention = KArAtSwinWindowAttention(softmax, KArAtOperator(2, 4, KArAtConfig(rank=3)), 1)
    x = torch.randn(2 * 3, 4, 8)  # three windows of two images
    assert attention(x).shape == x.shape
    mask = torch.zeros(3, 4, 4)
    mask[1, :2, 2:] = mask[1, 2:, :2] = -100.0
    changed = x.clone()
    changed[1::3, 2:] += 1
    before, after = attention(x, mask), attention(changed, mask)
    torch.testing.assert_close(after[1::3, :2], before[1::3, :2], rtol=0, atol=0)
    assert not torch.equal(after[1::3, 2:], before[1::3, 2:])
    assert not torch.equal(attention(changed)[1::3, :2], attention(x)[1::3, :2])
    torch.testing.assert_close(before[::3], attention(x)[::3])


def test_an_operator_of_other_windows_is_refused():
    operator = KArAtOperator(2, 9, KArAtConfig(rank=3))
    with pytest.raises(ValueError, match=r"operator is for 2 heads and N = 9 .* 4 heads and N = 4\. Give it"):
        KArAtSwinWindowAttention(WindowAttention(8, (2, 2), 4), operator)
