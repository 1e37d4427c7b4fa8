import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import BSpline
from written_out import BASES, basis_function, spline_knots

from karat_det.attention import KArAtConfig
from karat_det.attention.operator import make_basis

# On, beside, between and beyond the knots and the edges of the windows.
POINTS = [-40, -7, -math.pi, -3, -2, -1, -0.75, -0.3, 0, 0.2, 0.5, 0.6, 0.9, 1, 1.5, 2, 2.99, 3, 3.5, math.pi, 5, 9, 40]


def draw(basis, heads=1, inputs=1, units=1):
    """Coefficients as they start, and a little off it, so that none is a 0 or 1 that hides a mistake."""
    coefficients = torch.empty(heads, *basis.family, inputs, units, dtype=torch.float64)
    basis.reset(coefficients)
    return coefficients + 0.2 * torch.rand_like(coefficients)


def values(basis, coefficients, points):
    """φ of one function (1, *family, 1, 1) at each of the points."""
    return basis.sums(torch.tensor(points, dtype=torch.float64)[None, :, None], coefficients).flatten().tolist()


@pytest.mark.parametrize(
    "config",
    [KArAtConfig(basis=name) for name in BASES]
    + [KArAtConfig(grid_size=6)]
    + [
        KArAtConfig(basis="bspline", grid_size=grid_size, spline_order=order, spline_range=spline_range)
        for grid_size, order, spline_range in ((1, 0, 2.0), (4, 1, 1.0), (3, 2, 3.0), (5, 3, 2.5), (2, 5, 1.0))
    ],
    ids=str,
)
def test_functions_equal_their_formulas(config):
    torch.manual_seed(0)
    basis = make_basis(config)
    points = [*POINTS, *(4 * torch.randn(50)).tolist()]
    for _ in range(3):
        coefficients = draw(basis)
        expected = [basis_function(config, coefficients[0, ..., 0, 0], x) for x in points]
        assert values(basis, coefficients, points) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(
    grid_size=st.integers(1, 6),
    order=st.integers(0, 4),
    spline_range=st.floats(0.5, 4),
    points=st.lists(st.floats(-6, 6), min_size=1, max_size=20),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=40)
def test_splines_equal_scipys(grid_size, order, spline_range, points, seed):
    torch.manual_seed(seed)
    config = KArAtConfig(basis="bspline", grid_size=grid_size, spline_order=order, spline_range=spline_range)
    basis = make_basis(config)
    coefficients = draw(basis)
    coefficients[:, -1] = 0  # of SiLU
    knots = spline_knots(config)
    # Close to a knot the two may round to different sides of it.
    points = [x for x in points if min(abs(x - knot) for knot in knots) > 1e-9]
    theirs = BSpline(knots, coefficients[0, :-1, 0, 0].numpy(), order)
    expected = [float(theirs(x)) if knots[order] <= x <= knots[-1 - order] else None for x in points]
    for x, value, wanted in zip(points, values(basis, coefficients, points) if points else [], expected, strict=True):
        if wanted is not None:
            assert value == pytest.approx(wanted, abs=1e-9)
        elif not knots[0] <= x <= knots[-1]:
            assert value == 0


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("masked", [False, True])
def test_units_sum_their_functions_of_the_inputs_that_are_seen(name, masked):
    torch.manual_seed(1)
    config = KArAtConfig(basis=name, grid_size=2)
    basis = make_basis(config)
    coefficients = draw(basis, heads=2, inputs=3, units=2)
    inputs = 2 * torch.randn(2, 2, 4, 3, dtype=torch.float64)  # (batch, heads, rows, inputs)
    mask = torch.rand(2, 1, 4, 3) < 0.6 if masked else None
    sums = basis.sums(inputs, coefficients, mask)
    assert sums.shape == (2, 2, 4, 2)
    for batch, head, row, unit in torch.cartesian_prod(*(torch.arange(n) for n in sums.shape)).tolist():
        expected = sum(
            basis_function(config, coefficients[head, ..., q, unit], inputs[batch, head, row, q].item())
            for q in range(3)
            if mask is None or mask[batch, 0, row, q]
        )
        assert sums[batch, head, row, unit].item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", BASES)
def test_gradients_pass_gradcheck(name):
    torch.manual_seed(2)
    basis = make_basis(KArAtConfig(basis=name, grid_size=3))
    coefficients = draw(basis, inputs=2, units=2).requires_grad_()
    inputs = torch.randn(1, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(basis.sums, (inputs, coefficients))


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("grid_size", [1, 4])
def test_mean_square_is_that_of_functions_as_they_start(name, grid_size):
    torch.manual_seed(3)
    basis = make_basis(KArAtConfig(basis=name, grid_size=grid_size))
    coefficients = torch.empty(1, *basis.family, 1, 1000, dtype=torch.float64)
    basis.reset(coefficients)
    normal = torch.special.ndtri((torch.arange(4000, dtype=torch.float64) + 0.5) / 4000)  # quantiles: less noise
    measured = basis.sums(normal[None, :, None], coefficients).square().mean().item()
    assert measured == pytest.approx(basis.mean_square, rel=0.1)


def test_coefficients_start_as_the_paper_says():
    torch.manual_seed(4)
    normal = {name: make_basis(KArAtConfig(basis=name, grid_size=2)) for name in BASES}
    for name, basis in normal.items():
        coefficients = torch.empty(2, *basis.family, 50, 60)
        basis.reset(coefficients)
        if name in ("fourier", "bspline"):
            assert coefficients.mean().abs() < 0.05
            assert abs(coefficients.std() - 1) < 0.05
        elif name == "rational":
            for j, power in enumerate(coefficients.unbind(1)):
                expected = 1 / math.factorial(j) if j < 6 else 0.1 / math.factorial(j - 5)
                assert power.std().item() == pytest.approx(expected, rel=0.05)
        else:
            weight, shift, width = coefficients.unbind(1)
            assert abs(weight.mean()) < 0.05
            assert abs(weight.std() - 1) < 0.05
            assert (shift == 0).all()
            assert (width == 1).all()


@pytest.mark.parametrize("width", [0.002, 0.0, -0.002])
def test_a_wavelet_of_hardly_any_width_has_one_of_a_hundredth_and_can_widen(width):
    basis = make_basis(KArAtConfig(basis="dog"))

    def wavelet(width):
        return torch.tensor([1.0, 0.0, width], dtype=torch.float64)[None, :, None, None]

    x = torch.tensor([[[0.015]]], dtype=torch.float64)
    narrow, limit = (wavelet(w).requires_grad_() for w in (width, math.copysign(0.01, width)))
    torch.testing.assert_close(basis.sums(x, narrow), basis.sums(x, limit))
    gradients = [torch.autograd.grad(basis.sums(x, c).sum(), c)[0] for c in (narrow, limit)]
    torch.testing.assert_close(*gradients)
    assert gradients[0][0, 2].abs() > 0
