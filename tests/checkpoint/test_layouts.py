"""Weights of other layouts in our models: by what the models then compute, and by what the loader says."""

import logging
import pickle
import re

import pytest
import timm
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from timm.models.convit import ConVit
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

from karat_det.attention import KArAtAttention, KArAtConfig, KArAtOperator
from karat_det.checkpoint.layouts import convert_state
from karat_det.checkpoint.loading import load_weights
from karat_det.engine.setup import load_cfg

SIZE = {"img_size": 64, "patch_size": 16, "embed_dim": 12, "depth": 2, "num_heads": 2}
VIT = {
    "MODEL.KARAT.ENABLED": False,
    "MODEL.KARAT.RANK": 3,
    "MODEL.VIT.IMG_SIZE": 64,
    "MODEL.VIT.PRETRAIN_IMG_SIZE": 64,
    "MODEL.VIT.EMBED_DIM": 12,
    "MODEL.VIT.DEPTH": 2,
    "MODEL.VIT.NUM_HEADS": 2,
    "MODEL.VIT.WINDOW_SIZE": 4,
    "MODEL.VIT.WINDOW_BLOCKS": [],
    "MODEL.VIT.USE_REL_POS": False,
    "MODEL.VIT.DROP_PATH_RATE": 0.0,
    "MODEL.FPN.OUT_CHANNELS": 8,
}
SWIN = {
    "MODEL.KARAT.ENABLED": False,
    "MODEL.KARAT.RANK": 3,
    "MODEL.SWIN.EMBED_DIM": 12,
    "MODEL.SWIN.DEPTHS": [2, 2],
    "MODEL.SWIN.NUM_HEADS": [2, 3],
    "MODEL.SWIN.WINDOW_SIZE": 4,
    "MODEL.SWIN.DROP_PATH_RATE": 0.0,
    "MODEL.SWIN.OUT_FEATURES": ["p0", "p1"],
    "MODEL.FPN.OUT_CHANNELS": 8,
    "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4"],
    "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3"],
    "MODEL.ANCHOR_GENERATOR.SIZES": [[16], [32], [64]],
}


class Detector(torch.nn.Module):
    """As much of one as pretrained weights concern."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone


def build(configs, values, **overrides):
    base = configs / ("base_vitdet.yaml" if values is VIT else "swin/base_swin.yaml")
    settings = values | {f"MODEL.{key.replace('__', '.')}": value for key, value in overrides.items()}
    cfg = load_cfg(str(base), [str(word) for item in settings.items() for word in item])
    torch.manual_seed(0)
    return Detector(build_backbone(cfg, ShapeSpec(channels=3))).eval()


def randomise(model):
    """Weights of which none can be swapped for another, biases and norms included."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def save(tmp_path, state, **further):
    path = tmp_path / "w.pth"
    torch.save({"model": state, **further} if further else state, path)
    return str(path)


def images(seed=2, size=64):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed))


def split_qkv(state, names):
    """The same weights with three matrices where there was one."""
    result = {}
    for key, tensor in state.items():
        if ".attn.qkv." in key:
            result |= {key.replace("qkv", name): part for name, part in zip(names, tensor.chunk(3), strict=True)}
        else:
            result[key] = tensor
    return result


VIT_MAKERS = {
    "timm": lambda state: state,
    "ddp": lambda state: {f"module.{key}": tensor for key, tensor in state.items()},
    "compiled": lambda state: {f"_orig_mod.module.{key}": tensor for key, tensor in state.items()},
    "backbone": lambda state: {f"backbone.{key}": tensor for key, tensor in state.items()},
    "encoder": lambda state: (
        {f"encoder.{key}": tensor for key, tensor in state.items()} | {"decoder.0.weight": images()}
    ),
    "q, k, v": lambda state: split_qkv(state, ("q", "k", "v")),
    "q_proj": lambda state: split_qkv(state, ("q_proj", "k_proj", "v_proj")),
    # What its published files hold, with those of pretraining besides.
    "MAE": lambda state: (
        {key: tensor for key, tensor in state.items() if not key.startswith("head")}
        | {"mask_token": images(), "decoder_blocks.0.attn.qkv.weight": images(), "decoder_pos_embed": images()}
    ),
}


@pytest.mark.parametrize("layout", VIT_MAKERS)
def test_a_vit_computes_what_it_did_in_timm(configs, tmp_path, layout):
    source = randomise(VisionTransformer(**SIZE, class_token=False, global_pool="avg", num_classes=5))
    model = build(configs, VIT, VIT__PRETRAIN_USE_CLS_TOKEN=False)
    load_weights(model, save(tmp_path, VIT_MAKERS[layout](source.state_dict())), complete=False)
    with torch.no_grad():
        expected = source.get_intermediate_layers(images(), n=1, reshape=True)[0]
        torch.testing.assert_close(model.backbone.net(images())["last_feat"], expected)


def test_maes_published_file_starts_a_detector(configs, tmp_path, caplog):
    """mae_pretrain_vit_*.pth: under "model", timm's names, with class token, without the head."""
    source = randomise(VisionTransformer(**SIZE, num_classes=0))
    state = source.state_dict()
    assert "cls_token" in state and not any(key.startswith(("head", "fc_norm")) for key in state)
    model = build(configs, VIT, VIT__PRETRAIN_USE_CLS_TOKEN=True)
    with caplog.at_level(logging.INFO):
        load_weights(model, save(tmp_path, {"model": state}), complete=False)
    net = model.backbone.net
    assert torch.equal(net.pos_embed, source.pos_embed)
    for ours, theirs in zip(net.blocks, source.blocks, strict=True):
        assert torch.equal(ours.attn.qkv.weight, theirs.attn.qkv.weight)
        assert torch.equal(ours.mlp.fc2.bias, theirs.mlp.fc2.bias)
    assert "class tokens, which the model does not have: cls_token\n" in caplog.text
    assert re.search(r"not fitting +0\n", caplog.text)


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "vit_tiny_patch16_224"])
def test_class_tokens_and_heads_of_real_models_are_left_out_and_listed(configs, tmp_path, caplog, name):
    source = randomise(timm.create_model(name, pretrained=False, depth=2))
    sizes = {"VIT__EMBED_DIM": 192, "VIT__NUM_HEADS": 3, "VIT__PRETRAIN_IMG_SIZE": 224}
    model = build(configs, VIT, **sizes)
    with caplog.at_level(logging.INFO):
        load_weights(model, save(tmp_path, source.state_dict()), complete=False)
    distilled = "distilled" in name
    patches = source.pos_embed[:, 1 + distilled :]
    assert torch.equal(model.backbone.net.pos_embed, torch.cat([source.pos_embed[:, :1], patches], dim=1))
    assert torch.equal(model.backbone.net.blocks[1].mlp.fc2.weight, source.blocks[1].mlp.fc2.weight)
    assert f"class tokens, which the model does not have: cls_token{', dist_token' * distilled}\n" in caplog.text
    assert "the classifier's head: head.weight, head.bias" in caplog.text
    assert "the classifier's last norm: norm.weight, norm.bias" in caplog.text
    assert f"Weights of {'a distilled DeiT' if distilled else 'a ViT of timm, DeiT or MAE'}:" in caplog.text


def test_position_embeddings_are_resampled_on_the_way(configs, tmp_path, caplog):
    source = VisionTransformer(**{**SIZE, "img_size": 96}, num_classes=0)
    with caplog.at_level(logging.INFO):
        load_weights(build(configs, VIT), save(tmp_path, source.state_dict()), complete=False)
    assert "pos_embed: 6 × 6 and a class token to 4 × 4 and a class token" in caplog.text


@pytest.mark.parametrize("layout", ["timm", "original", "mmdet"])
def test_a_swin_computes_what_it_did_in_timm(configs, tmp_path, layout, caplog):
    source = SwinTransformer(
        img_size=64, patch_size=4, embed_dim=12, depths=(2, 2), num_heads=(2, 3), window_size=4, num_classes=5
    )
    state = randomise(source).state_dict()
    if layout != "timm":
        # There the first stage merges at its end, and buffers are saved.
        state = {key.replace("layers.1.downsample", "layers.0.downsample"): tensor for key, tensor in state.items()}
        state["layers.0.blocks.1.attn_mask"] = torch.zeros(16, 16, 16)
        state["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.long)
    if layout == "mmdet":
        state = {f"backbone.{key}": tensor for key, tensor in state.items()}
    model = build(configs, SWIN)
    with caplog.at_level(logging.INFO):
        load_weights(model, save(tmp_path, state), complete=False)
    assert ("a constant that the model computes" in caplog.text) == (layout != "timm")
    assert ("Weights of timm's Swin:" if layout == "timm" else "Weights of the original Swin:") in caplog.text
    swin = model.backbone.bottom_up
    for norm in (swin.norm0, swin.norm1):
        norm.register_forward_hook(lambda module, inputs, output: inputs[0])
    with torch.no_grad():
        expected = source.forward_intermediates(images(), indices=[0, 1], intermediates_only=True)
        outputs = swin(images())
    for name, features in zip(("p0", "p1"), expected, strict=True):
        torch.testing.assert_close(outputs[name], features)


def test_a_real_swin_fits_but_for_the_norms_of_its_outputs(configs, tmp_path, caplog):
    source = timm.create_model("swin_tiny_patch4_window7_224", pretrained=False, depths=(1, 1, 1, 1))
    sizes = {"SWIN__EMBED_DIM": 96, "SWIN__DEPTHS": [1] * 4, "SWIN__NUM_HEADS": [3, 6, 12, 24], "SWIN__WINDOW_SIZE": 5}
    model = build(configs, SWIN, **sizes)
    with caplog.at_level(logging.INFO):
        load_weights(model, save(tmp_path, source.state_dict()), complete=False)
    assert "relative_position_bias_table: 13 × 13 to 9 × 9" in caplog.text
    swin = model.backbone.bottom_up
    assert torch.equal(swin.layers[2].downsample.reduction.weight, source.layers[3].downsample.reduction.weight)
    at_start = [line for line in caplog.text.splitlines() if line.startswith("  backbone.bottom_up.norm")]
    assert at_start == [f"  backbone.bottom_up.norm{stage}.{{weight, bias}}" for stage in range(2)]


def test_absolute_positions_of_the_original_swin_become_a_map(configs, tmp_path):
    model = build(configs, SWIN, SWIN__APE=True, SWIN__PRETRAIN_IMG_SIZE=64)
    expected = torch.randn(1, 12, 16, 16)
    names = {key.removeprefix("backbone.bottom_up."): tensor for key, tensor in model.state_dict().items()}
    state = {key: tensor for key, tensor in names.items() if key.startswith(("patch_embed", "layers"))}
    state["absolute_pos_embed"] = expected.flatten(2).mT
    load_weights(model, save(tmp_path, state), complete=False)
    assert torch.equal(model.backbone.bottom_up.absolute_pos_embed, expected)


def test_a_convit_gives_its_matrices_and_not_its_gates(configs, tmp_path, caplog):
    # timm's width is that of a head here.
    source = ConVit(**{**SIZE, "embed_dim": 6}, num_classes=3, local_up_to_layer=1, norm_layer=torch.nn.LayerNorm)
    model = build(configs, VIT, VIT__QKV_BIAS=False)
    with caplog.at_level(logging.INFO):
        load_weights(model, save(tmp_path, source.state_dict()), complete=False)
    local = source.blocks[0].attn
    fused = torch.cat([local.qk.weight, local.v.weight])
    assert torch.equal(model.backbone.net.blocks[0].attn.qkv.weight, fused)
    assert torch.equal(model.backbone.net.blocks[1].attn.qkv.weight, source.blocks[1].attn.qkv.weight)
    assert "ConViT's attention to positions: blocks.0.attn.gating_param, blocks.0.attn.pos_proj.weight" in caplog.text


@pytest.mark.parametrize(("values", "name"), [(VIT, "ViT"), (SWIN, "Swin")])
def test_detectron2_pickles_load_by_name(configs, tmp_path, caplog, values, name):
    source, model = randomise(build(configs, values)), build(configs, values)
    arrays = {key: tensor.numpy() for key, tensor in source.state_dict().items()}
    path = tmp_path / "model_final_61ccd1.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "Facebook", "matching_heuristics": True}))
    with caplog.at_level(logging.INFO):
        load_weights(model, str(path))
    assert f"Weights of a detector with a {name} backbone:" in caplog.text
    with torch.no_grad():
        for key, features in source.backbone(images()).items():
            assert torch.equal(model.backbone(images())[key], features)


def test_softmax_weights_start_a_karat_model_and_its_operators_by_their_init(configs, tmp_path, caplog):
    karat = {"KARAT__ENABLED": True, "KARAT__SHARING": "blockwise", "KARAT__INIT": "paper"}
    source, model = VisionTransformer(**SIZE, num_classes=0), build(configs, VIT, **karat)
    before = model.backbone.net.blocks[1].attn.operator.coefficients.clone()
    path = save(tmp_path, source.state_dict())
    with caplog.at_level(logging.INFO):
        load_weights(model, path, complete=False)
    attention = model.backbone.net.blocks[1].attn
    assert torch.equal(attention.qkv.weight, source.blocks[1].attn.qkv.weight)
    assert torch.equal(attention.proj.bias, source.blocks[1].attn.proj.bias)
    assert torch.equal(attention.operator.coefficients, before)
    assert (
        "Softmax weights: 2 KArAt operators start by MODEL.KARAT.INIT paper: backbone.net.blocks.0.attn.operator, "
        "backbone.net.blocks.1.attn.operator" in caplog.text
    )
    with pytest.raises(ValueError, match=r"The file lacks .* of the model:\n(.*\n)*.*attn\.operator"):
        load_weights(model, path)


def test_karat_weights_do_not_start_a_softmax_model(configs, tmp_path):
    source = build(configs, VIT, KARAT__ENABLED=True, KARAT__SHARING="blockwise")
    with pytest.raises(ValueError) as caught:
        load_weights(build(configs, VIT), save(tmp_path, source.state_dict()), complete=False)
    assert "4 tensors have no place in the model" in str(caught.value)
    assert "backbone.net.blocks.1.attn.operator.{coefficients, projector}" in str(caught.value)


def test_operators_of_a_classifier_lose_the_class_token(configs, tmp_path, caplog):
    source = VisionTransformer(**SIZE, num_classes=5)
    for block in source.blocks:
        block.attn = KArAtAttention(12, 2, KArAtOperator(2, 17, KArAtConfig(grid_size=1, rank=3)))
    model = build(configs, VIT, KARAT__ENABLED=True, KARAT__SHARING="blockwise")
    with caplog.at_level(logging.INFO):
        load_weights(model, save(tmp_path, randomise(source).state_dict()), complete=False)
    assert "blocks.1.attn.operator.coefficients: 4 × 4 and a class token to 4 × 4" in caplog.text
    assert "Softmax weights" not in caplog.text


def test_a_classifier_of_the_same_kind_keeps_everything(tmp_path):
    source, model = (VisionTransformer(**SIZE, num_classes=5) for _ in range(2))
    load_weights(model, save(tmp_path, {f"module.{key}": value for key, value in source.state_dict().items()}))
    assert torch.equal(model.head.weight, source.head.weight)
    assert torch.equal(model.cls_token, source.cls_token)


def test_another_architecture_says_what_the_file_has_and_what_is_known(configs, tmp_path):
    path = save(tmp_path, timm.create_model("resnet10t", pretrained=False, num_classes=2).state_dict())
    with pytest.raises(ValueError, match=r"begin with conv1, bn1, layer1.* Known layouts: timm's ViT"):
        load_weights(build(configs, VIT), path, complete=False)


def test_a_vit_is_no_swin(configs, tmp_path):
    path = save(tmp_path, VisionTransformer(**SIZE).state_dict())
    with pytest.raises(ValueError, match="The file holds the weights of a ViT, and the model is a Swin"):
        load_weights(build(configs, SWIN), path, complete=False)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"embed_dim": 16}, r"pos_embed: \(1, 17, 16\) in the file, \(1, 17, 12\) in the model"),
        ({"patch_size": 8}, r"patch_embed.proj.weight: \(12, 3, 8, 8\) in the file, \(12, 3, 16, 16\) in the model"),
        ({"depth": 3}, r"have no place in the model:\n  backbone.net.blocks.2.norm1"),
        ({"init_values": 0.1}, r"backbone.net.blocks.0.ls1.\{gamma\}"),
        ({"reg_tokens": 2}, r"backbone.net.\{reg_token\}"),
    ],
)
def test_a_vit_of_another_kind_stops(configs, tmp_path, change, complaint):
    path = save(tmp_path, VisionTransformer(**{**SIZE, **change}).state_dict())
    with pytest.raises(ValueError, match=complaint):
        load_weights(build(configs, VIT), path, complete=False)


@pytest.mark.parametrize("wrap", ["{}", "backbone.net.{}"])
@pytest.mark.parametrize(
    ("kept", "rows"),
    [
        (r"(?!blocks\.[23]).*", ["{0}blocks.2, {0}blocks.3: all of it"]),
        (r"(?!blocks\.1\.).*", ["{0}blocks.1: all of it"]),
        (r"(?!blocks\.1\.mlp\.fc2).*", ["{0}blocks.1: mlp.fc2.weight, mlp.fc2.bias"]),
        (r"patch_embed.*|blocks\.0\.norm1.*",
         ["{0}blocks.0: attn.qkv.weight, attn.proj.weight,", "{0}blocks.1, {0}blocks.2, {0}blocks.3: all of it"]),
    ],
)  # fmt: skip
def test_a_vit_that_lacks_blocks_of_the_model_stops(configs, tmp_path, caplog, kept, rows, wrap):
    state = VisionTransformer(**{**SIZE, "depth": 4}).state_dict()
    model = build(configs, VIT, VIT__DEPTH=4, VIT__USE_REL_POS=True)
    state = {wrap.format(key): tensor for key, tensor in state.items() if re.fullmatch(kept, key)}
    if wrap != "{}":
        state = {key: tensor for key, tensor in state.items() if key in model.state_dict()}
    path = save(tmp_path, state)
    with pytest.raises(ValueError, match="The file lacks a part of the model's ViT:") as caught:
        load_weights(model, path, complete=False)
    for row in rows:
        assert f"\n  {row.format('backbone.net.')}" in str(caught.value)
    assert str(caught.value).count("backbone.net.blocks.") == sum(row.count("blocks.") for row in rows)
    assert "Use the config that the weights were made with, or set MODEL.WEIGHTS_STRICT False" in str(caught.value)
    load_weights(model, path, strict=False, complete=False)


def test_a_file_without_patches_but_of_the_models_names_stops(configs, tmp_path):
    model = build(configs, VIT)
    state = {key: tensor for key, tensor in model.state_dict().items() if ".patch_embed." not in key}
    with pytest.raises(ValueError, match=r"lacks a part .* ViT:\n  backbone.net.patch_embed: all of it"):
        load_weights(model, save(tmp_path, state), complete=False)


@pytest.mark.parametrize("source", ["timm", "detector"])
def test_a_swin_of_fewer_blocks_stops(configs, tmp_path, source):
    if source == "timm":
        sizes = {"img_size": 64, "embed_dim": 12, "num_heads": (2, 3), "window_size": 4}
        state = SwinTransformer(**sizes, depths=(2, 2)).state_dict()
    else:
        state = build(configs, SWIN).state_dict()
    model = build(configs, SWIN, SWIN__DEPTHS=[2, 4])
    row = "backbone.bottom_up.layers.1.blocks.2, backbone.bottom_up.layers.1.blocks.3: all of it"
    with pytest.raises(ValueError, match=f"lacks a part of the model's Swin:\n  {row}"):
        load_weights(model, save(tmp_path, state), complete=False)


def test_a_deeper_classifier_does_not_start_from_a_shallower_one(tmp_path):
    path = save(tmp_path, VisionTransformer(**SIZE).state_dict())
    with pytest.raises(ValueError, match=r"lacks a part of the model's ViT:\n  blocks.2: all of it"):
        load_weights(VisionTransformer(**{**SIZE, "depth": 3}), path, complete=False)


def test_heads_alone_may_be_loaded(configs, tmp_path, caplog):
    model = build(configs, VIT)
    state = {key: tensor for key, tensor in model.state_dict().items() if ".net." not in key}
    with caplog.at_level(logging.INFO):
        load_weights(model, save(tmp_path, state), complete=False)
    count = len(model.state_dict())
    assert f"Loaded {len(state)} of the model's {count} tensors from the file's {len(state)}" in caplog.text


def test_without_a_model_names_are_those_of_a_detector():
    vit = VisionTransformer(**SIZE, num_classes=5).state_dict()
    conversion = convert_state(vit, {"blocks.0.attn.operator": (4, 4)})
    kept = {key for key in vit if not key.startswith(("head", "norm", "cls_token"))}
    assert conversion.state.keys() == {f"backbone.net.{key}" for key in kept}
    assert conversion.token_grids == {"backbone.net.blocks.0.attn.operator": (4, 4)}
    assert conversion.ignored.keys() == vit.keys() - kept
    again = convert_state(conversion.state, conversion.token_grids)
    assert (again.state.keys(), again.ignored) == (conversion.state.keys(), {})
    swin = SwinTransformer(img_size=64, embed_dim=12, depths=(1, 1), num_heads=(2, 3), window_size=4).state_dict()
    assert "backbone.bottom_up.layers.0.downsample.norm.weight" in convert_state(swin, {}).state


def test_two_of_three_matrices_are_not_fused():
    state = split_qkv(VisionTransformer(**SIZE).state_dict(), ("q", "k", "v"))
    del state["blocks.0.attn.k.weight"]
    converted = convert_state(state, {}).state
    assert {"backbone.net.blocks.0.attn.q.weight", "backbone.net.blocks.1.attn.qkv.weight"} <= converted.keys()
