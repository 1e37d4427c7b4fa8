"""Weights of one grid of tokens brought to another: by what the operator then computes, and by what the loader says."""

import logging

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from detectron2.modeling.backbone.utils import get_rel_pos
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import resample_abs_pos_embed

from karat_det.attention import KArAtConfig, KArAtOperator
from karat_det.checkpoint.loading import SafeCheckpointer, load_weights
from karat_det.checkpoint.resampling import TokenGrid, resample_operator, resample_state, resample_tokens
from karat_det.engine.setup import load_cfg

HEADS, GRID_SIZE, RANK = 2, 2, 3


def field(grid, *shape, seed):
    """Random smooth functions on the unit square at the middles of a grid's tokens, of shape (*shape, N)."""
    generator = torch.Generator().manual_seed(seed)
    rows = (torch.arange(grid.height) + 0.5) / grid.height
    columns = (torch.arange(grid.width) + 0.5) / grid.width
    places = torch.cartesian_prod(rows, columns).double()  # (N, 2)
    # Faster along the rows than along the columns, so that a transposed grid is another function.
    frequencies = torch.randn(*shape, 4, 2, generator=generator) * torch.tensor([2.5, 1.5])
    phases = 2 * torch.pi * torch.rand(*shape, 4, 1, generator=generator)
    amplitudes = torch.randn(*shape, 4, 1, generator=generator) / 2
    return (amplitudes * torch.cos(frequencies.double() @ places.T + phases)).sum(dim=-2)


def make_operator(num_tokens, **fields):
    config = KArAtConfig(**{"grid_size": GRID_SIZE, "rank": RANK, **fields})
    return KArAtOperator(HEADS, num_tokens, config).double()


def fill_smoothly(operator, grid):
    """Coefficients and projector that are smooth functions of the tokens' places."""
    num_tokens = grid.area
    state = {}
    for seed, (key, parameter) in enumerate(operator.state_dict().items()):
        *outer, rows, columns = parameter.shape
        if rows == columns == num_tokens:
            state[key] = field(grid, *outer, 3, seed=seed).mT @ field(grid, *outer, 3, seed=seed + 10)
        elif rows == num_tokens:
            state[key] = field(grid, *outer, columns, seed=seed).mT
        else:
            state[key] = field(grid, *outer, rows, seed=seed)
        if operator.config.basis in ("morlet", "dog") and key != "projector":
            state[key][:, 1:] *= 0.1  # shifts
            state[key][:, 2] += 1  # widths
    # What goes through two stages is a mean, not a sum, after the first: else phases of hundreds of radians follow.
    if operator.config.order == "project_before":
        state["projector"] /= num_tokens * operator.projector_scale
    elif operator.config.order == "two_operators":
        state["coefficients"][:, operator.basis.amplitudes] /= num_tokens * operator.series_scale
    operator.load_state_dict(state)


def output(operator, grid):
    """What the operator makes of one and the same scores and values, seen on a grid."""
    query, key = (field(grid, HEADS, 5, seed=seed).mT for seed in (2, 3))
    value = field(grid, HEADS, 4, seed=4).mT + 1
    with torch.no_grad():
        return operator.activate(query @ key.mT) @ value  # (heads, N, 4)


def distance(source, before, target, after):
    """Of two outputs on two grids, over the size of the first."""
    expected = resample_tokens(before, -2, source, target)
    return ((after - expected).square().mean() / expected.square().mean()).sqrt().item()


GROWING = [((14, 14), (28, 28)), ((14, 14), (32, 32)), ((14, 14), (16, 40))]
OTHER = [((28, 28), (14, 14)), ((12, 20), (20, 12)), ((14, 14), (10, 22))]


@pytest.mark.parametrize(
    "fields",
    [
        {"init": "scaled"},
        {"init": "paper"},
        {"base_function": "silu"},
        {"residual": "softmax"},
        {"order": "project_before"},
        {"order": "two_operators", "init": "paper"},
        {"rank": None},
        {"basis": "bspline", "order": "two_operators"},
        {"basis": "rational"},
        {"basis": "dog"},
        {"basis": "morlet", "order": "project_before"},
    ],
    ids=lambda fields: "-".join(str(value) for value in fields.values()),
)
@pytest.mark.parametrize(("source", "target"), GROWING + OTHER)
def test_a_resampled_operator_computes_nearly_the_same(source, target, fields):
    source, target = TokenGrid(*source), TokenGrid(*target)
    before, after = make_operator(source.area, **fields), make_operator(target.area, **fields)
    fill_smoothly(before, source)
    after.load_state_dict(resample_operator(before.state_dict(), after, source, target))
    # Functions of functions of the scores are less smooth than the scores.
    tolerance = 0.03 if after.config.basis == "fourier" and after.config.order == "project_after" else 0.1
    assert distance(source, output(before, source), target, output(after, target)) < tolerance


@pytest.mark.parametrize(
    ("source", "target", "tolerance"), [*((*grids, 0.08) for grids in GROWING), ((32, 32), (14, 14), 0.25)]
)
def test_rough_coefficients_do_too_and_on_a_coarser_grid_about(source, target, tolerance):
    source, target = TokenGrid(*source), TokenGrid(*target)
    torch.manual_seed(0)
    before, after = make_operator(source.area), make_operator(target.area)
    after.load_state_dict(resample_operator(before.state_dict(), after, source, target))
    assert distance(source, output(before, source), target, output(after, target)) < tolerance


def test_a_wrong_factor_and_a_transposed_grid_are_far_off():
    source, target = TokenGrid(14, 14), TokenGrid(16, 40)
    before, after = make_operator(source.area), make_operator(target.area)
    fill_smoothly(before, source)
    right = resample_operator(before.state_dict(), after, source, target)
    for key in right:
        after.load_state_dict({**right, key: resample_tokens(before.get_parameter(key), -2, source, target) * 1.2})
        assert distance(source, output(before, source), target, output(after, target)) > 0.15
    transposed = {
        key: tensor.unflatten(-2, (40, 16)).transpose(-3, -2).flatten(-3, -2) for key, tensor in right.items()
    }
    after.load_state_dict(transposed)
    assert distance(source, output(before, source), target, output(after, target)) > 0.15


grids = st.builds(TokenGrid, st.integers(1, 9), st.integers(1, 9))


@settings(max_examples=50, deadline=None)
@given(source=grids, target=grids, class_tokens=st.integers(0, 1), kept=st.booleans(), axis=st.integers(0, 2))
def test_interpolation_keeps_shape_constants_and_class_token(source, target, class_tokens, kept, axis):
    source = source._replace(class_tokens=class_tokens)
    target = target._replace(class_tokens=class_tokens * kept)
    shape = [2, 3]
    shape.insert(axis, source.area + source.class_tokens)
    tensor = torch.randn(shape)
    result = resample_tokens(tensor, axis, source, target, weight=0.5)
    shape[axis] = target.area + target.class_tokens
    assert list(result.shape) == shape
    assert torch.equal(result.narrow(axis, 0, target.class_tokens), tensor.narrow(axis, 0, target.class_tokens))
    constant = resample_tokens(torch.ones_like(tensor), axis, source, target, weight=0.5)
    on_grid = constant.narrow(axis, target.class_tokens, target.area)
    torch.testing.assert_close(on_grid, torch.full_like(on_grid, 0.5))
    torch.testing.assert_close(resample_tokens(tensor, axis, source, source), tensor)


def test_only_amplitudes_are_weighted():
    source, target = TokenGrid(4, 4), TokenGrid(8, 8)
    before, after = (make_operator(n, basis="mexican_hat", init="paper") for n in (16, 64))
    torch.nn.init.normal_(before.coefficients)
    result = resample_operator(before.state_dict(), after, source, target)["coefficients"]
    plain = resample_tokens(before.coefficients, -2, source, target)
    torch.testing.assert_close(result[:, 0], plain[:, 0] / 4)
    torch.testing.assert_close(result[:, 1:], plain[:, 1:])


@pytest.mark.parametrize("fields", [{"order": "project_before"}, {"order": "two_operators"}, {"rank": None}])
def test_a_base_function_that_no_factor_can_make_up_for_is_refused(fields):
    before, after = (make_operator(n, base_function="silu", **fields) for n in (16, 64))
    resampled, refused = resample_state(before.state_dict(), after, {})
    assert not resampled
    assert set(refused) == set(before.state_dict())
    assert "base function silu" in refused["coefficients"]


def test_a_class_tokens_functions_are_dropped_and_the_others_kept():
    before, after = make_operator(17), make_operator(16)
    result = resample_operator(before.state_dict(), after, TokenGrid(4, 4, 1), TokenGrid(4, 4))
    after.load_state_dict(result)
    scores = torch.randn(HEADS, 17, 17).double()
    with torch.no_grad():
        before.coefficients[..., 0, :] = 0.0
        before.projector[:, 0] = 0.0
        expected = before.activate(scores)[:, 1:, 1:]
        torch.testing.assert_close(after.activate(scores[:, 1:, 1:]), expected)


def build(configs, height, width=0, **overrides):
    """A backbone of one window block of 2 × 2 tokens and one global block, with patches of 16 pixels."""
    values = {
        "VIT.IMG_SIZE": height,
        "VIT.IMG_WIDTH": width,
        "VIT.EMBED_DIM": 12,
        "VIT.DEPTH": 2,
        "VIT.NUM_HEADS": HEADS,
        "VIT.WINDOW_SIZE": 2,
        "VIT.WINDOW_BLOCKS": [0],
        "VIT.PRETRAIN_IMG_SIZE": 64,
        "KARAT.RANK": RANK,
        "KARAT.SHARING": "blockwise",
        "FPN.OUT_CHANNELS": 8,
    } | overrides
    opts = [str(part) for key, value in values.items() for part in (f"MODEL.{key}", value)]
    backbone = build_backbone(load_cfg(str(configs / "base_vitdet.yaml"), opts), ShapeSpec(channels=3))
    for name, parameter in backbone.named_parameters():
        if "rel_pos" in name:
            torch.nn.init.normal_(parameter)
    return backbone


def save(folder, model):
    SafeCheckpointer(model, str(folder)).save("model")
    return str(folder / "model.pth")


@pytest.mark.parametrize("sharing", ["blockwise", "universal"])
def test_a_model_starts_one_of_another_size(configs, tmp_path, caplog, sharing):
    variant = {"KARAT.SHARING": sharing, "KARAT.BLOCKS": [1]}
    small, large = build(configs, 64, **variant), build(configs, 128, 192, **variant)
    path = save(tmp_path, small)
    with caplog.at_level(logging.INFO):
        load_weights(large, path)
    name = "net.operator" if sharing == "universal" else "net.blocks.1.attn.operator"
    assert f"{name}.coefficients: 4 × 4 to 8 × 12" in caplog.text
    assert f"{name}.projector: 4 × 4 to 8 × 12" in caplog.text
    assert "net.blocks.1.attn.rel_pos_h: 7 to 15" in caplog.text
    assert "net.blocks.1.attn.rel_pos_w: 7 to 23" in caplog.text
    assert "resampled to the model's tokens: 4 tensors" in caplog.text

    operators = (small.get_submodule(name), large.get_submodule(name))
    expected = resample_operator(operators[0].state_dict(), operators[1], TokenGrid(4, 4), TokenGrid(8, 12))
    resampled = {f"{name}.{key}": tensor for key, tensor in expected.items()}
    state = large.state_dict()
    for key, tensor in small.state_dict().items():
        if "blocks.1.attn.rel_pos" not in key:
            torch.testing.assert_close(state[key], resampled.get(key, tensor))
    assert all(torch.isfinite(feature).all() for feature in large(torch.randn(1, 3, 128, 192)).values())

    # And back from a grid that is no square, which the file tells.
    with caplog.at_level(logging.INFO):
        load_weights(small, save(tmp_path, large))
    assert f"{name}.coefficients: 8 × 12 to 4 × 4" in caplog.text


def test_each_block_of_a_blockwise_model_starts_with_a_copy_of_a_universal_operator(configs, tmp_path, caplog):
    small, large = build(configs, 32, **{"KARAT.SHARING": "universal"}), build(configs, 64)
    with caplog.at_level(logging.INFO):
        load_weights(large, save(tmp_path, small), complete=False)
    assert "its operator copied to 2 blocks" in caplog.text
    assert "net.blocks.1.attn.operator.coefficients: 2 × 2 to 4 × 4" in caplog.text
    count = len(large.state_dict())
    assert f"Loaded {count} of the model's {count} tensors from the file's {len(small.state_dict())}" in caplog.text
    operator, (window, image) = small.net.operator, (block.attn.operator for block in large.net.blocks)
    torch.testing.assert_close(window.state_dict(), operator.state_dict())
    expected = resample_operator(operator.state_dict(), image, TokenGrid(2, 2), TokenGrid(4, 4))
    torch.testing.assert_close(dict(image.state_dict()), expected)

    # A block of softmax has none.
    last = build(configs, 64, **{"KARAT.BLOCKS": [1]})
    load_weights(last, save(tmp_path, small), complete=False)
    torch.testing.assert_close(last.net.blocks[1].attn.operator.state_dict(), image.state_dict())


def test_a_universal_operator_is_copied_to_start_from_alone_and_only_whole(configs, tmp_path):
    path = save(tmp_path, build(configs, 32, **{"KARAT.SHARING": "universal"}))
    no_place = r"have no place in the model:\n  net\.operator\.{coefficients, projector}"
    with pytest.raises(ValueError, match=no_place):
        load_weights(build(configs, 64), path, complete=True)
    state = torch.load(path, weights_only=True)["model"]
    torch.save({"model": state}, path)  # without the operator's config
    with pytest.raises(ValueError, match=no_place):
        load_weights(build(configs, 64, **{"KARAT.ORDER": "two_operators"}), path, complete=False)


def test_a_universal_operator_that_is_another_function_is_left_out(configs, tmp_path, caplog):
    path = save(tmp_path, build(configs, 32, **{"KARAT.SHARING": "universal", "KARAT.INIT": "paper"}))
    with pytest.raises(ValueError, match="INIT: paper in the file, scaled in the model") as refusal:
        load_weights(build(configs, 64), path, complete=False)
    assert "no place" not in str(refusal.value)

    large = build(configs, 64)
    before = {key: tensor.clone() for key, tensor in large.state_dict().items() if ".operator." in key}
    with caplog.at_level(logging.INFO):
        load_weights(large, path, strict=False, complete=False)
    assert "net.operator.{coefficients, projector}" in caplog.text
    assert "copied" not in caplog.text
    assert "Weights of other operators: 2 KArAt operators start by MODEL.KARAT.INIT scaled" in caplog.text
    assert all(torch.equal(large.state_dict()[key], tensor) for key, tensor in before.items())


def test_one_operator_is_not_made_of_several(configs, tmp_path):
    path = save(tmp_path, build(configs, 32))
    message = (
        r"(?s)no place in the model:\n  net\.blocks\.0\.attn\.operator.*SHARING: blockwise in the file, universal in"
    )
    with pytest.raises(ValueError, match=message):
        load_weights(build(configs, 32, **{"KARAT.SHARING": "universal"}), path)


@pytest.mark.parametrize("target", [(16, 12), (7, 7), (14, 15)])
def test_absolute_positions_become_what_timm_makes_of_them(target):
    """`resample_tokens` resamples operators too, which timm's function does not."""
    positions = torch.randn(1, 1 + 14 * 14, 8)
    source, grid = TokenGrid(14, 14, class_tokens=1), TokenGrid(*target, class_tokens=1)
    expected = resample_abs_pos_embed(positions, list(target), [14, 14], num_prefix_tokens=1)
    assert torch.equal(resample_tokens(positions, 1, source, grid), expected)


def test_relative_positions_become_what_detectron2_makes_of_them(configs, tmp_path):
    small, large = build(configs, 64), build(configs, 128)
    load_weights(large, save(tmp_path, small))
    table = small.net.blocks[1].attn.rel_pos_h
    differences = torch.arange(8)[:, None] - torch.arange(8) + 7
    torch.testing.assert_close(large.net.blocks[1].attn.rel_pos_h[differences], get_rel_pos(8, 8, table))


def test_softmax_weights_start_karat_of_another_size(configs, tmp_path, caplog):
    large = build(configs, 128)
    with caplog.at_level(logging.INFO):
        path = save(tmp_path, build(configs, 64, **{"KARAT.ENABLED": False}))
        load_weights(large, path, complete=False)
    assert "net.blocks.1.attn.rel_pos_h: 7 to 15" in caplog.text
    assert "Not in the file, left at their initialisation: 4 tensors" in caplog.text


def test_windows_of_another_size_are_resampled_too(configs, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        load_weights(build(configs, 128, **{"VIT.WINDOW_SIZE": 4}), save(tmp_path, build(configs, 128)))
    assert "net.blocks.0.attn.operator.coefficients: 2 × 2 to 4 × 4" in caplog.text
    assert "blocks.1.attn.operator.coefficients:" not in caplog.text


def test_a_grid_of_as_many_tokens_but_another_shape_is_resampled(configs, tmp_path, caplog):
    wide, square = build(configs, 32, 128), build(configs, 64)
    with caplog.at_level(logging.INFO):
        load_weights(square, save(tmp_path, wide))
    assert "net.blocks.1.attn.operator.projector: 2 × 8 to 4 × 4" in caplog.text
    assert not torch.equal(*(model.net.blocks[1].attn.operator.projector for model in (wide, square)))


def test_a_grid_that_nobody_tells_is_said(configs, tmp_path):
    path = tmp_path / "bare.pth"
    torch.save(build(configs, 64, 96).state_dict(), path)
    with pytest.raises(ValueError, match=r"projector: \(2, 24, 3\) in the file.*24 tokens are no square grid, and the"):
        load_weights(build(configs, 64), str(path))
    # A square one needs no telling.
    torch.save(build(configs, 96).state_dict(), path)
    load_weights(build(configs, 64), str(path))


def test_weights_in_half_precision_are_resampled_as_well(configs, tmp_path):
    path = tmp_path / "half.pth"
    small, large = build(configs, 64), build(configs, 128)
    torch.save({key: tensor.bfloat16() for key, tensor in small.state_dict().items()}, path)
    load_weights(large, str(path))
    assert large.net.blocks[1].attn.operator.projector.dtype == torch.float32


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ({"KARAT.RANK": 4}, r"projector: \(2, 16, 3\) in the file, \(2, 64, 4\) in the model"),
        ({"KARAT.GRID_SIZE": 2}, r"coefficients: \(2, 2, 1, 16, 3\) in the file, \(2, 2, 2, 64, 3\) in the model"),
        ({"VIT.NUM_HEADS": 3}, r"projector: \(2, 16, 3\) in the file, \(3, 64, 3\) in the model"),
    ],
)
def test_another_rank_grid_size_or_number_of_heads_stays_an_error(configs, tmp_path, override, key):
    path = save(tmp_path, build(configs, 64))
    with pytest.raises(ValueError, match=key):
        load_weights(build(configs, 128, **override), path)


def test_a_run_does_not_resume_at_another_size(configs, tmp_path):
    save(tmp_path, build(configs, 64))
    with pytest.raises(ValueError, match=r"\(2, 16, 3\) in the file, \(2, 64, 3\) in the model"):
        SafeCheckpointer(build(configs, 128), str(tmp_path)).resume_or_load("", resume=True)


@pytest.mark.parametrize("has_class_token", [True, False])
@pytest.mark.parametrize("wants_class_token", [True, False])
@pytest.mark.parametrize("size", [64, 96])
def test_absolute_positions_of_another_pretraining(configs, tmp_path, has_class_token, wants_class_token, size):
    first, second = (
        build(configs, 64, **{"VIT.PRETRAIN_IMG_SIZE": pretrain, "VIT.PRETRAIN_USE_CLS_TOKEN": has})
        for pretrain, has in ((size, has_class_token), (64, wants_class_token))
    )
    grids = TokenGrid(size // 16, size // 16), TokenGrid(4, 4)
    before, expected = (field(grid, 12, seed=0).T.float() for grid in grids)
    first.net.pos_embed.data[0, has_class_token:] = before
    load_weights(second, save(tmp_path, first))
    assert second.net.pos_embed.shape == (1, 16 + wants_class_token, 12)
    error = second.net.pos_embed[0, wants_class_token:] - expected
    assert error.square().mean() < 0.1**2 * expected.square().mean()
    if has_class_token and wants_class_token:
        assert torch.equal(first.net.pos_embed[:, 0], second.net.pos_embed[:, 0])
