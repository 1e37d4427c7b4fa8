import copy
import itertools

import pytest
import timm
import torch
from detectron2.config import get_cfg
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.convit import GPSA, MHSA
from timm.models.swin_transformer import WindowAttention
from timm.models.vision_transformer import Attention
from torch.nn import functional as F

from karat_det.attention import KArAtAttention
from karat_det.attention.window import KArAtSwinWindowAttention
from karat_det.backbones.classifiers import build_classifier
from karat_det.config import add_karat_config, pretrain_config

# ViT: N = 1 + 4². ConViT: the same in its last two blocks. Swin: maps of 14, 7, 4 and 2 tokens on a side, with windows
# of 7, 7, 4 and 2; shifted in the second block alone, since the other maps are one window.
VIT = {"NAME": "vit_tiny_patch16_224", "IMG_SIZE": 32, "PATCH_SIZE": 8, "EMBED_DIM": 24, "DEPTH": 3}
CONVIT = {"NAME": "convit_tiny", "IMG_SIZE": 32, "PATCH_SIZE": 8}
SWIN = {"NAME": "swin_tiny_patch4_window7_224", "IMG_SIZE": 56, "EMBED_DIM": 12, "KARAT.SHARING": "blockwise"}
FAMILIES = {"ViT": VIT, "ConViT": CONVIT, "Swin": SWIN}


def config(keys, **overrides):
    """A config of MODEL's keys; those of MODEL.KARAT may be given by their last word."""
    cfg = pretrain_config()
    karat = {f"KARAT.{key}" if key in cfg.MODEL.KARAT else key: value for key, value in overrides.items()}
    for key, value in ({"KARAT.RANK": 3} | keys | karat).items():
        cfg.merge_from_list([f"MODEL.{key}", value])
    return cfg


def build(keys, num_classes=5, **overrides):
    torch.manual_seed(0)
    return build_classifier(config(keys, **overrides), num_classes)


def images(model, batch=2):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, 3, *model.patch_embed.img_size, generator=generator)


def attentions(model):
    return [module for name, module in model.named_modules() if name.endswith(".attn")]


@pytest.mark.parametrize("family", FAMILIES)
def test_disabled_it_is_timms_own(family):
    keys = FAMILIES[family]
    ours = build(keys, ENABLED=False, DROP_PATH_RATE=0.1)
    torch.manual_seed(0)
    sizes = {key.lower(): keys[key] for key in ("IMG_SIZE", "PATCH_SIZE", "EMBED_DIM", "DEPTH") if key in keys}
    theirs = timm.create_model(keys["NAME"], pretrained=False, num_classes=5, drop_path_rate=0.1, **sizes)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for model in (ours, theirs):
        torch.manual_seed(1)  # for stochastic depth
        model.logits = model(images(model, 4))
    assert torch.equal(ours.logits, theirs.logits)
    assert str(ours) == str(theirs)


@pytest.mark.parametrize(
    ("keys", "kinds"),
    [
        (VIT, [KArAtAttention] * 3),
        (VIT | {"KARAT.BLOCKS": [2, 0]}, [KArAtAttention, Attention, KArAtAttention]),
        (CONVIT, [GPSA] * 10 + [KArAtAttention] * 2),
        (CONVIT | {"KARAT.BLOCKS": [11]}, [GPSA] * 10 + [MHSA, KArAtAttention]),
        (SWIN, [KArAtSwinWindowAttention] * 12),
        (SWIN | {"KARAT.BLOCKS": [1, 4]},
         [KArAtSwinWindowAttention if index in (1, 4) else WindowAttention for index in range(12)]),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("sharing", ["blockwise", "universal"])
def test_karat_takes_the_place_of_softmax_and_keeps_its_names_and_weights(keys, kinds, sharing):
    if keys["NAME"] == SWIN["NAME"]:
        sharing = "blockwise"
    softmax = build(keys, ENABLED=False)
    after_softmax = torch.rand(1)
    karat = build(keys, SHARING=sharing)
    assert torch.equal(torch.rand(1), after_softmax)
    assert [type(attention) for attention in attentions(karat)] == kinds
    before, after = softmax.state_dict(), karat.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
    ours = {name: module for name, module in karat.named_modules() if "KArAt" in type(module).__name__}
    operators = ["operator"] if sharing == "universal" else [f"{name}.operator" for name in ours if name[-4:] == "attn"]
    added = [f"{operator}.{name}" for operator in operators for name in ("coefficients", "projector")]
    assert sorted(set(after) - set(before)) == sorted(added)
    assert sorted(name for name, _ in karat.named_parameters() if "operator" in name) == sorted(added)
    if sharing == "universal":
        assert all(
            attention.operator is karat.operator for attention in ours.values() if attention is not karat.operator
        )


@pytest.mark.parametrize(("size", "num_heads"), [("tiny", 3), ("small", 6), ("base", 12)])
def test_the_papers_vits_attend_to_197_tokens(size, num_heads):
    cfg = config({"NAME": f"vit_{size}_patch16_224"}, RANK=12, GRID_SIZE=3)
    with torch.device("meta"):
        model = build_classifier(cfg, 1000)
    assert model.operator.coefficients.shape == (num_heads, 2, 3, 197, 12)
    assert model.operator.projector.shape == (num_heads, 197, 12)
    assert len(model.blocks) == 12


@pytest.mark.parametrize("family", FAMILIES)
def test_residual_softmax_starts_as_timms_network(family):
    softmax, residual = (
        build(FAMILIES[family], ENABLED=False).eval(),
        build(FAMILIES[family], RESIDUAL="softmax").eval(),
    )
    assert any(isinstance(attention, KArAtAttention | KArAtSwinWindowAttention) for attention in attentions(residual))
    with torch.no_grad():
        for model in (softmax, residual):
            for name, parameter in model.named_parameters():
                if "relative_position" in name:
                    parameter.normal_(generator=torch.Generator().manual_seed(len(parameter)))
        torch.testing.assert_close(residual(images(softmax)), softmax(images(softmax)), atol=2e-5, rtol=1e-4)


def test_a_vit_attends_by_the_operators_activated_scores():
    attention = build(VIT, GRID_SIZE=2).blocks[1].attn
    x = torch.randn(2, 17, 24)
    query, key, value = attention.qkv(x).reshape(2, 17, 3, 3, 8).permute(2, 0, 3, 1, 4)
    activated = attention.operator.activate(query @ key.mT * 8**-0.5)
    torch.testing.assert_close(attention(x), attention.proj((activated @ value).transpose(1, 2).reshape(2, 17, 24)))


@pytest.mark.parametrize(
    "variant", [{}, {"RESIDUAL": "softmax", "NUM_KARAT_HEADS": 1}, {"PROJECTION": "simplex"}], ids=str
)
@pytest.mark.parametrize("shifted", [False, True])
def test_a_token_in_swin_sees_its_own_region_of_the_window_alone(shifted, variant):
    block = build(SWIN, **variant).layers[0].blocks[int(shifted)]
    assert any(block.shift_size) == shifted
    with torch.no_grad():
        for parameter in block.attn.operator.parameters():
            parameter.normal_()
    region = {}
    for row, column in itertools.product(range(14), repeat=2):
        offset = 3 * shifted
        region[row, column] = (row - offset) // 7, (column - offset) // 7
    for place in ((0, 0), (5, 13), (13, 2), (13, 13)):
        x = torch.randn(1, 14, 14, 12, requires_grad=True)
        block._attn(x)[0][place].sum().backward()
        seen = {other for other in region if x.grad[0][other].any()}
        assert seen == {other for other in region if region[other] == region[place]}


def test_swin_adds_its_relative_positions():
    attention = build(SWIN).layers[1].blocks[0].attn
    with torch.no_grad():
        attention.relative_position_bias_table.normal_()
        x = torch.randn(2, 49, 24)
        query, key, value = attention.qkv(x).reshape(2, 49, 3, 6, 4).permute(2, 0, 3, 1, 4)
        bias = attention.relative_position_bias_table[attention.relative_position_index].permute(2, 0, 1)
        activated = attention.operator.activate(query @ key.mT * 4**-0.5 + bias)
        expected = attention.proj((activated @ value).transpose(1, 2).reshape(2, 49, 24))
        torch.testing.assert_close(attention(x), expected)


VARIANTS = [
    {"GRID_SIZE": 3, "SHARING": "blockwise"},
    {"SHARING": "universal"},
    {"SHARING": "universal", "RESIDUAL": "softmax", "NUM_KARAT_HEADS": 1},
    {"BASIS": "bspline", "INIT": "paper"},
    {"BASIS": "meyer", "ORDER": "two_operators", "SHARING": "blockwise"},
    {"ORDER": "project_before", "BASE_FUNCTION": "gelu"},
    {"RANK": None, "PROJECTION": "simplex"},
]


@pytest.mark.parametrize(
    ("family", "variant"),
    [("ViT", variant) for variant in VARIANTS]
    + [("ConViT", variant) for variant in VARIANTS[:3]]
    + [("Swin", variant | {"SHARING": "blockwise"}) for variant in (VARIANTS[0], VARIANTS[2], VARIANTS[5])],
    ids=lambda value: value if isinstance(value, str) else " ".join(map(str, value.values())),
)
def test_it_learns(family, variant):
    model = build(FAMILIES[family], **variant)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    inputs, classes = images(model, 8), torch.arange(8) % 5
    losses = []
    for step in range(6):
        loss = F.cross_entropy(model(inputs), classes)
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            # Behind a residual, the functions get their gradient through W, which is 0 in the first step. A bias of
            # ConViT's scores for positions is the same for all keys, so that softmax cancels it.
            assert (step == 0 and "operator" in name) or name.endswith("pos_proj.bias") or parameter.grad.any(), name
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert not any(
        torch.equal(model.get_parameter(name), tensor) for name, tensor in start.items() if "operator" in name
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_such_as_averaged_weights_is_of_its_own_and_computes_the_same(family):
    model = build(FAMILIES[family]).eval()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(images(model))
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(twin(images(model)), expected)
        twin.load_state_dict(model.state_dict())
        assert not twin(images(model)).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_it_runs_under_autocast(family):
    model = build(FAMILIES[family]).eval()
    with torch.no_grad():
        expected = model(images(model))
        with torch.autocast("cpu", torch.bfloat16):
            narrow = model(images(model))
    torch.testing.assert_close(narrow.float(), expected, atol=0.05, rtol=0.05)


def test_swin_compiles_without_a_graph_break_to_the_same_outputs():
    stage = build(SWIN).layers[0].eval()  # plain windows, then shifted ones
    torch.compiler.reset()
    compiled = torch.compile(stage, fullgraph=True, backend="eager")
    x = torch.randn(2, 14, 14, 12)
    torch.testing.assert_close(compiled(x), stage(x))


@given(patches=st.integers(1, 6), patch=st.integers(1, 5), heads=st.integers(1, 4), depth=st.integers(1, 3))
@settings(max_examples=10, deadline=None)
def test_any_vit_is_of_the_sizes_given(patches, patch, heads, depth):
    sizes = {
        "IMG_SIZE": patches * patch,
        "PATCH_SIZE": patch,
        "EMBED_DIM": 2 * heads,
        "NUM_HEADS": heads,
        "DEPTH": depth,
    }
    model = build({"NAME": VIT["NAME"]} | sizes, RANK=1, SHARING="blockwise")
    assert model(torch.randn(2, 3, patches * patch, patches * patch)).shape == (2, 5)
    assert len(model.blocks) == depth
    assert all(block.attn.operator.coefficients.shape == (heads, 2, 1, 1 + patches**2, 1) for block in model.blocks)


def test_the_operators_keys_are_the_detectors():
    cfg = get_cfg()
    add_karat_config(cfg)
    del cfg.MODEL.KARAT["GLOBAL_BLOCKS"]  # every block of a classifier is of one kind
    assert dict(pretrain_config().MODEL.KARAT) == dict(cfg.MODEL.KARAT)


def test_a_config_is_merged_with_yaml_and_its_base(tmp_path):
    (tmp_path / "base.yaml").write_text("MODEL: {NAME: convit_tiny, IMG_SIZE: 112, KARAT: {GRID_SIZE: 3}}")
    (tmp_path / "leaf.yaml").write_text("_BASE_: base.yaml\nMODEL: {DROP_PATH_RATE: 0.1, KARAT: {RANK: null}}")
    cfg = pretrain_config()
    cfg.merge_from_file(str(tmp_path / "leaf.yaml"))
    assert (cfg.MODEL.NAME, cfg.MODEL.IMG_SIZE, cfg.MODEL.DROP_PATH_RATE) == ("convit_tiny", 112, 0.1)
    assert (cfg.MODEL.KARAT.GRID_SIZE, cfg.MODEL.KARAT.RANK, cfg.MODEL.KARAT.ENABLED) == (3, None, True)


@pytest.mark.parametrize(
    ("keys", "overrides", "message"),
    [
        (VIT, {"NAME": "vit_tinypatch16_224"}, r"MODEL.NAME is 'vit_tinypatch16_224'.*Similar.*: vit_tiny_patch16_224"),
        (VIT, {"NAME": "resnet18"}, "MODEL.NAME is resnet18, a ResNet. It must be one of timm's ViT, ConViT, Swin"),
        (VIT, {"IMG_SIZE": 30}, "MODEL.IMG_SIZE is 30, which MODEL.PATCH_SIZE, 8, does not divide"),
        ({"NAME": VIT["NAME"]}, {"PATCH_SIZE": 15}, "MODEL.IMG_SIZE is 224, which MODEL.PATCH_SIZE, 15, does not"),
        (VIT, {"DEPTH": 0}, "MODEL.DEPTH is 0. It must be a whole number, at least 1, or None"),
        (VIT, {"NUM_HEADS": 2.5}, "MODEL.NUM_HEADS is 2.5. It must be a whole number"),
        (VIT, {"EMBED_DIM": 25}, "MODEL.EMBED_DIM is 25: the number of heads, 3, .*MODEL.EMBED_DIM or NUM_HEADS"),
        (SWIN, {"EMBED_DIM": 10}, r"MODEL.EMBED_DIM is 10: the number of heads, 3, .* a block, 10. .*EMBED_DIM\."),
        (VIT, {"DROP_PATH_RATE": 1.0}, "MODEL.DROP_PATH_RATE is 1.0. It must be from 0 to below 1"),
        (CONVIT, {"NUM_HEADS": 3}, "MODEL.NUM_HEADS is 3, but convit_tiny is a ConViT, which takes only IMG_SIZE"),
        (SWIN, {"DEPTH": 3}, "MODEL.DEPTH is 3, but swin_tiny_patch4_window7_224 is a Swin, which takes only"),
        (VIT, {"RANK": 18}, "MODEL.KARAT.RANK is 18, above N = 17, .* from 1 to 17.*image in vit_tiny.*IMG_SIZE, P"),
        (SWIN, {"RANK": 5}, "MODEL.KARAT.RANK is 5, above N = 4, .* from 1 to 4.* the smallest window in swin_tiny"),
        (VIT, {"NUM_KARAT_HEADS": 4}, "MODEL.KARAT.NUM_KARAT_HEADS is 4, above .*, 3.* from 1 to 3.*vit_tiny"),
        (SWIN, {"NUM_KARAT_HEADS": 4}, "MODEL.KARAT.NUM_KARAT_HEADS is 4, above .* 3.* from 1 to 3.* the fewest"),
        (VIT, {"BLOCKS": [1, 3]}, r"MODEL.KARAT.BLOCKS names \[3\]; .* are \[0, 1, 2\]. MODEL.NAME is vit_tiny"),
        (CONVIT, {"BLOCKS": [9, 10]}, r"MODEL.KARAT.BLOCKS names \[9\]; .* are \[10, 11\]. MODEL.NAME is convit_tiny"),
        (SWIN, {"SHARING": "universal"}, r"MODEL.KARAT.SHARING is universal.*\[3, 6, 12, 24\].*SHARING blockwise"),
        (SWIN, {"IMG_SIZE": 64}, r"MODEL.IMG_SIZE is 64, with patches of 4.*16 × 16 .* of 7 × 7 do not.* 224 pixels"),
        (VIT, {"GRID_SIZE": 0}, "MODEL.KARAT.GRID_SIZE is 0. It must be a whole number, at least 1"),
        ({"NAME": "vit_pwee_patch16_reg1_gap_256"}, {}, "MODEL.NAME is vit_pwee.* none of whose 16 blocks has"),
        ({"NAME": "vit_base_patch16_rope_224"}, {}, "MODEL.NAME is vit_base_patch16_rope_224, a Eva"),
    ],
)  # fmt: skip
def test_what_does_not_fit_names_key_value_and_remedy(keys, overrides, message):
    with pytest.raises(ValueError, match=message):
        build(keys, **overrides)


def test_softmax_asks_less_of_the_windows():
    model = build(SWIN, IMG_SIZE=64, ENABLED=False)
    assert model(images(model)).shape == (2, 5)
    # Of the chosen blocks only.
    assert build(SWIN, IMG_SIZE=64, BLOCKS=[11], RANK=3)(images(model)).isfinite().all()


def test_a_vit_may_start_as_the_original_one_did():
    own, original = (build(VIT, WEIGHT_INIT=init).blocks[0].mlp.fc1.weight.detach() for init in ("", "jax"))
    # Xavier's bound for 24 inputs and 96 outputs.
    assert own.std() == pytest.approx(0.02, rel=0.1) and original.abs().max() == pytest.approx(
        (6 / 120) ** 0.5, rel=0.05
    )
    with pytest.raises(ValueError, match=r"MODEL\.WEIGHT_INIT is 'jax', which is for a ViT.*swin_tiny"):
        build(SWIN, WEIGHT_INIT="jax")
    with pytest.raises(ValueError, match=r"MODEL\.WEIGHT_INIT is 'xavier'"):
        build(VIT, WEIGHT_INIT="xavier")
