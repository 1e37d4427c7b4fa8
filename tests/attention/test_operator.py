import math
from types import SimpleNamespace

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from hypothesis import given, settings
from hypothesis import strategies as st

from karat_det.attention import KArAtConfig, KArAtOperator, functional
from karat_det.attention import operator as operator_module

SETTINGS = [
    pytest.param(
        {"residual": residual, "base_function": base_function, "init": init}, id=f"{residual}-{base_function}-{init}"
    )
    for residual in ("none", "softmax")
    for base_function in ("zero", "identity", "silu", "gelu")
    for init in ("scaled", "paper")
]


def make_operator(num_heads, num_tokens, **fields):
    operator = KArAtOperator(num_heads, num_tokens, KArAtConfig(**fields)).double()
    if operator.config.residual == "softmax":
        torch.nn.init.normal_(operator.projector)  # at its start it adds nothing
    return operator


def plain_activation(operator, scores):
    """Equation by equation, one number at a time: σ̂(A)[k, n] for one head's (N, N) scores."""
    config = operator.config
    num_tokens, rank, grid_size = operator.num_tokens, config.rank, config.grid_size
    base = {
        "zero": lambda x: 0.0,
        "identity": lambda x: x,
        "silu": lambda x: x / (1 + math.exp(-x)),
        "gelu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    }[config.base_function]
    inner, outer = (1 / math.sqrt(num_tokens * grid_size), 1 / num_tokens) if config.init == "scaled" else (1, 1)
    activated = torch.zeros_like(scores)
    for head in range(operator.num_heads):
        cosines, sines = operator.coefficients[head]
        for k in range(num_tokens):
            units = []
            for p in range(rank):
                total = 0.0
                for q in range(num_tokens):
                    x = scores[head, k, q].item()
                    total += base(x)
                    for m in range(1, grid_size + 1):
                        total += cosines[m - 1, q, p].item() * math.cos(m * x)
                        total += sines[m - 1, q, p].item() * math.sin(m * x)
                units.append(inner * total)
            for n in range(num_tokens):
                weights = operator.projector[head, n]
                activated[head, k, n] = outer * sum(weights[p].item() * units[p] for p in range(rank))
            if config.residual == "softmax":
                activated[head, k] += torch.softmax(scores[head, k], dim=-1)
    return activated


@pytest.mark.parametrize("fields", SETTINGS)
def test_activate_equals_the_equations(fields):
    torch.manual_seed(0)
    operator = make_operator(2, 5, grid_size=3, rank=2, **fields)
    scores = 2 * torch.randn(2, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(operator.activate(scores), plain_activation(operator, scores))


@pytest.mark.parametrize("fields", SETTINGS)
def test_attend_equals_activate_then_matmul_in_value_and_every_gradient(fields):
    torch.manual_seed(1)
    operator = make_operator(2, 6, grid_size=2, rank=3, **fields)
    inputs = [torch.randn(4, 2, 6, 5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    bias = torch.randn(4, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    query, key, value = inputs
    weight = torch.randn(4, 2, 6, 5, dtype=torch.float64)
    wanted = [*inputs, bias, *operator.parameters()]

    attended = operator.attend(query, key, value, bias, scale=0.7)
    direct = operator.activate(0.7 * query @ key.transpose(-2, -1) + bias) @ value
    torch.testing.assert_close(attended, direct)
    gradients = torch.autograd.grad((attended * weight).sum(), wanted)
    direct_gradients = torch.autograd.grad((direct * weight).sum(), wanted)
    for gradient, direct_gradient in zip(gradients, direct_gradients, strict=True):
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, direct_gradient)


@given(
    batch=st.lists(st.integers(1, 3), max_size=2),
    heads=st.integers(1, 3),
    tokens=st.integers(1, 12),
    dim=st.integers(1, 9),
    grid_size=st.integers(1, 5),
    data=st.data(),
)
@settings(deadline=None, max_examples=60)
def test_attend_equals_activate_in_float32_for_any_shape(batch, heads, tokens, dim, grid_size, data):
    rank = data.draw(st.integers(1, tokens))
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    operator = KArAtOperator(heads, tokens, KArAtConfig(grid_size=grid_size, rank=rank))
    query, key, value = (torch.randn(*batch, heads, tokens, dim) for _ in range(3))
    attended = operator.attend(query, key, value)
    assert attended.shape == value.shape
    scores = query @ key.transpose(-2, -1) / math.sqrt(dim)
    torch.testing.assert_close(attended, operator.activate(scores) @ value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("fields", SETTINGS)
@pytest.mark.parametrize("method", ["attend", "activate"])
def test_gradients_pass_gradcheck(fields, method):
    torch.manual_seed(2)
    operator = make_operator(2, 4, grid_size=2, rank=2, **fields)
    query, key, value = (torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    bias = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)

    def function(query, key, value, bias, coefficients, projector):
        parameters = {"operator.coefficients": coefficients, "operator.projector": projector}
        arguments = (query, key, value, bias) if method == "attend" else (query @ key.transpose(-2, -1) + bias,)
        return torch.func.functional_call(MethodCall(operator, method), parameters, arguments)

    assert torch.autograd.gradcheck(function, (query, key, value, bias, operator.coefficients, operator.projector))


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


def test_attend_never_forms_the_activated_matrix():
    """No product ends in (N, N) but the scores: so the multiply-adds are those of the reassociated form."""
    operator = KArAtOperator(1, 64, KArAtConfig(rank=2))
    query, key, value = (torch.randn(1, 1, 64, 8) for _ in range(3))
    counted = FlopCountAnalysis(MethodCall(operator, "attend"), (query, key, value)).total()
    scores, features, mixed_values, output = 64 * 64 * 8, 2 * 64 * 64 * 2, 2 * 64 * 8, 64 * 2 * 8
    assert counted == scores + features + mixed_values + output


def test_scaled_init_keeps_the_output_at_the_same_scale_for_any_size():
    torch.manual_seed(4)
    deviations = []
    for num_tokens, grid_size in ((16, 1), (256, 1), (256, 8)):
        operator = KArAtOperator(8, num_tokens, KArAtConfig(grid_size=grid_size, rank=12))
        activated = operator.activate(torch.randn(8, num_tokens, num_tokens))
        deviations.append(activated.std().item() * num_tokens)  # softmax: a row of N weights of 1 / N
    assert max(deviations) / min(deviations) < 1.5
    assert 0.5 < deviations[0] < 5


def test_paper_init_has_no_fixed_factors_and_normal_coefficients():
    torch.manual_seed(5)
    operator = KArAtOperator(4, 100, KArAtConfig(rank=12, init="paper"))
    assert operator.series_scale == operator.projector_scale == 1.0
    assert operator.coefficients.mean().abs() < 0.05
    assert abs(operator.coefficients.std() - 1) < 0.05
    assert operator.projector.abs().max() <= 12**-0.5


def test_residual_softmax_starts_as_softmax_and_learns_away_from_it():
    torch.manual_seed(6)
    operator = KArAtOperator(2, 8, KArAtConfig(rank=4, residual="softmax"))
    scores = torch.randn(2, 8, 8)
    torch.testing.assert_close(operator.activate(scores), scores.softmax(-1))
    value, target = torch.randn(2, 8, 4), torch.randn(2, 8, 4)
    optimizer = torch.optim.Adam(operator.parameters(), lr=0.1)
    losses = []
    for _ in range(30):
        loss = (operator.activate(scores) @ value - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("residual", ["none", "softmax"])
def test_phases_stay_float32_under_autocast(residual):
    torch.manual_seed(7)
    operator = KArAtOperator(2, 16, KArAtConfig(grid_size=4, rank=8, residual=residual))
    query, key, value = (torch.randn(2, 16, 8).bfloat16() for _ in range(3))
    exact = operator.attend(query.float() * 4, key.float() * 4, value.float())
    with torch.autocast("cpu", torch.bfloat16):
        attended = operator.attend(query * 4, key * 4, value)
    assert attended.dtype == torch.bfloat16
    torch.testing.assert_close(attended, exact.bfloat16())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"basis": "chebyshev"}, "basis is 'chebyshev', which is unknown. Known: fourier"),
        ({"sharing": "G3B"}, "sharing is 'G3B', which is unknown. Known: blockwise, universal"),
        ({"base_function": "relu"}, "Known: zero, identity, silu, gelu"),
        ({"order": "before"}, "Known: project_after"),
        ({"residual": "linear"}, "Known: none, softmax"),
        ({"init": "zero"}, "Known: scaled, paper"),
        ({"grid_size": 0}, "grid_size is 0. It must be a whole number, at least 1"),
        ({"grid_size": 1.5}, "grid_size is 1.5"),
        ({"rank": -1}, "rank is -1"),
    ],
)
def test_config_names_the_field_the_value_and_what_is_allowed(fields, message):
    with pytest.raises(ValueError, match=message):
        KArAtConfig(**fields)


def test_rank_above_the_number_of_tokens_is_refused():
    with pytest.raises(ValueError, match=r"rank is 12, above the 9 tokens.*from 1 to 9"):
        KArAtOperator(1, 9, KArAtConfig(rank=12))
    assert KArAtOperator(1, 9, KArAtConfig(rank=9)).projector.shape == (1, 9, 9)


@given(grid_size=st.integers(1, 99), letter=st.sampled_from("BU"))
def test_shorthand_round_trips(grid_size, letter):
    config = KArAtConfig.parse(f"G{grid_size}{letter}", rank=5)
    assert config.shorthand == f"G{grid_size}{letter}"
    assert (config.grid_size, config.rank) == (grid_size, 5)
    assert config.sharing == {"B": "blockwise", "U": "universal"}[letter]


@pytest.mark.parametrize("shorthand", ["", "G3", "3B", "G3X", "G-1B", "g3b", "G3B ", "G0B"])
def test_parse_refuses_what_is_no_shorthand(shorthand):
    with pytest.raises(ValueError, match=r"for example G3B|grid_size is 0"):
        KArAtConfig.parse(shorthand)


def test_another_number_of_tokens_is_refused():
    operator = KArAtOperator(1, 9, KArAtConfig(rank=2))
    with pytest.raises(ValueError, match="N = 9 tokens and got 16"):
        operator.attend(*(torch.zeros(1, 16, 4) for _ in range(3)))
    with pytest.raises(ValueError, match="N = 9 tokens and got 16"):
        operator.activate(torch.zeros(1, 16, 16))


def test_parameter_count_is_2g_plus_1_times_n_r_per_head():
    operator = KArAtOperator(3, 196, KArAtConfig(grid_size=3, rank=12))
    assert sum(parameter.numel() for parameter in operator.parameters()) == 3 * (2 * 3 + 1) * 196 * 12


@pytest.mark.parametrize("can_run", [True, False])
@pytest.mark.parametrize("triton", [True, False])
def test_the_kernel_takes_over_where_it_can_run_unless_it_is_switched_off(monkeypatch, triton, can_run):
    called = []

    def kernel(*arguments):
        called.append(arguments)
        return functional.fourier_sums(*arguments)

    monkeypatch.setattr(
        operator_module, "kernels", SimpleNamespace(can_run=lambda query: can_run, fourier_score_sums=kernel)
    )
    torch.manual_seed(7)
    operator = KArAtOperator(2, 6, KArAtConfig(rank=2, triton=triton))
    query, key, value = (torch.randn(3, 2, 6, 4) for _ in range(3))
    attended = operator.attend(query, key, value)
    assert bool(called) == (triton and can_run)
    torch.testing.assert_close(attended, operator.activate(query @ key.mT / 2) @ value)
