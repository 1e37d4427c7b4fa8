"""KArAt in transformers that others have built. The tests of each host compare it with plain loops."""

import pytest
import timm
import torch
from detectron2.config import LazyCall, instantiate
from detectron2.modeling.backbone import swin as detectron2_swin
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.vit import Attention, SimpleFeaturePyramid, ViT

from karat_det import replace_attention
from karat_det.attention import KArAtAttention, KArAtConfig, KArAtOperator
from karat_det.attention.window import KArAtSwinWindowAttention, KArAtViTDetWindowAttention

# Blocks 0 and 2 attend within windows of 2 × 2 tokens, 1 and 3 to the 4 × 4 of the image.
VIT = {
    "img_size": 64,
    "embed_dim": 24,
    "depth": 4,
    "num_heads": 3,
    "use_rel_pos": True,
    "window_size": 2,
    "window_block_indexes": [0, 2],
    "pretrain_img_size": 64,
}
SWIN = {"embed_dim": 12, "depths": [2, 2], "num_heads": [2, 3], "window_size": 4, "out_indices": [0, 1]}
SMALL = {"num_classes": 5, "img_size": 32, "patch_size": 8}
HOSTS = {
    "ViTDet": (lambda: ViT(**VIT), 64),
    "Swin": (lambda: detectron2_swin.SwinTransformer(**SWIN), 64),
    "timm's ViT": (
        lambda: timm.create_model("vit_tiny_patch16_224", depth=2, proj_drop_rate=0.3, qkv_bias=False, **SMALL), 32
    ),
    "timm's ConViT": (lambda: timm.create_model("convit_tiny", **SMALL), 32),
    "timm's Swin": (
        lambda: timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, img_size=56, embed_dim=12), 56
    ),
}  # fmt: skip
CONFIG = KArAtConfig(rank=2)
RESIDUAL = KArAtConfig(rank=2, residual="softmax")


def build(host):
    torch.manual_seed(0)
    return HOSTS[host][0]().eval()


def karat_kinds(model):
    return [type(module) for module in model.modules() if "Attention" in type(module).__name__]


@torch.no_grad()
def run(model, size):
    output = model(torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1)))
    return output if isinstance(output, dict) else {"logits": output}


@pytest.mark.parametrize("host", HOSTS)
def test_a_host_keeps_its_names_weights_and_with_the_residual_its_function(host):
    model, size = build(host), HOSTS[host][1]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    before, expected = dict(model.named_parameters()), run(model, size)
    state = torch.get_rng_state()
    assert replace_attention(model, RESIDUAL) is model
    assert torch.equal(torch.get_rng_state(), state)
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    added = after.keys() - before.keys()
    assert added and all(name.rpartition(".")[0].endswith(".attn.operator") for name in added)
    assert not any(module.training for module in model.modules())
    for name, output in run(model, size).items():
        torch.testing.assert_close(output, expected[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("host", ["ViTDet", "timm's ViT", "timm's ConViT"])
def test_a_universal_operator_is_the_models(host):
    blocks = [1, 3] if host == "ViTDet" else None
    model = replace_attention(build(host), CONFIG, sharing="universal", blocks=blocks)
    assert [name for name in model.state_dict() if "operator" in name] == [
        "operator.coefficients",
        "operator.projector",
    ]
    assert {id(module) for module in model.modules() if isinstance(module, KArAtOperator)} == {id(model.operator)}
    assert all(feature.isfinite().all() for feature in run(model, HOSTS[host][1]).values())


def test_a_lazy_config_builds_it():
    vit = LazyCall(ViT)(**VIT)
    karat = LazyCall(replace_attention)(model=vit, config=LazyCall(KArAtConfig)(grid_size=2, rank=3), blocks=[0, 1])
    pyramid = LazyCall(SimpleFeaturePyramid)(
        net=karat,
        in_feature="last_feat",
        out_channels=16,
        scale_factors=(4.0, 2.0, 1.0, 0.5),
        top_block=LazyCall(LastLevelMaxPool)(),
    )
    net = instantiate(pyramid).net
    assert karat_kinds(net) == [KArAtViTDetWindowAttention, KArAtAttention, Attention, Attention]
    assert [net.blocks[index].attn.operator.coefficients.shape for index in (0, 1)] == [
        (3, 2, 2, 4, 3),
        (3, 2, 2, 16, 3),
    ]
    assert all(level.isfinite().all() for level in run(instantiate(pyramid), 64).values())


def test_dropout_of_the_projection_stays():
    vit = replace_attention(build("timm's ViT"), CONFIG)
    assert [block.attn.proj_drop.p for block in vit.blocks] == [0.3, 0.3]
    swin = detectron2_swin.SwinTransformer(**SWIN, drop_rate=0.2)
    assert {block.attn.proj_drop.p for block in replace_attention(swin, CONFIG).layers[1].blocks} == {0.2}


def test_operators_have_the_type_of_the_model():
    vit = replace_attention(build("timm's ViT").bfloat16(), CONFIG)
    assert {parameter.dtype for parameter in vit.parameters()} == {torch.bfloat16}


def test_global_blocks_without_relative_positions_are_of_the_image_size():
    vit = ViT(**VIT | {"use_rel_pos": False})
    with pytest.raises(ValueError, match=r"^image_size is None. It must be the \(height, width\), in pixels"):
        replace_attention(vit, CONFIG)
    replace_attention(vit, CONFIG, image_size=(64, 96))
    assert [block.attn.input_size for block in vit.blocks] == [(2, 2), (4, 6)] * 2
    assert vit(torch.randn(1, 3, 64, 96))["last_feat"].shape == (1, 24, 4, 6)


def replaced(host, **arguments):
    return replace_attention(build(host), CONFIG, **arguments)


@pytest.mark.parametrize(
    ("build", "arguments", "message"),
    [
        (lambda: torch.nn.Linear(2, 2), {}, r"model is a Linear. It must be one of detectron2's ViT, .*timm's ConVit"),
        (lambda: build("ViTDet"), {"sharing": "shared"}, "sharing is 'shared', which is unknown. Known: blockwise, un"),
        (lambda: build("ViTDet"), {"sharing": "universal"},
         r"sharing is universal, but N.* 4 in blocks \[0, 2\], 16 in blocks \[1, 3\]. It must be blockwise"),
        (lambda: build("timm's Swin"), {"sharing": "universal"}, r"sharing is universal.*\[3, 6, 12, 24\] heads"),
        (lambda: replaced("ViTDet", sharing="universal", blocks=[1]), {"sharing": "universal", "blocks": [3]},
         "sharing is universal, but the model has a universal operator already"),
        (lambda: build("ViTDet"), {"image_size": (64, 96)},
         r"image_size is \(64, 96\), for 4 × 6 patches, but .* 4 × 4"),
        (lambda: build("Swin"), {"image_size": (64, 64)}, r"image_size is \(64, 64\). It must be None"),
        (lambda: ViT(**VIT | {"depth": 1, "window_block_indexes": []}), {"config": KArAtConfig(rank=17)},
         "rank is 17, above N = 16"),
        (lambda: detectron2_swin.SwinTransformer(**SWIN, attn_drop_rate=0.1), {"blocks": [3]},
         r"model drops attention in blocks \[3\]"),
        *((lambda host=host: build(host), {"blocks": [1, 12, -1]}, r"blocks names \[-1, .*12\]; the .* KArAt are \[")
          for host in HOSTS),
        (lambda: build("timm's ConViT"), {"blocks": [9, 10]}, r"blocks names \[9\]; the .* KArAt are \[10, 11\]"),
        (lambda: build("ViTDet"), {"blocks": []}, r"blocks names none; the blocks for KArAt are \[0, 1, 2, 3\]"),
        *((lambda host=host: replaced(host), {}, "blocks is None, for all, but .* have KArAt al") for host in HOSTS),
        (lambda: replaced("Swin", blocks=[2]), {"blocks": [1, 2]},
         r"blocks names \[1, 2\], but \[2\] have KArAt already. Those that have softmax are \[0, 1, 3\]"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name_and_changes_nothing(build, arguments, message):
    model = build()
    kinds, names = karat_kinds(model), list(model.state_dict())
    with pytest.raises(ValueError, match=f"^{message}"):
        replace_attention(model, **{"config": CONFIG} | arguments)
    assert (karat_kinds(model), list(model.state_dict())) == (kinds, names)


def test_blocks_may_get_karat_one_after_the_other():
    model = replaced("Swin", blocks=[2])
    replace_attention(model, RESIDUAL, blocks=[0])
    kinds = [KArAtSwinWindowAttention, detectron2_swin.WindowAttention] * 2
    assert karat_kinds(model) == kinds
    assert model.layers[0].blocks[0].attn.operator.config == RESIDUAL
