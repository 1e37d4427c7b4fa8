import itertools
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from detectron2.engine import DefaultPredictor
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_backbone, build_model
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.vit import Attention, SimpleFeaturePyramid, ViT
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage

from karat_det.attention import KArAtAttention, KArAtOperator
from karat_det.attention.window import KArAtViTDetWindowAttention
from karat_det.engine.setup import load_cfg

# Two blocks of windows, two of the whole image; 4 × 4 patches in all.
TINY = {
    "MODEL.VIT.IMG_SIZE": 64,
    "MODEL.VIT.EMBED_DIM": 24,
    "MODEL.VIT.DEPTH": 4,
    "MODEL.VIT.NUM_HEADS": 3,
    "MODEL.VIT.WINDOW_SIZE": 2,
    "MODEL.VIT.WINDOW_BLOCKS": [0, 2],
    "MODEL.VIT.PRETRAIN_IMG_SIZE": 64,
    "MODEL.VIT.DROP_PATH_RATE": 0.0,
    "MODEL.KARAT.RANK": 3,
    "MODEL.KARAT.SHARING": "blockwise",
    "MODEL.FPN.OUT_CHANNELS": 16,
}
OTHER_VIT_KEYS = ("IMG_WIDTH", "PATCH_SIZE", "SCALE_FACTORS", "USE_REL_POS")


def build(configs, **overrides):
    """A tiny backbone; an override's key is its last word, such as RANK, found among the keys of TINY's sections."""
    values = dict(TINY)
    for key, value in overrides.items():
        section = "VIT" if f"MODEL.VIT.{key}" in TINY or key in OTHER_VIT_KEYS else "KARAT"
        values[f"MODEL.{section}.{key}"] = value
    opts = [str(part) for item in values.items() for part in item]
    torch.manual_seed(0)
    return build_backbone(load_cfg(str(configs / "base_vitdet.yaml"), opts), ShapeSpec(channels=3))


def attentions(backbone):
    return [block.attn for block in backbone.net.blocks]


def test_importing_the_package_registers_the_backbone():
    assert "build_vitdet_karat_backbone" in BACKBONE_REGISTRY


@pytest.mark.parametrize("size", [(64, 64), (96, 128)])
def test_disabled_it_is_detectron2s_own_vitdet(configs, size):
    ours = build(configs, ENABLED=False)
    theirs = SimpleFeaturePyramid(
        ViT(
            img_size=64,
            patch_size=16,
            embed_dim=24,
            depth=4,
            num_heads=3,
            drop_path_rate=0.0,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=2,
            window_block_indexes=[0, 2],
            pretrain_img_size=64,
        ),
        in_feature="last_feat",
        out_channels=16,
        scale_factors=(4.0, 2.0, 1.0, 0.5),
        top_block=LastLevelMaxPool(),
        norm="LN",
    )
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    image = torch.randn(2, 3, *size)
    expected = theirs(image)
    outputs = ours(image)
    assert list(outputs) == list(expected) == ["p2", "p3", "p4", "p5", "p6"]
    for level in expected:
        assert torch.equal(outputs[level], expected[level])


def test_every_block_has_karat_of_its_own_token_count(configs):
    backbone = build(configs)
    assert all(isinstance(attention, KArAtAttention) for attention in attentions(backbone))
    assert [attention.operator.num_tokens for attention in attentions(backbone)] == [4, 16, 4, 16]
    assert len({id(attention.operator) for attention in attentions(backbone)}) == 4
    features = backbone(torch.randn(2, 3, 64, 64))
    assert [tuple(feature.shape[1:]) for feature in features.values()] == [
        (16, 16, 16), (16, 8, 8), (16, 4, 4), (16, 2, 2), (16, 1, 1)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("choice", "kinds", "tokens"),
    [
        ("operator", [KArAtViTDetWindowAttention, KArAtAttention] * 2, [4, 16, 4, 16]),
        ("softmax", [KArAtViTDetWindowAttention, Attention] * 2, [4, None, 4, None]),
        ("window", [KArAtViTDetWindowAttention] * 4, [4, 4, 4, 4]),
    ],
)
def test_global_blocks(configs, choice, kinds, tokens):
    backbone = build(configs, GLOBAL_BLOCKS=choice)
    assert [type(attention) for attention in attentions(backbone)] == kinds
    operators = [getattr(attention, "operator", None) for attention in attentions(backbone)]
    assert [operator and operator.num_tokens for operator in operators] == tokens
    assert all(torch.isfinite(feature).all() for feature in backbone(torch.randn(1, 3, 64, 64)).values())


@pytest.mark.parametrize(
    ("overrides", "tokens"),
    [
        ({}, [4, 16, 4, 16]),
        ({"BLOCKS": [3]}, [None, None, None, 16]),
        ({"BLOCKS": [1, 0]}, [4, 16, None, None]),
        ({"BLOCKS": [2, 3], "GLOBAL_BLOCKS": "softmax"}, [None, None, 4, None]),
        ({"BLOCKS": [2, 3], "GLOBAL_BLOCKS": "window"}, [None, None, 4, 4]),
    ],
)
def test_chosen_blocks_get_karat_and_the_others_stay_as_they_are(configs, overrides, tokens):
    karat, softmax = build(configs, **overrides), build(configs, ENABLED=False)
    for block, plain, num_tokens in zip(karat.net.blocks, softmax.net.blocks, tokens, strict=True):
        if num_tokens:
            assert block.attn.operator.num_tokens == num_tokens
        else:
            assert type(block.attn) is Attention and block.window_size == plain.window_size
    # Up to the first block of another kind the two are one network.
    first = next(index for index, num_tokens in enumerate(tokens) if num_tokens)
    x = torch.randn(1, 4, 4, 24)
    for block, plain in zip(karat.net.blocks[:first], softmax.net.blocks[:first], strict=True):
        assert torch.equal(block(x), plain(x))
    assert all(torch.isfinite(feature).all() for feature in karat(torch.randn(1, 3, 64, 64)).values())


def test_a_universal_operator_is_shared_by_the_chosen_blocks_alone(configs):
    backbone = build(configs, SHARING="universal", BLOCKS=[1, 3])
    operators = [getattr(attention, "operator", None) for attention in attentions(backbone)]
    assert operators == [None, backbone.net.operator] * 2
    assert backbone.net.operator.num_tokens == 16


VARIANTS = [
    {},
    {"RESIDUAL": "softmax", "NUM_KARAT_HEADS": 1},
    {"ORDER": "project_before"},
    {"PROJECTION": "simplex", "BASE_FUNCTION": "silu"},
    {"BASIS": "mexican_hat", "RANK": None},
]


def slow_window_block(block, x):
    """What a window block is to compute for a map (B, H, W, C): one window and one pair of tokens after the other,
    without padding. Windows at the right and lower edge may hold fewer tokens."""
    attention, side = block.attn, block.attn.input_size[0]
    num_heads, num_tokens = attention.num_heads, side**2
    query, key, value = (part.unflatten(-1, (num_heads, -1)) for part in attention.qkv(block.norm1(x)).chunk(3, dim=-1))
    output = torch.zeros_like(query)
    for image, top, left in itertools.product(range(len(x)), range(0, x.shape[1], side), range(0, x.shape[2], side)):
        rows, columns = range(top, min(top + side, x.shape[1])), range(left, min(left + side, x.shape[2]))
        tokens = {(row - top) * side + column - left: (image, row, column) for row in rows for column in columns}
        scores = torch.zeros(num_heads, num_tokens, num_tokens)
        mask = torch.eye(num_tokens, dtype=torch.bool)  # what becomes of an empty place is of no interest
        for (i, place), (j, other) in itertools.product(tokens.items(), repeat=2):
            bias = (
                attention.rel_pos_h[place[1] - other[1] + side - 1]
                + attention.rel_pos_w[place[2] - other[2] + side - 1]
            )
            scores[:, i, j] = (query[place] * (key[other] * query.shape[-1] ** -0.5 + bias)).sum(-1)
            mask[i, j] = True
        weights = attention.operator.activate(scores, mask)
        for i, place in tokens.items():
            output[place] = sum(weights[:, i, j, None] * value[other] for j, other in tokens.items())
    x = x + attention.proj(output.flatten(-2))
    return x + block.mlp(block.norm2(x))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: " ".join(map(str, variant.values())) or "default")
@pytest.mark.parametrize("size", [(6, 3), (4, 7), (2, 2)], ids=["none padded", "some padded", "all padded"])
def test_a_window_block_equals_the_slow_one(configs, variant, size):
    block = build(configs, WINDOW_SIZE=3, GLOBAL_BLOCKS="softmax", **variant).net.blocks[0]
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in block.attn.parameters():
            parameter.normal_(std=0.5)
        x = torch.randn(2, *size, 24)
        torch.testing.assert_close(block(x), slow_window_block(block, x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", [{}, *VARIANTS, {"ENABLED": False}], ids=str)
def test_padding_of_windows_contributes_nothing(configs, variant):
    block = build(configs, GLOBAL_BLOCKS="softmax", **variant).net.blocks[0]
    block.attn.qkv.weight.data.normal_(std=0.3)
    x = torch.randn(2, 3, 5, 24)
    seen = []

    def change(linear, inputs):
        is_padding = (inputs[0] == 0).all(dim=-1, keepdim=True)
        seen.append(int(is_padding.sum()))
        return inputs[0] + 3.0 * is_padding

    with torch.no_grad():
        before = block(x)
        block.attn.qkv.register_forward_pre_hook(change)
        # Softmax, as Detectron2 has it, attends to the padding.
        assert torch.equal(block(x), before) == isinstance(block.attn, KArAtAttention)
    assert sum(seen) == 2 * (4 * 6 - 3 * 5)


@pytest.mark.parametrize(("size", "calls"), [((4, 4), [(4, False)]), ((3, 5), [(2, False), (4, True)])])
def test_only_windows_with_padding_have_a_mask(configs, monkeypatch, size, calls):
    block = build(configs).net.blocks[0]
    attend, seen = KArAtOperator.attend, []

    def watched(operator, query, key, value, bias):
        seen.append((len(query), bias.full is not None and bias.full.dtype == torch.bool))
        return attend(operator, query, key, value, bias)

    monkeypatch.setattr(KArAtOperator, "attend", watched)
    block(torch.randn(1, *size, 24))
    assert seen == calls


@pytest.mark.parametrize("sharing", ["blockwise", "universal"])
@pytest.mark.parametrize("size", [512, 1024])
def test_windows_of_14_at_512_and_1024(configs, size, sharing):
    values = {"IMG_SIZE": size, "WINDOW_SIZE": 14, "DEPTH": 3, "WINDOW_BLOCKS": [0, 2], "SHARING": sharing}
    backbone = build(configs, GLOBAL_BLOCKS="softmax", EMBED_DIM=16, NUM_HEADS=1, RANK=12, **values)
    sum(feature.square().sum() for feature in backbone(torch.randn(1, 3, size, size)).values()).backward()
    operators = {attention.operator for attention in attentions(backbone) if isinstance(attention, KArAtAttention)}
    assert len(operators) == (2 if sharing == "blockwise" else 1)
    for operator in operators:
        assert operator.num_tokens == 196
        assert operator.coefficients.grad.isfinite().all() and operator.coefficients.grad.any()


def test_larger_images_are_refused_where_a_global_block_has_an_operator(configs):
    image = np.zeros((300, 400, 3), dtype=np.uint8)
    cfg = load_cfg(str(configs / "quickstart.yaml"), [])
    message = r"is 800 × 1067 pixels.*MODEL.VIT.IMG_SIZE and IMG_WIDTH, 112 × 112\. Make.*MAX_SIZE_TEST 112; or build"
    with pytest.raises(ValueError, match=message):
        DefaultPredictor(cfg)(image)
    sizes = ["INPUT.MIN_SIZE_TEST", "112", "INPUT.MAX_SIZE_TEST", "112"]
    predictor = DefaultPredictor(load_cfg(str(configs / "quickstart.yaml"), sizes))
    assert predictor(image)["instances"].image_size == (300, 400)

    with pytest.raises(ValueError, match="is 64 × 65 pixels"):
        build(configs)(torch.zeros(1, 3, 64, 65))
    with pytest.raises(ValueError, match=r"N = 16 tokens and got 64.*MODEL.VIT.IMG_SIZE"):
        build(configs).net(torch.zeros(1, 3, 128, 128))


@pytest.mark.parametrize(
    "overrides", [{"ENABLED": False}, {"GLOBAL_BLOCKS": "softmax"}, {"GLOBAL_BLOCKS": "window"}], ids=str
)
def test_larger_images_are_seen_whole_where_nothing_fixes_the_size(configs, overrides):
    backbone = build(configs, **overrides)
    image = torch.zeros(1, 3, 80, 160)
    image[..., :70, :150] = torch.randn(3, 70, 150)
    features = backbone(image[..., :70, :150])
    assert features["p4"].shape == (1, 16, 5, 10)
    for level, feature in backbone(image).items():
        assert torch.equal(features[level], feature)

    values = TINY_DETECTOR | {f"MODEL.KARAT.{key}": value for key, value in overrides.items()}
    values |= {"MODEL.VIT.IMG_SIZE": 64, "MODEL.VIT.WINDOW_SIZE": 2, "MODEL.ANCHOR_GENERATOR.SIZES": [[64], [128]]}
    values |= {"MODEL.RPN.IN_FEATURES": ["p4", "p5"], "MODEL.ROI_HEADS.IN_FEATURES": ["p4", "p5"]}
    model = build_model(
        load_cfg(str(configs / "base_vitdet.yaml"), [str(part) for item in values.items() for part in item])
    )
    images = [torch.randint(256, (3, *size), dtype=torch.uint8) for size in ((100, 60), (70, 150))]
    with torch.no_grad():
        found = model.eval()([{"image": image} for image in images])
    assert [result["instances"].image_size for result in found] == [(100, 60), (70, 150)]


@pytest.mark.parametrize("choice", ["operator", "softmax", "window"])
def test_an_input_that_is_no_square(configs, choice):
    backbone = build(configs, IMG_WIDTH=160, GLOBAL_BLOCKS=choice)
    grid = {"operator": (4, 10), "softmax": (4, 10), "window": (2, 2)}[choice]
    for index, (rows, columns) in enumerate([(2, 2), grid] * 2):
        attention = backbone.net.blocks[index].attn
        assert (len(attention.rel_pos_h), len(attention.rel_pos_w)) == (2 * rows - 1, 2 * columns - 1)
        if isinstance(attention, KArAtAttention):
            assert attention.input_size == (rows, columns)
            assert attention.operator.num_tokens == rows * columns
    features = backbone(torch.randn(2, 3, 64, 160))
    assert [tuple(feature.shape[2:]) for feature in features.values()] == [(16, 40), (8, 20), (4, 10), (2, 5), (1, 3)]


def test_smaller_images_are_padded_on_the_right_and_below(configs):
    backbone = build(configs, IMG_WIDTH=160)
    image = torch.zeros(1, 3, 64, 160)
    image[..., :40, :100] = torch.randn(3, 40, 100)
    for level, feature in backbone(image).items():
        assert torch.equal(backbone(image[..., :40, :100])[level], feature)


@pytest.mark.parametrize("overrides", [{"IMG_SIZE": 80}, {"GLOBAL_BLOCKS": "window"}])
def test_every_level_covers_an_image_whose_side_no_coarse_stride_divides(configs, overrides):
    backbone = build(configs, **overrides)
    features = backbone(torch.randn(1, 3, 80, 80))
    assert {name: feature.shape[-1] for name, feature in features.items()} == {
        "p2": 20, "p3": 10, "p4": 5, "p5": 3, "p6": 2
    }  # fmt: skip
    tokens = torch.randn(1, 24, 5, 5)
    assert torch.equal(backbone.simfp_5[0](tokens)[..., 2, 2], tokens[..., 4, 4])


def test_transposed_images_give_transposed_features(configs):
    """Where nothing depends on the direction, the axes of an image are equal; a grid taken for its transpose is not."""
    tall, wide = build(configs, IMG_SIZE=160, IMG_WIDTH=64), build(configs, IMG_WIDTH=160)
    swapped = {"rel_pos_h": "rel_pos_w", "rel_pos_w": "rel_pos_h"}
    with torch.no_grad():
        for key, tensor in tall.state_dict().items():
            module, _, leaf = key.rpartition(".")
            if leaf == "pos_embed":
                tensor.zero_()
            elif leaf in swapped:
                tensor.normal_(std=0.1)
            elif "operator" in module:  # one and the same function for every token
                tensor.copy_(tensor.narrow(-2, 0, 1).expand_as(tensor))
            convolution = tensor.ndim == 4
            wide.state_dict()[f"{module}.{swapped.get(leaf, leaf)}"].copy_(tensor.mT if convolution else tensor)
    image = torch.randn(1, 3, 160, 64)
    for level, feature in tall(image).items():
        if level != "p6":  # it keeps every second position: another one of p5's five
            torch.testing.assert_close(wide(image.mT)[level].mT, feature, atol=1e-4, rtol=1e-4)


TINY_DETECTOR = {
    "MODEL.VIT.EMBED_DIM": 24,
    "MODEL.VIT.NUM_HEADS": 2,
    "MODEL.VIT.DEPTH": 2,
    "MODEL.VIT.DROP_PATH_RATE": 0.0,
    "MODEL.VIT.WINDOW_BLOCKS": [0],
    "MODEL.VIT.SCALE_FACTORS": [1.0, 0.5],
    "MODEL.KARAT.SHARING": "blockwise",
    "MODEL.KARAT.RANK": 4,
    "MODEL.FPN.OUT_CHANNELS": 8,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 50,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 50,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 20,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
    "MODEL.ROI_HEADS.NUM_CLASSES": 2,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 8,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
    "MODEL.ROI_BOX_HEAD.NUM_CONV": 1,
    "MODEL.ROI_BOX_HEAD.CONV_DIM": 8,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 8,
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 8,
    "TEST.DETECTIONS_PER_IMAGE": 3,
}


@pytest.mark.parametrize("choice", ["operator", "softmax", "window"])
@pytest.mark.parametrize(
    ("height", "width", "patch_size", "window_size"),
    [
        (224, 224, 16, 7),
        (512, 512, 16, 8),
        (512, 512, 16, 14),
        (1024, 1024, 32, 8),
        (512, 1024, 16, 8),
        (1024, 512, 32, 16),
    ],
)
def test_a_detector_trains_and_predicts_at_any_size(configs, height, width, patch_size, window_size, choice):
    level = patch_size.bit_length() - 1
    levels = [f"p{level}", f"p{level + 1}"]
    values = TINY_DETECTOR | {
        "MODEL.VIT.IMG_SIZE": height,
        "MODEL.VIT.IMG_WIDTH": width,
        "MODEL.VIT.PATCH_SIZE": patch_size,
        "MODEL.VIT.WINDOW_SIZE": window_size,
        "MODEL.KARAT.GLOBAL_BLOCKS": choice,
        "MODEL.ANCHOR_GENERATOR.SIZES": [[64], [128]],
        "MODEL.RPN.IN_FEATURES": levels,
        "MODEL.ROI_HEADS.IN_FEATURES": levels,
    }
    torch.manual_seed(0)
    cfg = load_cfg(str(configs / "base_vitdet.yaml"), [str(part) for item in values.items() for part in item])
    model = build_model(cfg)
    image = torch.randint(256, (3, height, width), dtype=torch.uint8)
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(torch.tensor([[20.0, 30.0, 120.0, 110.0]]))
    instances.gt_classes = torch.tensor([1])
    instances.gt_masks = PolygonMasks([[np.array([20.0, 30, 120, 30, 120, 110, 20, 110])]])
    with EventStorage():
        losses = model([{"image": image, "instances": instances}])
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    for attention in attentions(model.backbone):
        assert attention.rel_pos_h.grad.abs().sum() > 0 and attention.rel_pos_w.grad.abs().sum() > 0
        if isinstance(attention, KArAtAttention):
            assert attention.operator.coefficients.grad.abs().sum() > 0

    # Results come back on the original image, which is wider than the model's.
    model.eval()
    with torch.no_grad():
        found = model([{"image": image, "height": height // 2, "width": 2 * width}])[0]["instances"]
    assert found.image_size == (height // 2, 2 * width)
    assert len(found) == 3 and found.pred_masks.shape[1:] == (height // 2, 2 * width)
    assert found.pred_boxes.tensor[:, 2].max() > width and found.pred_boxes.tensor[:, 3].max() <= height // 2


def test_universal_operator_is_one_counted_trained_and_saved_once(configs):
    backbone = build(configs, SHARING="universal", GLOBAL_BLOCKS="window")
    operator = backbone.net.operator
    assert all(attention.operator is operator for attention in attentions(backbone))
    saved = [key for key in backbone.state_dict() if "coefficients" in key or "projector" in key]
    assert saved == ["net.operator.coefficients", "net.operator.projector"]
    names = [name for name, _ in backbone.named_parameters(remove_duplicate=False) if "operator" in name]
    assert names == saved

    # Its gradient is the sum of what each block contributes.
    sum(feature.square().sum() for feature in backbone(torch.randn(1, 3, 64, 64)).values()).backward()
    assert operator.coefficients.grad.abs().sum() > 0
    blockwise = build(configs, SHARING="blockwise", GLOBAL_BLOCKS="window")
    counts = [sum(p.numel() for p in model.parameters()) for model in (blockwise, backbone)]
    assert counts[0] - counts[1] == 3 * sum(p.numel() for p in operator.parameters())


def test_universal_state_dict_round_trips(configs):
    first, second = (build(configs, SHARING="universal", GLOBAL_BLOCKS="window") for _ in range(2))
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    second.load_state_dict(first.state_dict())
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(first(image)["p4"], second(image)["p4"])


def test_one_seed_starts_all_variants_alike(configs):
    softmax, karat = build(configs, ENABLED=False).state_dict(), build(configs).state_dict()
    assert set(karat) - set(softmax) == {
        f"net.blocks.{index}.attn.operator.{name}" for index in range(4) for name in ("coefficients", "projector")
    }
    assert all(torch.equal(karat[key], softmax[key]) for key in softmax)


def test_residual_softmax_starts_as_the_softmax_network(configs):
    softmax, residual = build(configs, ENABLED=False), build(configs, RESIDUAL="softmax")
    image = torch.randn(1, 3, 64, 64)
    for level, feature in softmax(image).items():
        torch.testing.assert_close(residual(image)[level], feature, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("embed_dim", "num_heads", "millions"), [(192, 3, 5.53), (384, 6, 21.67), (768, 12, 85.81)], ids=["Ti", "S", "B"]
)
def test_sizes_of_vit_tiny_small_and_base(configs, embed_dim, num_heads, millions):
    sizes = f"MODEL.VIT.EMBED_DIM {embed_dim} MODEL.VIT.NUM_HEADS {num_heads} MODEL.KARAT.SHARING blockwise"
    backbone = build_backbone(load_cfg(str(configs / "vitdet_karat.yaml"), sizes.split()), ShapeSpec(channels=3))
    parameters = dict(backbone.net.named_parameters())
    operators = sum(p.numel() for name, p in parameters.items() if ".operator." in name)
    assert operators == 12 * num_heads * (2 * 1 + 1) * 196 * 12
    positions = sum(p.numel() for name, p in parameters.items() if "rel_pos" in name)
    # Those of classifiers of ten classes: with a last norm and without relative positions. Tiny and Base are the
    # paper's; its 22.05M of Small is what a thousand classes make of 21.67M.
    classifier = sum(p.numel() for p in parameters.values()) - operators - positions + embed_dim * (2 + 10) + 10
    assert classifier / 1e6 == pytest.approx(millions, abs=0.01)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"IMG_SIZE": 72}, r"MODEL.VIT.IMG_SIZE is 72, which MODEL.VIT.PATCH_SIZE, 16, does not divide.*64 and 80"),
        ({"SHARING": "universal"}, r"KARAT.SHARING is universal, but N.*2 × 2 = 4 in window.*4 × 4 = 16 in global"),
        ({"RANK": 5}, r"MODEL.KARAT.RANK is 5, above N = 4, .*from 1 to 4\. N is 2 × 2 = 4 in.*4 × 4 = 16 in global"),
        ({"GRID_SIZE": 0}, r"MODEL.KARAT.GRID_SIZE is 0. It must be a whole number, at least 1"),
        ({"BASIS": "cubic"}, r"MODEL.KARAT.BASIS is 'cubic', which is unknown. Known: fourier"),
        ({"SHARING": "half"}, r"MODEL.KARAT.SHARING is 'half'.*blockwise, universal"),
        ({"GLOBAL_BLOCKS": "none"}, r"MODEL.KARAT.GLOBAL_BLOCKS is 'none'.*operator, softmax, window"),
        ({"NUM_HEADS": 5}, r"MODEL.VIT.NUM_HEADS, 5, does not divide"),
        ({"WINDOW_BLOCKS": [0, 7]}, r"MODEL.VIT.WINDOW_BLOCKS names \[7\].*0 to 3"),
        ({"IMG_WIDTH": 72}, r"MODEL.VIT.IMG_WIDTH is 72, which MODEL.VIT.PATCH_SIZE, 16, does not divide.*64 and 80"),
        ({"IMG_WIDTH": -64}, r"MODEL.VIT.IMG_WIDTH is -64. It must be at least 1, or 0 for a square"),
        ({"BLOCKS": [1, 4, -1]}, r"MODEL.KARAT.BLOCKS names \[4, -1\].*0 to 3"),
        ({"BLOCKS": [1, 3], "GLOBAL_BLOCKS": "softmax"}, r"none of MODEL.KARAT.BLOCKS, \[1, 3\], is among.*\[0, 2\]"),
        ({"WINDOW_BLOCKS": [], "GLOBAL_BLOCKS": "softmax"}, r"none of MODEL.KARAT.BLOCKS, all, .*no block would have"),
        ({"WINDOW_SIZE": 0}, r"MODEL.VIT.WINDOW_SIZE is 0, but there are window blocks"),
        ({"SCALE_FACTORS": [4.0, 1.0]}, r"MODEL.VIT.SCALE_FACTORS is \[4.0, 1.0\].*neighbours"),
        ({"PATCH_SIZE": 2}, r"stride of 0.5 pixels. It must be a power of 2"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit_name_key_value_and_remedy(configs, overrides, message):
    with pytest.raises(ValueError, match=message):
        build(configs, **overrides)


def test_softmax_windows_may_be_padded_as_in_detectron2(configs):
    backbone = build(configs, ENABLED=False, IMG_SIZE=96, WINDOW_SIZE=4)
    assert backbone(torch.randn(1, 3, 96, 96))["p4"].shape == (1, 16, 6, 6)


@pytest.mark.parametrize(
    ("choice", "residual", "window_size", "backend"),
    # Both trace as the compiler does and need no compiler; "aot_eager" traces the backward pass too.
    [
        ("operator", "none", 2, "aot_eager"),
        ("softmax", "softmax", 2, "eager"),
        ("window", "softmax", 2, "eager"),
        ("softmax", "none", 3, "eager"),  # some windows are padded
    ],
)
def test_the_vit_compiles_without_a_graph_break_to_the_same_outputs(configs, choice, residual, window_size, backend):
    values = {"GLOBAL_BLOCKS": choice, "RESIDUAL": residual, "WINDOW_SIZE": window_size}
    net = build(configs, IMG_WIDTH=96, DEPTH=2, WINDOW_BLOCKS=[0], **values).net
    torch.compiler.reset()
    compiled = torch.compile(net, fullgraph=True, backend=backend)
    assert_same_outputs_and_gradients(net, compiled, torch.randn(2, 3, 64, 96))


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="Inductor needs a C++ compiler")
def test_inductor_compiles_the_attention_to_the_same_outputs(configs):
    attention = build(configs, DEPTH=1, WINDOW_BLOCKS=[], GLOBAL_BLOCKS="operator").net.blocks[0].attn
    torch.compiler.reset()
    assert_same_outputs_and_gradients(attention, torch.compile(attention, fullgraph=True), torch.randn(2, 4, 4, 24))


def assert_same_outputs_and_gradients(module, compiled, x):
    results = []
    for called in (module, compiled):
        module.zero_grad()
        output = called(x)
        output = output["last_feat"] if isinstance(output, dict) else output
        output.square().sum().backward()
        results.append([output, *(parameter.grad for parameter in module.parameters())])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-4 * expected.abs().max().item() + 1e-6, rtol=1e-4)
