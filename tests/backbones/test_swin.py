import copy
import itertools
import math

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_backbone, build_model
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool
from detectron2.modeling.backbone.swin import SwinTransformer, WindowAttention
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from hypothesis import given, settings
from hypothesis import strategies as st

from karat_det.attention.window import KArAtSwinWindowAttention, window_regions
from karat_det.config import image_size
from karat_det.engine.setup import load_cfg

WINDOW = 4
# Two stages, each of a W-MSA and an SW-MSA block. An image of 64 × 64 is 16 × 16 tokens, then 8 × 8: whole windows.
TINY = {
    "MODEL.SWIN.EMBED_DIM": 12,
    "MODEL.SWIN.DEPTHS": [2, 2],
    "MODEL.SWIN.NUM_HEADS": [2, 3],
    "MODEL.SWIN.WINDOW_SIZE": WINDOW,
    "MODEL.SWIN.DROP_PATH_RATE": 0.0,
    "MODEL.SWIN.OUT_FEATURES": ["p0", "p1"],
    "MODEL.KARAT.RANK": 3,
    "MODEL.KARAT.GRID_SIZE": 2,
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4"],
    "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3"],
    "MODEL.ANCHOR_GENERATOR.SIZES": [[16], [32], [64]],
}
SWIN_KEYS = ("PATCH_SIZE", "APE", "PRETRAIN_IMG_SIZE", "IMG_SIZE")
BLOCK = {"W-MSA": 0, "SW-MSA": 1}


def config(configs, **overrides):
    """A tiny config; an override's key is its last word, such as RANK, or all of them, joined by two underscores."""
    values = dict(TINY)
    for key, value in overrides.items():
        if "__" in key:
            values[key.replace("__", ".")] = value
        else:
            section = "SWIN" if f"MODEL.SWIN.{key}" in TINY or key in SWIN_KEYS else "KARAT"
            values[f"MODEL.{section}.{key}"] = value
    opts = [str(part) for item in values.items() for part in item]
    return load_cfg(str(configs / "swin" / "base_swin.yaml"), opts)


def build(configs, **overrides):
    torch.manual_seed(0)
    return build_backbone(config(configs, **overrides), ShapeSpec(channels=3))


def blocks(backbone):
    return [block for layer in backbone.bottom_up.layers for block in layer.blocks]


def run(block, x):
    """A block on a feature map (B, H, W, C), as its stage calls it."""
    block.H, block.W = x.shape[1:3]
    return block(x.flatten(1, 2), detectron2_mask(*x.shape[1:3])).reshape(x.shape)


def detectron2_mask(height, width):
    """The mask that Detectron2's stage gives its blocks, (windows, N, N): 0 where a pair is seen, −100 where not."""
    stage = SwinTransformer(embed_dim=2, depths=[1], num_heads=[1], window_size=WINDOW, out_indices=[0]).layers[0]
    masks = []
    stage.blocks[0].register_forward_pre_hook(lambda block, inputs: masks.append(inputs[1]))
    stage(torch.zeros(1, height * width, 2), height, width)
    return masks[0]


def is_padding(regions):
    """Where a row or a column of `window_regions` is padding."""
    return (regions // 4 >= 2) | (regions % 4 >= 2)


def slow_block(block, x):
    """What a block is to compute, for one window and one pair of tokens after the other, without rolling or padding.

    Windows lie on a grid that begins `shift` tokens inside the map; those at its edges hold fewer tokens.
    """
    attention, shift = block.attn, block.shift_size
    index = attention.relative_position_index
    output = torch.zeros_like(x)
    query, key, value = attention.qkv(block.norm1(x)).chunk(3, dim=-1)
    for image in range(x.shape[0]):
        windows = {}
        for row, column in itertools.product(range(x.shape[1]), range(x.shape[2])):
            window = (row - shift) // WINDOW, (column - shift) // WINDOW
            slot = (row - shift) % WINDOW * WINDOW + (column - shift) % WINDOW
            windows.setdefault(window, {})[slot] = image, row, column
        for members in windows.values():
            scores = torch.zeros(attention.num_heads, WINDOW**2, WINDOW**2)
            mask = torch.eye(WINDOW**2, dtype=torch.bool)  # what becomes of an empty place is of no interest
            for i, place in members.items():
                for j, other in members.items():
                    products = (query[place] * key[other]).unflatten(-1, (attention.num_heads, -1)).sum(-1)
                    bias = attention.relative_position_bias_table[index[i, j]]
                    scores[:, i, j] = products * (x.shape[-1] / attention.num_heads) ** -0.5 + bias
                    mask[i, j] = True
            weights = attention.operator.activate(scores, mask)
            for i, place in members.items():
                heads = sum(
                    weights[:, i, j, None] * value[other].unflatten(-1, (attention.num_heads, -1))
                    for j, other in members.items()
                )
                output[place] = heads.flatten()
    x = x + attention.proj(output)
    return x + block.mlp(block.norm2(x))


def test_importing_the_package_registers_the_backbone():
    assert "build_swin_karat_fpn_backbone" in BACKBONE_REGISTRY


@pytest.mark.parametrize("size", [(64, 64), (56, 88)])
def test_disabled_it_is_detectron2s_own_swin(configs, size):
    ours = build(configs, ENABLED=False, APE=True)
    swin = SwinTransformer(
        embed_dim=12,
        depths=[2, 2],
        num_heads=[2, 3],
        window_size=WINDOW,
        drop_path_rate=0.0,
        ape=True,
        out_indices=[0, 1],
    )
    top_block = LastLevelMaxPool()
    top_block.in_feature = "p3"
    theirs = FPN(swin, ["p0", "p1"], out_channels=16, norm="LN", top_block=top_block)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    image = torch.randn(2, 3, *size)
    outputs, expected = ours(image), theirs(image)
    assert list(outputs) == list(expected) == ["p2", "p3", "p4"]
    assert ours.output_shape() == theirs.output_shape()
    for level in expected:
        assert torch.equal(outputs[level], expected[level])
    assert all(type(block.attn) is WindowAttention for block in blocks(ours))


def test_every_block_has_karat_and_keeps_the_names_and_weights_of_softmax(configs):
    softmax, karat = build(configs, ENABLED=False), build(configs)
    assert all(type(block.attn) is KArAtSwinWindowAttention for block in blocks(karat))
    assert [block.attn.operator.num_heads for block in blocks(karat)] == [2, 2, 3, 3]
    assert {block.attn.operator.num_tokens for block in blocks(karat)} == {WINDOW**2}
    assert [block.attn.shift_size for block in blocks(karat)] == [0, 2, 0, 2]
    before, after = softmax.state_dict(), karat.state_dict()
    assert set(after) - set(before) == {
        f"bottom_up.layers.{stage}.blocks.{block}.attn.operator.{name}"
        for stage in range(2)
        for block in range(2)
        for name in ("coefficients", "projector")
    }
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert all(torch.isfinite(feature).all() for feature in karat(torch.randn(1, 3, 40, 72)).values())


@given(height=st.integers(1, 13), width=st.integers(1, 13))
@settings(max_examples=25, deadline=None)
def test_regions_are_detectron2s_mask_and_padding(height, width):
    # The mask of the shift alone: Detectron2's takes the map for padded already.
    padded = [math.ceil(size / WINDOW) * WINDOW for size in (height, width)]
    regions = window_regions(padded, WINDOW, WINDOW // 2)
    assert torch.equal(regions[:, None, :] == regions[:, :, None], detectron2_mask(height, width) == 0)

    for shift in (0, WINDOW // 2):
        regions = window_regions((height, width), WINDOW, shift)
        assert regions.shape == (math.prod(padded) // WINDOW**2, WINDOW**2)
        assert is_padding(regions).sum() == regions.numel() - height * width
    assert len(window_regions((WINDOW, 3 * WINDOW), WINDOW, 0).unique()) == 1


@pytest.mark.parametrize("kind", BLOCK)
@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"RESIDUAL": "softmax", "NUM_KARAT_HEADS": 1},
        {"ORDER": "project_before"},
        {"PROJECTION": "simplex", "BASE_FUNCTION": "silu"},
        {"BASIS": "mexican_hat", "RANK": None},
    ],
    ids=lambda variant: " ".join(map(str, variant.values())) or "default",
)
@pytest.mark.parametrize("size", [(8, 8), (7, 6), (3, 9)], ids=str)
def test_a_block_equals_the_slow_one(configs, kind, variant, size):
    block = blocks(build(configs, **variant))[BLOCK[kind]]
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in block.attn.parameters():
            parameter.normal_(std=0.5)
        x = torch.randn(2, *size, 12)
        torch.testing.assert_close(run(block, x), slow_block(block, x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("part", ["key", "value", "query"])
@pytest.mark.parametrize(
    "variant", [{}, {"RESIDUAL": "softmax", "NUM_KARAT_HEADS": 1}, {"PROJECTION": "simplex"}], ids=str
)
def test_a_masked_pair_contributes_nothing(configs, part, variant):
    # The last window of a shifted 8 × 8 map holds its four corners, each a region.
    block = blocks(build(configs, **variant))[BLOCK["SW-MSA"]]
    x = torch.randn(1, 8, 8, 12)
    with torch.no_grad():
        block.attn.qkv.weight.normal_(std=0.3)
        before = run(block, x)
        disturb(block, part, windows=[3], tokens=[0])  # the map's token (6, 6)
        changed = (run(block, x) != before).any(dim=-1)[0]
    own = torch.zeros(8, 8, dtype=torch.bool)
    own[6:, 6:] = True
    assert changed[own].any()
    assert not changed[~own].any()


@pytest.mark.parametrize("kind", BLOCK)
def test_padding_contributes_nothing(configs, kind):
    # A map of 6 × 7 is padded to 8 × 8.
    for enabled in (True, False):
        block = blocks(build(configs, ENABLED=enabled))[BLOCK[kind]]
        x = torch.randn(1, 6, 7, 12)
        regions = window_regions((6, 7), WINDOW, block.shift_size)
        with torch.no_grad():
            before = run(block, x)
            for window, tokens in enumerate(is_padding(regions)):
                disturb(block, "key", [window], tokens)
                disturb(block, "value", [window], tokens)
            # Softmax, as Detectron2 has it, attends to the padding.
            assert torch.equal(run(block, x), before) == enabled


def disturb(block, part, windows, tokens):
    """Makes the attention see other queries, keys or values of some tokens of some windows."""

    def add(linear, inputs, output):
        start = ("query", "key", "value").index(part) * 12
        output = output.clone()
        for window in windows:
            output[window, tokens, start : start + 12] += 3.0
        return output

    block.attn.qkv.register_forward_hook(add)


@pytest.mark.parametrize("kind", BLOCK)
@pytest.mark.parametrize("size", [(8, 8), (7, 6)], ids=str)
def test_the_attention_compiles_without_a_graph_break_to_the_same_outputs(configs, kind, size):
    attention = blocks(build(configs))[BLOCK[kind]].attn
    attention.map_size = size
    torch.compiler.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    x, results = torch.randn(2 * 4, WINDOW**2, 12), []
    for module in (attention, compiled):
        attention.zero_grad()
        output = module(x)
        output.square().sum().backward()
        results.append([output, *(parameter.grad for parameter in attention.parameters())])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_the_backbone_compiles_without_a_graph_break_to_the_same_outputs(configs):
    backbone = build(configs)
    torch.compiler.reset()
    compiled = torch.compile(backbone, fullgraph=True, backend="eager")
    image = torch.randn(1, 3, 56, 88)
    for level, feature in backbone(image).items():
        torch.testing.assert_close(compiled(image)[level], feature)


def test_residual_softmax_starts_as_the_softmax_network_where_windows_tile(configs):
    softmax, residual = build(configs, ENABLED=False), build(configs, RESIDUAL="softmax")
    image = torch.randn(2, 3, 64, 128)
    for level, feature in softmax(image).items():
        torch.testing.assert_close(residual(image)[level], feature, atol=1e-5, rtol=1e-5)


def test_residual_softmax_differs_in_padded_windows_alone(configs):
    softmax, residual = (blocks(build(configs, **keys))[0] for keys in ({"ENABLED": False}, {"RESIDUAL": "softmax"}))
    x = torch.randn(1, 10, 15, 12)
    same = (run(softmax, x) - run(residual, x)).abs().amax(dim=-1)[0] < 1e-6
    expected = torch.zeros(10, 15, dtype=torch.bool)
    expected[:8, :12] = True
    assert torch.equal(same, expected)


def test_blocks_are_chosen_through_all_stages(configs):
    backbone = build(configs, BLOCKS=[1, 2])
    kinds = [type(block.attn) for block in blocks(backbone)]
    assert kinds == [WindowAttention, KArAtSwinWindowAttention, KArAtSwinWindowAttention, WindowAttention]
    softmax, residual = build(configs, ENABLED=False), build(configs, BLOCKS=[3], RESIDUAL="softmax")
    image = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(residual(image)["p3"], softmax(image)["p3"], atol=1e-5, rtol=1e-5)
    # Only the stage that has few heads would be short of them.
    assert blocks(build(configs, BLOCKS=[2, 3], NUM_KARAT_HEADS=3))[3].attn.operator.num_karat_heads == 3


def test_other_strides_name_their_levels(configs):
    backbone = build(configs, PATCH_SIZE=8, MODEL__RPN__IN_FEATURES=["p3", "p4", "p5"],
                     MODEL__ROI_HEADS__IN_FEATURES=["p3", "p4"])  # fmt: skip
    features = backbone(torch.randn(1, 3, 64, 96))
    assert {name: tuple(feature.shape[2:]) for name, feature in features.items()} == {
        "p3": (8, 12), "p4": (4, 6), "p5": (2, 3)
    }  # fmt: skip
    assert {name: shape.stride for name, shape in backbone.output_shape().items()} == {"p3": 8, "p4": 16, "p5": 32}


def test_every_level_covers_an_image_whose_side_no_coarse_stride_divides(configs):
    stages = {"DEPTHS": [1] * 4, "NUM_HEADS": [1] * 4, "OUT_FEATURES": [f"p{stage}" for stage in range(4)]}
    levels = [f"p{level}" for level in range(2, 7)]
    detector = {"MODEL__RPN__IN_FEATURES": levels, "MODEL__ROI_BOX_HEAD__FC_DIM": 8}
    model = build_model(config(configs, **stages, **detector, MODEL__ANCHOR_GENERATOR__SIZES=[[16]] * 5))
    images = model.preprocess_image([{"image": torch.zeros(3, 80, 80)}])
    assert {name: feature.shape[-1] for name, feature in model.backbone(images.tensor).items()} == {
        "p2": 24, "p3": 12, "p4": 6, "p5": 3, "p6": 2
    }  # fmt: skip


def test_a_copy_computes_the_same_under_autocast_too(configs):
    backbone = build(configs)
    twin = copy.deepcopy(backbone)
    image = torch.randn(1, 3, 40, 56)
    assert torch.equal(twin(image)["p3"], backbone(image)["p3"])
    with torch.autocast("cpu", torch.bfloat16):
        narrow = twin(image)["p3"]
    torch.testing.assert_close(narrow.float(), backbone(image)["p3"], atol=0.1, rtol=0.05)


@pytest.mark.parametrize(
    "variant",
    [{}, {"RESIDUAL": "softmax", "NUM_KARAT_HEADS": 1}, {"BASIS": "bspline"}, {"ORDER": "two_operators"}],
    ids=lambda variant: " ".join(map(str, variant.values())) or "default",
)
def test_mask_rcnn_trains_and_predicts(configs, variant):
    heads = {
        "MODEL__RPN__POST_NMS_TOPK_TRAIN": 50,
        "MODEL__RPN__POST_NMS_TOPK_TEST": 20,
        "MODEL__ROI_HEADS__BATCH_SIZE_PER_IMAGE": 16,
        "MODEL__ROI_HEADS__NUM_CLASSES": 3,
        "MODEL__ROI_BOX_HEAD__CONV_DIM": 8,
        "MODEL__ROI_BOX_HEAD__FC_DIM": 16,
        "MODEL__ROI_MASK_HEAD__CONV_DIM": 8,
    }
    torch.manual_seed(0)
    model = build_model(config(configs, **heads, **variant))
    batch = []
    for height, width in ((60, 90), (75, 64)):
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.tensor([[5.0, 5.0, 40.0, 45.0], [20.0, 10.0, 60.0, 50.0]]))
        instances.gt_classes = torch.tensor([0, 2])
        masks = torch.zeros(2, height, width, dtype=torch.bool)
        masks[0, 5:45, 5:40] = masks[1, 10:50, 20:60] = True
        instances.gt_masks = BitMasks(masks)
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
        batch.append({"image": image, "instances": instances, "height": height, "width": width})

    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    rpn_losses = []
    for step in range(5):
        torch.manual_seed(1)  # the RPN is asked for the same anchors
        with EventStorage():
            losses = model(batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        assert all(torch.isfinite(loss) for loss in losses.values())
        rpn_losses.append(losses["loss_rpn_cls"].item())
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
            # With a residual, the functions get their gradient through W, which is 0 in the first step.
            assert step == 0 or "attn" not in name or parameter.grad.any(), name
        optimizer.step()
    assert rpn_losses == sorted(rpn_losses, reverse=True)
    assert rpn_losses[-1] < rpn_losses[0] - 0.001
    model.eval()
    with torch.no_grad():
        results = model(batch)
    assert [result["instances"].image_size for result in results] == [(60, 90), (75, 64)]


@pytest.mark.parametrize(("leaf", "grid_size"), [("softmax", None), ("g1b", 1), ("g3b", 3)])
def test_configs_are_swin_tiny(configs, leaf, grid_size):
    cfg = load_cfg(str(configs / "swin" / f"swin_t_{leaf}.yaml"), [])
    backbone = build_backbone(cfg, ShapeSpec(channels=3))
    parameters = dict(backbone.bottom_up.named_parameters())
    operators = sum(parameter.numel() for name, parameter in parameters.items() if ".operator." in name)
    heads = sum(depth * heads for depth, heads in zip([2, 2, 6, 2], [3, 6, 12, 24], strict=True))
    assert operators == (0 if grid_size is None else heads * (2 * grid_size + 1) * 49 * 12)
    # Swin-Tiny has 28.288M, 769k of them its classifier.
    assert sum(parameter.numel() for parameter in parameters.values()) - operators == pytest.approx(27.52e6, abs=5e3)
    assert image_size(cfg) == (1024, 1024)
    solver = cfg.SOLVER
    assert (solver.BASE_LR, solver.WEIGHT_DECAY, solver.IMS_PER_BATCH, solver.EPS) == (1e-4, 0.05, 16, 1e-8)
    assert (solver.MAX_ITER, solver.STEPS) == (36 * 118000 // 16, (27 * 118000 // 16, 33 * 118000 // 16))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"SHARING": "universal"}, r"MODEL.KARAT.SHARING is universal.*\[2, 3\].*Set MODEL.KARAT.SHARING blockwise"),
        ({"RANK": 17}, r"MODEL.KARAT.RANK is 17, above N = 16.*from 1 to 16\. .* of 4 × 4 tokens .*WINDOW_SIZE"),
        ({"NUM_KARAT_HEADS": 3}, r"KARAT.NUM_KARAT_HEADS is 3, above .* 2\. .*from 1 to 2.*NUM_HEADS is \[2, 3\]"),
        ({"BLOCKS": [1, 4]}, r"MODEL.KARAT.BLOCKS names \[4\].* are \[0, 1, 2, 3\]\. .*DEPTHS is \[2, 2\].*all stages"),
        ({"GRID_SIZE": 0}, r"MODEL.KARAT.GRID_SIZE is 0. It must be a whole number, at least 1"),
        ({"NUM_HEADS": [2, 5]}, r"MODEL.SWIN.NUM_HEADS is \[2, 5\]: 5 does not divide 24, the width of stage 1"),
        ({"NUM_HEADS": [2]}, r"MODEL.SWIN.DEPTHS is \[2, 2\], NUM_HEADS is \[2\]"),
        ({"DEPTHS": [2, 0]}, r"MODEL.SWIN.DEPTHS is \[2, 0\].*each at least 1"),
        ({"DEPTHS": []}, r"MODEL.SWIN.DEPTHS is \[\]"),
        ({"WINDOW_SIZE": 1}, r"MODEL.SWIN.WINDOW_SIZE is 1. It must be at least 2"),
        ({"PATCH_SIZE": 6}, r"MODEL.SWIN.PATCH_SIZE is 6. It must be a power of 2"),
        ({"IMG_SIZE": 0}, r"MODEL.SWIN.IMG_SIZE is 0"),
        ({"APE": True, "PRETRAIN_IMG_SIZE": 2}, r"MODEL.SWIN.PRETRAIN_IMG_SIZE is 2.*at least.*PATCH_SIZE, 4"),
        ({"OUT_FEATURES": ["p0", "p2"]}, r"MODEL.SWIN.OUT_FEATURES is \['p0', 'p2'\].*among \['p0', 'p1'\]"),
        ({"OUT_FEATURES": []}, r"MODEL.SWIN.OUT_FEATURES is \[\]"),
        ({"MODEL__FPN__FUSE_TYPE": "max"}, r"MODEL.FPN.FUSE_TYPE is 'max'.*sum, avg"),
        ({"PATCH_SIZE": 8}, r"MODEL.RPN.IN_FEATURES is \['p2', 'p3', 'p4'\].*PATCH_SIZE 8.*\['p3', 'p4', 'p5'\]"),
        ({"MODEL__ANCHOR_GENERATOR__SIZES": [[16], [32]]}, r"MODEL.ANCHOR_GENERATOR.SIZES is \[\[16\], \[32\]\]"),
        ({"SOLVER__LAYER_DECAY": 0.9}, r"SOLVER.LAYER_DECAY is 0.9.*build_swin_karat_fpn_backbone it must be 1.0"),
    ],
)  # fmt: skip
def test_values_that_do_not_fit_name_key_value_and_remedy(configs, overrides, message):
    with pytest.raises(ValueError, match=message):
        build(configs, **overrides)
