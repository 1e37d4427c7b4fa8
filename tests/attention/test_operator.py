import copy
import itertools
import math
import pickle
import re
from types import SimpleNamespace

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from written_out import BASES, ORDERS, activation, simplex_point

from karat_det.attention import Bias, KArAtConfig, KArAtOperator, backends, parse_shorthand
from karat_det.attention.backends import plain
from karat_det.attention.operator import project_on_simplex

FAMILY = [{"basis": basis, "order": order, "rank": rank} for basis in BASES for order, rank in ORDERS]
# What any of the family may be combined with.
VARIANTS = [
    {"base_function": "silu", "init": "paper"},
    {"base_function": "gelu", "num_karat_heads": 1},
    {"residual": "softmax"},
    {"residual": "softmax", "num_karat_heads": 1, "init": "paper"},
    {"projection": "simplex", "base_function": "identity"},
    {"projection": "simplex", "residual": "softmax", "num_karat_heads": 1},
]
# Each variant with each order: of the Fourier series, which has a way of its own, and of another basis in turn.
COMBINED = FAMILY + [
    {"basis": basis, "order": order, "rank": rank, **variant}
    for variant, other in zip(VARIANTS, BASES[1:], strict=False)
    for order, rank in ORDERS
    for basis in ("fourier", other)
]


def name(fields):
    return "-".join(str(value) for value in fields.values())


def make_operator(num_heads, num_tokens, **fields):
    """In float64, some steps away from its start, where some of its parameters are 0 or 1."""
    operator = KArAtOperator(num_heads, num_tokens, KArAtConfig(**fields)).double()
    with torch.no_grad():
        for parameter in operator.parameters():
            parameter += 0.5 * torch.rand_like(parameter)
    return operator


def make_mask(*shape):
    """A random mask in which each query sees some key."""
    return (torch.rand(*shape) < 0.6) | torch.eye(shape[-1], dtype=torch.bool)


@pytest.mark.parametrize("fields", COMBINED, ids=name)
def test_activate_equals_the_equations(fields):
    torch.manual_seed(0)
    operator = make_operator(2, 4, grid_size=2, **fields)
    scores = 1.5 * torch.randn(2, 4, 4, dtype=torch.float64)
    mask = make_mask(2, 4, 4)
    torch.testing.assert_close(operator.activate(scores), activation(operator, scores), atol=1e-8, rtol=1e-8)
    masked = operator.activate(scores, mask)
    torch.testing.assert_close(masked, activation(operator, scores, mask), atol=1e-8, rtol=1e-8)
    assert (masked[~mask] == 0).all()


@pytest.mark.parametrize("fields", COMBINED, ids=name)
def test_attend_equals_activate_then_matmul_in_value_and_every_gradient(monkeypatch, fields):
    torch.manual_seed(1)
    operator = make_operator(2, 5, grid_size=2, **fields)
    inputs = [torch.randn(3, 2, 5, width, dtype=torch.float64, requires_grad=True) for width in (4, 4, 3)]
    bias = torch.randn(3, 1, 5, 5, dtype=torch.float64, requires_grad=True)
    query, key, value = inputs
    wanted = [*inputs, bias, *operator.parameters()]
    direct = operator.activate(0.7 * query @ key.transpose(-2, -1) + bias) @ value
    # Chunks of two rows of the scores; of fewer where a score is more than one number.
    monkeypatch.setattr(plain, "_CHUNK_OF_THREAD", 2 * 3 * 2 * 5 // torch.get_num_threads())
    attended = operator.attend(query, key, value, bias, scale=0.7)
    torch.testing.assert_close(attended, direct)
    weight = torch.randn_like(attended)
    gradients = torch.autograd.grad((attended * weight).sum(), wanted)
    direct_gradients = torch.autograd.grad((direct * weight).sum(), wanted)
    for gradient, direct_gradient in zip(gradients, direct_gradients, strict=True):
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, direct_gradient)


@pytest.mark.parametrize("order", ["project_after", "project_before", "two_operators"])
def test_what_a_query_does_not_see_has_no_effect(order):
    torch.manual_seed(2)
    operator = make_operator(3, 5, order=order, rank=2, base_function="silu", num_karat_heads=2)
    query, key, value = (torch.randn(2, 3, 5, 4, dtype=torch.float64) for _ in range(3))
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[:3, 3:] = mask[3:, :3] = False  # two regions that do not see each other
    attended = operator.attend(query, key, value, mask=mask)
    scores = query @ key.transpose(-2, -1) / 2
    expected = torch.stack([activation(operator, item, mask.expand(3, 5, 5)) for item in scores]) @ value
    torch.testing.assert_close(attended, expected)
    key[..., 3:, :], value[..., 3:, :] = 100.0, torch.nan_to_num(value[..., 3:, :] * 1e3)
    torch.testing.assert_close(operator.attend(query, key, value, mask=mask)[..., :3, :], attended[..., :3, :])


SHAPES = [(), (5,), (5, 1), (1, 5), (5, 5), (3, 1, 5), (2, 1, 1, 1, 1), (2, 3, 5, 5)]


@pytest.mark.parametrize(
    ("fields", "shape"),
    [
        *(({"order": order}, shape) for order in ("project_after", "project_before") for shape in SHAPES),
        ({"base_function": "gelu", "residual": "softmax"}, (1, 5)),
        ({"basis": "rational"}, (5, 1)),
        ({"basis": "dog", "order": "project_before"}, (3, 1, 5)),
        ({"order": "two_operators"}, (2, 1, 1, 1, 1)),
        ({"rank": None}, (2, 3, 5, 5)),
    ],
    ids=str,
)
def test_a_bias_is_broadcast_to_the_scores(fields, shape):
    torch.manual_seed(3)
    operator = make_operator(3, 5, **{"rank": 2, "num_karat_heads": 2, **fields})
    query, key, value = (torch.randn(2, 2, 3, 5, 4, dtype=torch.float64) for _ in range(3))
    bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    attended = operator.attend(query, key, value, bias)
    direct = operator.activate(query @ key.transpose(-2, -1) / 2 + bias) @ value
    torch.testing.assert_close(attended, direct)
    gradients = [torch.autograd.grad(output.square().sum(), bias)[0] for output in (attended, direct)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("full_shape", [None, (2, 1, 6, 6)], ids=str)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"grid_size": 3, "base_function": "gelu", "residual": "softmax"},
        {"residual": "softmax", "num_karat_heads": 2},
        {"num_karat_heads": 1},
        {"projection": "simplex"},
        {"basis": "rational"},
        {"basis": "bspline", "residual": "softmax"},
        {"order": "project_before"},
        {"basis": "dog", "order": "project_before", "num_karat_heads": 2},
        {"order": "two_operators", "residual": "softmax"},
        {"rank": None},
        {"rank": None, "basis": "morlet", "residual": "softmax"},
    ],
    ids=str,
)
def test_terms_of_a_grid_are_added_to_the_scores_of_its_rows_and_columns(monkeypatch, fields, full_shape):
    torch.manual_seed(3)
    operator = make_operator(3, 6, **{"rank": 2, **fields})
    query, key, value, vertical, horizontal = (
        torch.randn(2, 3, 6, width, dtype=torch.float64, requires_grad=True) for width in (4, 4, 5, 2, 3)
    )
    full = None if full_shape is None else torch.randn(full_shape, dtype=torch.float64, requires_grad=True)
    written_out = torch.stack([vertical[..., q // 3] + horizontal[..., q % 3] for q in range(6)], dim=-1)
    scores = query @ key.transpose(-2, -1) / 2 + written_out + (0.0 if full is None else full)
    monkeypatch.setattr(plain, "_CHUNK_OF_THREAD", 2 * 3 * 2 * 6 // torch.get_num_threads())
    attended = operator.attend(query, key, value, Bias(full, vertical, horizontal))
    direct = operator.activate(scores) @ value
    torch.testing.assert_close(attended, direct)
    wanted = [x for x in (query, key, value, full, vertical, horizontal) if x is not None] + [*operator.parameters()]
    gradients = [torch.autograd.grad(output.square().sum(), wanted) for output in (attended, direct)]
    for gradient, direct_gradient in zip(*gradients, strict=True):
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, direct_gradient)
    mask = make_mask(6, 6)
    masked = operator.attend(query, key, value, Bias(full, vertical, horizontal), mask=mask)
    torch.testing.assert_close(masked, operator.activate(scores, mask) @ value)


@given(
    batch=st.lists(st.integers(1, 3), max_size=2),
    heads=st.integers(1, 3),
    tokens=st.integers(1, 12),
    dim=st.integers(1, 9),
    grid_size=st.integers(1, 5),
    data=st.data(),
)
@settings(deadline=None, max_examples=30)
def test_attend_equals_activate_in_float32_for_any_shape(batch, heads, tokens, dim, grid_size, data):
    rank = data.draw(st.integers(1, tokens))
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    operator = KArAtOperator(heads, tokens, KArAtConfig(grid_size=grid_size, rank=rank))
    query, key, value = (torch.randn(*batch, heads, tokens, dim) for _ in range(3))
    attended = operator.attend(query, key, value)
    assert attended.shape == value.shape
    scores = query @ key.transpose(-2, -1) / math.sqrt(dim)
    torch.testing.assert_close(attended, operator.activate(scores) @ value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "fields",
    [
        {"rank": 1, "grid_size": 2, "base_function": "gelu"},
        {"rank": 1, "residual": "softmax"},
        {"rank": 1, "order": "project_before", "projection": "simplex"},
        {"rank": 1, "basis": "rational", "order": "two_operators"},
        {"rank": None, "basis": "morlet"},
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["attend", "activate"])
def test_gradients_pass_gradcheck(fields, method):
    torch.manual_seed(4)
    operator = make_operator(1, 3, **fields)
    names, parameters = zip(*operator.named_parameters(), strict=True)
    query, key, value = (torch.randn(1, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    bias = torch.randn(1, 3, 3, dtype=torch.float64, requires_grad=True)

    def function(query, key, value, bias, *parameters):
        named = {f"operator.{name}": parameter for name, parameter in zip(names, parameters, strict=True)}
        arguments = (query, key, value, bias) if method == "attend" else (query @ key.transpose(-2, -1) + bias,)
        return torch.func.functional_call(MethodCall(operator, method), named, arguments)

    assert torch.autograd.gradcheck(function, (query, key, value, bias, *parameters))


class MethodCall(torch.nn.Module):
    def __init__(self, operator, method):
        super().__init__()
        self.operator = operator
        self.method = method

    def forward(self, *arguments):
        return getattr(self.operator, self.method)(*arguments)


def test_index_order_of_coefficients():
    operator = make_operator(1, 3, grid_size=2, rank=2, init="paper")
    with torch.no_grad():
        operator.coefficients.zero_()
        operator.projector.zero_()
        operator.coefficients[0, 1, 1, 2, 0] = 5.0  # b of sin(2 x), token q = 2, unit p = 0
        operator.projector[0, 1, 0] = 3.0  # from unit 0 to value n = 1
    scores = torch.randn(1, 3, 3, dtype=torch.float64)
    expected = torch.zeros(1, 3, 3, dtype=torch.float64)
    expected[0, :, 1] = 3.0 * 5.0 * torch.sin(2 * scores[0, :, 2])
    torch.testing.assert_close(operator.activate(scores), expected)


def test_attend_has_the_default_scale_of_scaled_dot_product_attention():
    torch.manual_seed(3)
    operator = KArAtOperator(2, 4, KArAtConfig(rank=2, residual="softmax"))
    query, key, value = (torch.randn(2, 4, 16) for _ in range(3))
    torch.testing.assert_close(
        operator.attend(query, key, value), torch.nn.functional.scaled_dot_product_attention(query, key, value)
    )


@pytest.mark.parametrize("residual", ["none", "softmax"])
@pytest.mark.parametrize("with_terms", [False, True])
def test_attend_never_forms_the_activated_matrix(residual, with_terms):
    """No product ends in (N, N) but the scores: so the multiply-adds are those of the reassociated form.

    Terms of a grid are added, not multiplied. Softmax, of the same scores, has one more product, that with the values.
    """
    operator = KArAtOperator(1, 64, KArAtConfig(rank=2, residual=residual))
    query, key, value = (torch.randn(1, 1, 64, 8) for _ in range(3))
    terms = [torch.randn(1, 1, 64, 8) for _ in range(2)] if with_terms else []
    counted = FlopCountAnalysis(TermsAttend(operator), (query, key, value, *terms)).total()
    scores, features, mixed_values, output = 64 * 64 * 8, 2 * 64 * 64 * 2, 2 * 64 * 8, 64 * 2 * 8
    softmax = 64 * 64 * 8 if residual == "softmax" else 0
    assert counted == scores + features + mixed_values + output + softmax


class TermsAttend(torch.nn.Module):
    def __init__(self, operator):
        super().__init__()
        self.operator = operator

    def forward(self, query, key, value, *terms):
        return self.operator.attend(query, key, value, Bias(None, *terms))


@pytest.mark.parametrize(
    "fields",
    [fields for fields in FAMILY if fields["order"] == "project_after" or fields["basis"] == "fourier"],
    ids=name,
)
def test_scaled_init_starts_at_unit_scale_whatever_n(fields):
    """Of N σ̂(A), the typical size, and that of its gradients under one of 1/√N, for 16 and for 196 tokens.

    A factor of √N too much or too little makes it 3.5 times as large or as small.
    """
    torch.manual_seed(5)
    sizes = []
    for num_tokens, num_heads in ((16, 24), (196, 2 if fields["rank"] else 1)):
        config = KArAtConfig(grid_size=3, **{**fields, "rank": fields["rank"] and 8})
        operator = KArAtOperator(num_heads, num_tokens, config)
        scores = torch.randn(num_heads, num_tokens, num_tokens, requires_grad=True)
        output = num_tokens * operator.activate(scores)
        learning = [scores, *operator.parameters()]
        gradients = torch.autograd.grad(output, learning, torch.randn_like(output) / num_tokens**0.5)
        # The scores' are then of the size of the output's, and so are those of full rank's coefficients.
        per_token = [num_tokens**0.5, *(num_tokens**0.5 if fields["rank"] is None else 1.0 for _ in learning[1:])]
        typical = [x.abs().median().item() / 0.6745 for x in (output, *gradients)]  # the deviation, if it is normal
        sizes.append([typical[0], *(size * factor for size, factor in zip(typical[1:], per_token, strict=True))])
    for small, large in zip(*sizes, strict=True):
        assert 0.5 < large / small < 2
    assert 0.4 < sizes[0][0] < 2.5


@pytest.mark.parametrize("grid_size", [1, 3, 8])
def test_scaled_init_keeps_the_output_at_the_same_scale_for_any_grid_size(grid_size):
    torch.manual_seed(6)
    operator = KArAtOperator(8, 64, KArAtConfig(grid_size=grid_size, rank=12))
    deviation = operator.activate(torch.randn(8, 64, 64)).std().item() * 64  # softmax: rows of weights of 1 / N
    assert deviation == pytest.approx(2, rel=0.2)  # √(r / 3)


@pytest.mark.parametrize("fields", [fields for fields in FAMILY if fields["basis"] in ("fourier", "dog")], ids=name)
def test_paper_init_has_no_fixed_factors(fields):
    torch.manual_seed(7)
    operator = KArAtOperator(4, 50, KArAtConfig(init="paper", **{**fields, "rank": fields["rank"] and 12}))
    assert set(operator.fixed_factors().values()) == {1.0}
    if operator.projector is not None:
        bound = {"project_after": 12, "project_before": 50}[fields["order"]] ** -0.5
        assert 0.99 * bound < operator.projector.abs().max() <= bound
    for coefficients in (operator.coefficients, operator.outer and operator.outer.coefficients):
        if coefficients is not None and fields["basis"] == "fourier":
            assert coefficients.mean().abs() < 0.05
            assert abs(coefficients.std() - 1) < 0.05
        elif coefficients is not None:
            assert abs(coefficients[:, 0].std() - 1) < 0.05
            assert (coefficients[:, 1] == 0).all()
            assert (coefficients[:, 2] == 1).all()


@pytest.mark.parametrize("fields", FAMILY, ids=name)
def test_residual_softmax_starts_as_softmax_and_learns_away_from_it(fields):
    torch.manual_seed(8)
    operator = KArAtOperator(2, 8, KArAtConfig(residual="softmax", **fields))
    query, key, value, target = (torch.randn(4, 2, 8, 4) for _ in range(4))
    softmax = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(operator.attend(query, key, value), softmax)
    losses = train(operator, query, key, value, target)
    assert losses[-1] < 0.98 * losses[0]


@pytest.mark.parametrize(
    ("fields", "init"), [*zip(FAMILY, itertools.cycle(("scaled", "paper", "paper")), strict=False)]
)
def test_some_steps_of_adam_lower_a_loss(fields, init):
    torch.manual_seed(9)
    operator = KArAtOperator(2, 8, KArAtConfig(init=init, num_karat_heads=1, base_function="gelu", **fields))
    losses = train(operator, *(torch.randn(4, 2, 8, 4) for _ in range(4)))
    assert losses[-1] < 0.98 * losses[0]


def train(operator, query, key, value, target):
    optimizer = torch.optim.Adam(operator.parameters(), lr=0.05)
    losses = []
    for _ in range(10):
        loss = (operator.attend(query, key, value) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(math.isfinite(loss) for loss in losses)
    return losses


@pytest.mark.parametrize("basis", BASES)
def test_a_copy_and_what_was_pickled_is_the_same_operator(basis):
    operator = make_operator(2, 4, basis=basis, rank=2)
    scores = torch.randn(2, 4, 4, dtype=torch.float64)
    for twin in (copy.deepcopy(operator), pickle.loads(pickle.dumps(operator))):
        assert twin.coefficients is not operator.coefficients
        assert torch.equal(twin.activate(scores), operator.activate(scores))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"residual": "softmax"},
        {"basis": "rational"},
        {"order": "project_before", "basis": "bspline"},
        {"order": "two_operators", "base_function": "silu"},
    ],
    ids=str,
)
def test_phases_stay_float32_under_autocast(fields):
    torch.manual_seed(10)
    operator = KArAtOperator(2, 16, KArAtConfig(grid_size=4, rank=8, **fields))
    query, key, value = (torch.randn(2, 16, 8).bfloat16().requires_grad_() for _ in range(3))
    bias = torch.randn(2, 16, 16).bfloat16()
    exact = operator.attend(query.float() * 4, key.float() * 4, value.float(), bias.float())
    with torch.autocast("cpu", torch.bfloat16):
        attended = operator.attend(query * 4, key * 4, value, bias)
    assert attended.dtype == torch.bfloat16
    # Rounded twice with residual softmax. Phases in bfloat16 would be some tenths off.
    torch.testing.assert_close(attended, exact.bfloat16(), atol=2**-8, rtol=2**-6)
    attended.sum().backward()
    assert query.grad.dtype == torch.bfloat16
    assert operator.coefficients.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"basis": "chebyshev"}, "basis is 'chebyshev', which is unknown. Known: fourier"),
        ({"base_function": "relu"}, "Known: zero, identity, silu, gelu"),
        ({"order": "before"}, "Known: project_after"),
        ({"residual": "linear"}, "Known: none, softmax"),
        ({"init": "zero"}, "Known: scaled, paper"),
        ({"grid_size": 0}, "grid_size is 0. It must be a whole number, at least 1"),
        ({"grid_size": 1.5}, "grid_size is 1.5"),
        ({"grid_size": True}, "grid_size is True"),
        ({"grid_size": "3"}, "grid_size is '3'"),
        ({"rank": -1}, "rank is -1"),
        ({"rank": 2.0}, "rank is 2.0. It must be a whole number, at least 1. It may be None, for full rank"),
        ({"rank": False}, "rank is False"),
        ({"projection": "sphere"}, "projection is 'sphere', which is unknown. Known: none, simplex"),
        ({"num_karat_heads": 0}, "num_karat_heads is 0. It must be a whole number, at least 1. It may be None"),
        ({"num_karat_heads": 1.0}, "num_karat_heads is 1.0"),
        ({"spline_order": -1}, "spline_order is -1. It must be a whole number, at least 0"),
        ({"spline_order": None}, "spline_order is None"),
        ({"spline_range": 0}, "spline_range is 0. It must be a finite number above 0"),
        ({"spline_range": -1.5}, "spline_range is -1.5"),
        ({"spline_range": math.inf}, "spline_range is inf"),
        ({"spline_range": math.nan}, "spline_range is nan"),
        ({"spline_range": "wide"}, "spline_range is 'wide'"),
        ({"spline_range": True}, "spline_range is True"),
        ({"rank": None, "order": "project_before"}, 'rank is None, but order "project_before".*Set a rank'),
        ({"rank": None, "order": "two_operators"}, 'rank is None, but order "two_operators"'),
        (
            {"residual": "softmax", "base_function": "silu", "order": "two_operators"},
            'base_function is "silu", which with residual "softmax".*Set base_function "zero"',
        ),
        ({"residual": "softmax", "base_function": "gelu", "rank": None}, 'base_function is "gelu"'),
    ],
)
def test_config_names_the_field_the_value_and_what_is_allowed(fields, message):
    with pytest.raises(ValueError, match=message):
        KArAtConfig(**fields)


def test_rank_above_the_number_of_tokens_is_refused():
    with pytest.raises(ValueError, match=r"rank is 12, above N = 9, the number of tokens.*from 1 to 9"):
        KArAtOperator(1, 9, KArAtConfig(rank=12))
    assert KArAtOperator(1, 9, KArAtConfig(rank=9)).projector.shape == (1, 9, 9)


def test_more_karat_heads_than_heads_are_refused():
    with pytest.raises(ValueError, match=r"num_karat_heads is 4, above the number of heads, 3.*from 1 to 3"):
        KArAtOperator(3, 9, KArAtConfig(rank=2, num_karat_heads=4))
    assert KArAtOperator(3, 9, KArAtConfig(rank=2, num_karat_heads=3)).coefficients.shape[0] == 3


@given(grid_size=st.integers(1, 99), letter=st.sampled_from("BU"))
def test_shorthand_names_the_operator_and_its_sharing(grid_size, letter):
    config, sharing = parse_shorthand(f"G{grid_size}{letter}", rank=5)
    assert config == KArAtConfig(grid_size=grid_size, rank=5)
    assert sharing == {"B": "blockwise", "U": "universal"}[letter]


@pytest.mark.parametrize("shorthand", ["", "G3", "3B", "G3X", "G-1B", "g3b", "G3B ", "G0B"])
def test_parse_refuses_what_is_no_shorthand(shorthand):
    with pytest.raises(ValueError, match=r"for example G3B|grid_size is 0"):
        parse_shorthand(shorthand)


def test_another_number_of_tokens_is_refused():
    operator = KArAtOperator(1, 9, KArAtConfig(rank=2))
    with pytest.raises(ValueError, match="N = 9 tokens and got 16"):
        operator.attend(*(torch.zeros(1, 16, 4) for _ in range(3)))
    with pytest.raises(ValueError, match="N = 9 tokens and got 16"):
        operator.activate(torch.zeros(1, 16, 16))


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("shape", [(2, 1, 4, 8), (2, 4, 4, 8), (4, 8), (2, 3, 5, 8)], ids=str)
def test_inputs_of_other_sizes_are_refused(place, shape):
    operator = make_operator(3, 4, rank=2)
    inputs = [torch.randn(2, 3, 4, 8, dtype=torch.float64) for _ in range(3)]
    inputs[place] = torch.randn(shape, dtype=torch.float64)
    problem = "5" if shape[-2] == 5 else f"{('query', 'key', 'value')[place]} has the shape"
    with pytest.raises(ValueError, match=problem):
        operator.attend(*inputs)


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (2, 6, 4, 4), (2, 3, 4, 5), (2, 3, 5, 4), (4, 4)], ids=str)
def test_scores_of_another_size_are_refused(shape):
    with pytest.raises(ValueError, match="made for"):
        make_operator(3, 4, rank=2).activate(torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize("as_bias", [lambda mask: mask, Bias], ids=["tensor", "Bias"])
@pytest.mark.parametrize("fields", [{}, {"residual": "softmax"}, {"basis": "morlet", "num_karat_heads": 1}], ids=str)
def test_a_boolean_bias_is_a_mask_as_in_scaled_dot_product_attention(fields, as_bias):
    torch.manual_seed(0)
    operator = make_operator(3, 4, rank=2, **fields)
    query, key, value = (torch.randn(2, 3, 4, 8, dtype=torch.float64) for _ in range(3))
    mask, other = make_mask(2, 1, 4, 4), make_mask(3, 4, 4)
    expected = operator.attend(query, key, value, mask=mask)
    torch.testing.assert_close(operator.attend(query, key, value, as_bias(mask)), expected)
    both = operator.attend(query, key, value, as_bias(mask), mask=other)
    torch.testing.assert_close(both, operator.attend(query, key, value, mask=mask & other))


def test_terms_of_another_grid_are_refused():
    operator = KArAtOperator(1, 9, KArAtConfig(rank=2))
    inputs = [torch.zeros(1, 9, 4) for _ in range(3)]
    for bias in (Bias(None, torch.zeros(1, 9, 2), torch.zeros(1, 9, 4)), Bias(None, torch.zeros(1, 9, 9))):
        with pytest.raises(ValueError, match="It must have both, for a grid of rows · columns = 9 tokens"):
            operator.attend(*inputs, bias)


def test_parameter_count_is_2g_plus_1_times_n_r_per_head():
    operator = KArAtOperator(3, 196, KArAtConfig(grid_size=3, rank=12))
    assert sum(parameter.numel() for parameter in operator.parameters()) == 3 * (2 * 3 + 1) * 196 * 12


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"coefficients": (2, 2, 1, 9, 4), "projector": (2, 9, 4)}),
        ({"order": "project_before"}, {"coefficients": (2, 2, 1, 4, 9), "projector": (2, 9, 4)}),
        (
            {"order": "two_operators", "basis": "bspline"},
            {"coefficients": (2, 5, 9, 4), "outer_coefficients": (2, 5, 4, 9)},
        ),
        ({"rank": None, "basis": "rational"}, {"coefficients": (2, 10, 9, 9)}),
        ({"basis": "meyer"}, {"coefficients": (2, 3, 9, 4), "projector": (2, 9, 4)}),
    ],
    ids=str,
)
def test_shapes_of_the_parameters(fields, expected):
    operator = KArAtOperator(3, 9, KArAtConfig(**{"rank": 4, "num_karat_heads": 2, **fields}))
    assert {name: tuple(tensor.shape) for name, tensor in operator.state_dict().items()} == expected


def quadratic_programme(row):
    """The point of the simplex that is nearest to a row, by a general solver."""
    row = row.numpy()
    return minimize(
        lambda x: ((x - row) ** 2).sum(),
        x0=[1 / len(row)] * len(row),
        jac=lambda x: 2 * (x - row),
        bounds=[(0, None)] * len(row),
        constraints={"type": "eq", "fun": lambda x: x.sum() - 1, "jac": lambda x: [1.0] * len(row)},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    ).x


@pytest.mark.parametrize("deviation", [0.05, 0.5, 3.0])
def test_simplex_projection_is_the_solution_of_the_quadratic_programme(deviation):
    torch.manual_seed(11)
    rows = deviation * torch.randn(6, 7, dtype=torch.float64)
    expected = torch.stack([torch.from_numpy(quadratic_programme(row)) for row in rows])
    torch.testing.assert_close(project_on_simplex(rows), expected, atol=1e-6, rtol=0)


@given(
    row=st.lists(
        st.one_of(st.floats(-3, 3), st.sampled_from([0.0, 0.25, 1.0]), st.floats(-1e12, 1e12)), min_size=1, max_size=9
    ),
    hidden=st.integers(0, 4),
)
@settings(deadline=None, max_examples=150)
def test_simplex_projection_of_any_row(row, hidden):
    """Ties, single values and huge ones included; what is masked is 0 and without effect."""
    row = torch.tensor(row, dtype=torch.float64)
    projected = project_on_simplex(row)
    torch.testing.assert_close(projected, simplex_point(row - row.max()), atol=1e-9, rtol=0)
    assert projected.min() >= 0
    assert projected.sum().item() == pytest.approx(1)
    torch.testing.assert_close(project_on_simplex(projected), projected)

    longer, mask = torch.cat([torch.full((hidden,), 7.0), row]), torch.arange(hidden + len(row)) >= hidden
    torch.testing.assert_close(project_on_simplex(longer, mask), torch.cat([torch.zeros(hidden), projected]))


def test_simplex_projection_of_huge_float32_rows_sums_to_one():
    rows = torch.tensor([[1e8, 1e8, -1e8], [3e20, 0.0, -3e20], [-5e9, -5e9, -5e9]])
    expected = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    torch.testing.assert_close(project_on_simplex(rows), expected)


def test_simplex_projection_passes_gradcheck():
    torch.manual_seed(12)
    rows = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    mask = make_mask(6, 6)[:5]
    assert torch.autograd.gradcheck(project_on_simplex, (rows,))
    assert torch.autograd.gradcheck(lambda rows: project_on_simplex(rows, mask), (rows,))


@pytest.mark.parametrize("can_run", [True, False])
@pytest.mark.parametrize("triton", [True, False])
def test_the_kernel_takes_over_on_cuda_unless_it_is_switched_off(monkeypatch, triton, can_run):
    called = []

    def kernel(*arguments):
        called.append(arguments)
        return plain.fourier_sums(*arguments)

    module = SimpleNamespace(can_run=lambda *inputs: can_run, fourier_sums=kernel)
    monkeypatch.setattr(backends, "triton", module)
    monkeypatch.setattr(backends.cpu, "can_run", lambda *tensors: False)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    torch.manual_seed(7)
    operator = KArAtOperator(2, 6, KArAtConfig(rank=2, triton=triton))
    query, key, value = (torch.randn(3, 2, 6, 4).bfloat16() for _ in range(3))
    bias = Bias(torch.randn(6, 6), torch.randn(3, 2, 6, 2), torch.randn(3, 2, 6, 3))
    attended = operator.attend(query, key, value, bias)
    assert bool(called) == (triton and can_run)
    scores = bias.add_to(query.float() @ key.float().mT / 2)
    torch.testing.assert_close(attended, (operator.activate(scores) @ value.float()).bfloat16())
    for arguments in called:  # as they are: the kernel makes float32 scores of them
        assert arguments[0].dtype == torch.bfloat16


def test_a_float_bias_of_minus_infinity_is_a_mask_as_in_scaled_dot_product_attention():
    """In value and in every gradient, that of the bias included."""
    torch.manual_seed(3)
    operator = make_operator(3, 5, rank=2, num_karat_heads=2, residual="softmax")
    query, key, value = (torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask, finite = make_mask(2, 1, 5, 5), torch.randn(3, 5, 5, dtype=torch.float64, requires_grad=True)
    leaves = [query, key, value, finite, *operator.parameters()]
    results = []
    for bias, given_mask in ((finite.masked_fill(~mask, -torch.inf), None), (finite, mask)):
        attended = operator.attend(query, key, value, bias, mask=given_mask)
        results.append([attended, *torch.autograd.grad(attended.square().sum(), leaves)])
    for actual, expected in zip(*results, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", ["bias", "mask", "Bias"])
@pytest.mark.parametrize("shape", [(4,), (5, 4), (2, 5, 5), (3, 3, 5, 5), (1, 2, 3, 5, 5)], ids=str)
def test_a_bias_or_mask_of_another_shape_is_refused(name, shape):
    operator = make_operator(3, 5, rank=2)
    inputs = [torch.randn(2, 3, 5, 4, dtype=torch.float64) for _ in range(3)]
    tensor = torch.zeros(shape)
    given = {"bias": {"bias": tensor}, "mask": {"mask": tensor > -1}, "Bias": {"bias": Bias(tensor)}}[name]
    with pytest.raises(ValueError, match=rf"{name.lower()} has the shape .*broadcastable to \(2, 3, 5, 5\)"):
        operator.attend(*inputs, **given)
    if name == "mask":
        with pytest.raises(ValueError, match="mask has the shape"):
            operator.activate(torch.randn(2, 3, 5, 5, dtype=torch.float64), tensor > -1)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("key", (2, 3, 5, 3)),
        ("key", (1, 3, 5, 4)),
        ("key", (3, 5, 4)),
        ("value", (1, 3, 5, 4)),
        ("query", (4, 3, 5, 4)),
    ],
    ids=str,
)
def test_inputs_that_differ_in_shape_are_refused(name, shape):
    inputs = {each: torch.randn(2, 3, 5, 4) for each in ("query", "key", "value")} | {name: torch.randn(shape)}
    with pytest.raises(ValueError, match=rf"{name} \S*.*{re.escape(str(shape))}.*must be the same"):
        make_operator(3, 5, rank=2).float().attend(**inputs)


def test_terms_of_a_grid_are_broadcast():
    operator = make_operator(3, 6, rank=2)
    inputs = [torch.randn(2, 3, 6, 4, dtype=torch.float64) for _ in range(3)]
    vertical, horizontal = torch.randn(6, 2, dtype=torch.float64), torch.randn(2, 1, 6, 3, dtype=torch.float64)
    on_grid = vertical.unsqueeze(-1) + horizontal.unsqueeze(-2)
    for dtype in (torch.float64, torch.float32):
        own = [x.to(dtype) for x in (*inputs, vertical, horizontal, on_grid.flatten(-2))]
        operator.to(dtype)
        expected = operator.attend(*own[:3], own[5])
        torch.testing.assert_close(operator.attend(*own[:3], Bias(None, *own[3:5])), expected)
    with pytest.raises(ValueError, match=r"vertical has the shape \(3, 2\).*broadcastable to \(2, 3, 6, 2\)"):
        operator.attend(*own[:3], Bias(None, own[3][:3], own[4]))


def test_a_mask_of_floats_is_refused():
    operator = make_operator(3, 5, rank=2)
    inputs = [torch.randn(2, 3, 5, 4, dtype=torch.float64) for _ in range(3)]
    with pytest.raises(ValueError, match=r"mask is of torch\.float32\. It must be boolean.*are a bias"):
        operator.attend(*inputs, mask=torch.zeros(5, 5))
