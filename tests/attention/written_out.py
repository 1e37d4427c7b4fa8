"""The operator as its equations say, one number at a time: slow, and what the fast one is compared with."""

import math

import torch

BASES = ("fourier", "bspline", "rational", "mexican_hat", "morlet", "dog", "meyer", "shannon")
# order and rank
ORDERS = (("project_after", 2), ("project_after", None), ("project_before", 2), ("two_operators", 2))


def base_function(name, x):
    """b(x)."""
    return {
        "zero": lambda: 0.0,
        "identity": lambda: x,
        "silu": lambda: x / (1 + math.exp(-x)),
        "gelu": lambda: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    }[name]()


def basis_function(config, coefficients, x):
    """φ(x) of one function, whose coefficients are a tensor of the shape of the family."""
    c = coefficients.tolist()
    if config.basis == "fourier":
        a, b = c
        return sum(a[m - 1] * math.cos(m * x) + b[m - 1] * math.sin(m * x) for m in range(1, config.grid_size + 1))
    if config.basis == "bspline":
        *c, w = c
        knots = spline_knots(config)
        splines = sum(c[j] * spline(knots, j, config.spline_order, x) for j in range(len(c)))
        return splines + w * base_function("silu", x)
    if config.basis == "rational":
        a, b = c[:6], c[6:]
        numerator = sum(a[j] * x**j for j in range(6))
        return numerator / (1 + abs(sum(b[j - 1] * x**j for j in range(1, 5))))
    w, shift, width = c
    return w * mother_wavelet(config.basis, (x - shift) / width)


def spline_knots(config):
    spacing = 2 * config.spline_range / config.grid_size
    return [
        -config.spline_range + i * spacing
        for i in range(-config.spline_order, config.grid_size + config.spline_order + 1)
    ]


def spline(knots, j, order, x):
    """B_j(x) by Cox and de Boor."""
    if order == 0:
        return float(knots[j] <= x < knots[j + 1])
    left = (x - knots[j]) / (knots[j + order] - knots[j])
    right = (knots[j + order + 1] - x) / (knots[j + order + 1] - knots[j + 1])
    return left * spline(knots, j, order - 1, x) + right * spline(knots, j + 1, order - 1, x)


def mother_wavelet(name, x):
    gaussian = math.exp(-(x**2) / 2)
    if name == "mexican_hat":
        return 2 / (math.pi**0.25 * math.sqrt(3)) * (x**2 - 1) * gaussian
    if name == "morlet":
        return math.cos(5 * x) * gaussian
    if name == "dog":
        return x * gaussian
    if name == "meyer":
        return math.sin(math.pi * abs(x)) * meyer_window(meyer_ramp(abs(x)))
    # shannon
    window = 0.54 + 0.46 * math.cos(x) if abs(x) <= math.pi else 0.0
    return (math.sin(x) / x if x else 1.0) * window


def meyer_ramp(t):
    return 0.0 if t < 0 else 1.0 if t > 1 else t**4 * (35 - 84 * t + 70 * t**2 - 20 * t**3)


def meyer_window(t):
    if t <= 0.5:
        return 1.0
    return math.cos(math.pi / 2 * meyer_ramp(2 * t - 1)) if t < 1 else 0.0


def unit_sums(config, coefficients, inputs):
    """Φ_p[x] for the coefficients (*family, M, P) of one head and a list of M inputs, None where masked."""
    return [
        sum(
            base_function(config.base_function, x) + basis_function(config, coefficients[..., q, p], x)
            for q, x in enumerate(inputs)
            if x is not None
        )
        for p in range(coefficients.shape[-1])
    ]


def activation(operator, scores, mask=None):
    """σ̂(A) for (heads, N, N) scores, and a mask of that shape."""
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    activated = torch.zeros_like(scores)
    for head in range(operator.num_heads):
        for k in range(operator.num_tokens):
            seen = mask[head, k]
            row = torch.zeros_like(scores[head, k])
            if head < operator.num_karat_heads:
                inputs = [x if s else None for x, s in zip(scores[head, k].tolist(), seen.tolist(), strict=True)]
                row += scores.new_tensor(activated_row(operator, head, inputs)) * seen
            if head >= operator.num_karat_heads or operator.config.residual == "softmax":
                row[seen] += scores[head, k][seen].softmax(-1)
            if head < operator.num_karat_heads and operator.config.projection == "simplex":
                row[seen] = simplex_point(row[seen])
            activated[head, k] = row
    return activated


def activated_row(operator, head, inputs):
    """The learnable part of one row of σ̂(A)."""
    config, num_tokens = operator.config, operator.num_tokens
    inner, outer, mixing = fixed_factors(operator)
    coefficients = operator.coefficients[head]
    projector = None if operator.projector is None else operator.projector[head].tolist()  # (N, r)
    if config.order == "project_before":
        mixed = [
            sum(mixing * projector[q][p] * x for q, x in enumerate(inputs) if x is not None) for p in range(config.rank)
        ]
        return [inner * unit for unit in unit_sums(config, coefficients, mixed)]
    units = [inner * unit for unit in unit_sums(config, coefficients, inputs)]
    if config.order == "two_operators":
        return [outer * unit for unit in unit_sums(config, operator.outer_coefficients[head], units)]
    if config.rank is None:
        return units
    return [mixing * sum(projector[n][p] * units[p] for p in range(config.rank)) for n in range(num_tokens)]


def fixed_factors(operator):
    """Those of `init: scaled` on Φ̂, on Φ̂₂ and on W."""
    config, num_tokens, mean_square = operator.config, operator.num_tokens, operator.basis.mean_square
    if config.init == "paper":
        return 1.0, 1.0, 1.0
    if config.order == "project_before":
        return 1 / math.sqrt(config.rank * mean_square) / num_tokens, 1.0, 1 / math.sqrt(num_tokens)
    inner = 1 / math.sqrt(num_tokens * mean_square)
    if config.rank is None:
        return inner / num_tokens, 1.0, 1.0
    return inner, 1 / math.sqrt(config.rank * mean_square) / num_tokens, 1 / num_tokens


def simplex_point(row):
    """max(y − λ, 0), with the λ of which it sums to 1, found by bisection."""
    low, high = row.min() - 1, row.max()
    for _ in range(200):
        middle = (low + high) / 2
        if (row - middle).clamp(min=0).sum() > 1:
            low = middle
        else:
            high = middle
    return (row - low).clamp(min=0)
