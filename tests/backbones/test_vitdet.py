from functools import partial

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.vit import Attention, SimpleFeaturePyramid, ViT

from karat_det.attention import KArAtAttention
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


def build(configs, **overrides):
    """A tiny backbone; an override's key is its last word, such as RANK, found among the keys of TINY's sections."""
    values = dict(TINY)
    for key, value in overrides.items():
        section = "VIT" if f"MODEL.VIT.{key}" in TINY or key in ("PATCH_SIZE", "SCALE_FACTORS") else "KARAT"
        values[f"MODEL.{section}.{key}"] = value
    opts = [str(part) for item in values.items() for part in item]
    torch.manual_seed(0)
    return build_backbone(load_cfg(str(configs / "base_vitdet.yaml"), opts), ShapeSpec(channels=3))


def attentions(backbone):
    return [block.attn for block in backbone.net.blocks]


def test_importing_the_package_registers_the_backbone():
    assert "build_vitdet_karat_backbone" in BACKBONE_REGISTRY


def test_disabled_it_is_detectron2s_own_vitdet(configs):
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
        square_pad=64,
    )
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    image = torch.randn(2, 3, 64, 64)
    expected = theirs(image)
    outputs = ours(image)
    assert list(outputs) == list(expected) == ["p2", "p3", "p4", "p5", "p6"]
    for level in expected:
        assert torch.equal(outputs[level], expected[level])
    assert ours.padding_constraints == theirs.padding_constraints


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
        ("operator", [KArAtAttention] * 4, [4, 16, 4, 16]),
        ("softmax", [KArAtAttention, Attention] * 2, [4, None, 4, None]),
        ("window", [KArAtAttention] * 4, [4, 4, 4, 4]),
    ],
)
def test_global_blocks(configs, choice, kinds, tokens):
    backbone = build(configs, GLOBAL_BLOCKS=choice)
    assert [type(attention) for attention in attentions(backbone)] == kinds
    operators = [getattr(attention, "operator", None) for attention in attentions(backbone)]
    assert [operator and operator.num_tokens for operator in operators] == tokens
    assert all(torch.isfinite(feature).all() for feature in backbone(torch.randn(1, 3, 64, 64)).values())


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
        ({"IMG_SIZE": 80}, r"80 / 16 = 5 patches on a side, which MODEL.VIT.WINDOW_SIZE, 2, does not.*64 and 96"),
        ({"SHARING": "universal"}, r"MODEL.KARAT.SHARING is universal, but N.*2² = 4 in window.*4² = 16 in global"),
        ({"RANK": 5}, r"MODEL.KARAT.RANK is 5, above N = 2² = 4.*from 1 to 4"),
        ({"GRID_SIZE": 0}, r"MODEL.KARAT.GRID_SIZE is 0. It must be a whole number, at least 1"),
        ({"BASIS": "cubic"}, r"MODEL.KARAT.BASIS is 'cubic', which is unknown. Known: fourier"),
        ({"SHARING": "half"}, r"MODEL.KARAT.SHARING is 'half'.*blockwise, universal"),
        ({"GLOBAL_BLOCKS": "none"}, r"MODEL.KARAT.GLOBAL_BLOCKS is 'none'.*operator, softmax, window"),
        ({"NUM_HEADS": 5}, r"MODEL.VIT.NUM_HEADS, 5, does not divide"),
        ({"WINDOW_BLOCKS": [0, 7]}, r"MODEL.VIT.WINDOW_BLOCKS names \[7\].*0 to 3"),
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
