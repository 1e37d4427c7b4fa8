"""Weights of classifiers, as pretraining saves them, in detectors and in other classifiers."""

import logging

import pytest
import timm
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone

from karat_det.backbones.classifiers import build_classifier
from karat_det.checkpoint.loading import SafeCheckpointer, load_weights
from karat_det.checkpoint.publishing import convert_file
from karat_det.checkpoint.resampling import TokenGrid, resample_operator, resample_tokens
from karat_det.config import pretrain_config
from karat_det.engine.setup import load_cfg

# The ViT of configs/quickstart.yaml, but for its depth.
VIT = {"IMG_SIZE": 112, "PATCH_SIZE": 8, "EMBED_DIM": 96, "DEPTH": 3, "NUM_HEADS": 3, "KARAT.GRID_SIZE": 2}
SWIN = {"NAME": "swin_tiny_patch4_window7_224", "EMBED_DIM": 12, "KARAT.SHARING": "blockwise"}
CONVIT = {"NAME": "convit_tiny", "IMG_SIZE": 56, "PATCH_SIZE": 8}
CONVIT_DETECTOR = {"VIT.EMBED_DIM": 192, "VIT.DEPTH": 12, "VIT.NUM_HEADS": 4, "KARAT.BLOCKS": [10, 11]}
OPERATORS = {
    "universal": ["operator"],
    "blockwise": ["blocks.0.attn.operator", "blocks.1.attn.operator", "blocks.2.attn.operator"],
}


def classifier(keys, num_classes=5, seed=1, **karat):
    """A classifier whose weights, biases and norms included, are random."""
    cfg = pretrain_config()
    for key, value in (keys | {f"KARAT.{key}": value for key, value in karat.items()}).items():
        cfg.merge_from_list([f"MODEL.{key}", value])
    torch.manual_seed(seed)
    model = build_classifier(cfg, num_classes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return model.eval()


class Detector(torch.nn.Module):
    """As much of one as pretrained weights concern."""

    def __init__(self, cfg):
        super().__init__()
        self.backbone = build_backbone(cfg, ShapeSpec(channels=3))


def detector(configs, keys, base="quickstart.yaml", **karat):
    sizes = {"KARAT.RESIDUAL": "none", "VIT.DEPTH": 3, "KARAT.GRID_SIZE": 2, "SWIN.EMBED_DIM": 12}
    settings = sizes | keys | {f"KARAT.{key}": value for key, value in karat.items()}
    cfg = load_cfg(
        str(configs / base), [str(word) for key, value in settings.items() for word in (f"MODEL.{key}", value)]
    )
    torch.manual_seed(0)
    return Detector(cfg).eval()


def save(tmp_path, model, averaged=None):
    path = str(tmp_path / "checkpoint.pth")
    content = {
        "model": model.state_dict(),
        "epoch": 3,
        "optimizer": {"state": {0: {"step": torch.ones(1)}}, "groups": []},
    }
    torch.save(content | ({"model_ema": averaged.state_dict()} if averaged else {}), path)
    return path


def start(model, path):
    """What training a detector does with MODEL.WEIGHTS."""
    SafeCheckpointer(model).resume_or_load(path, resume=False)
    return model


def images(size=112):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("sharing", OPERATORS)
@pytest.mark.parametrize("averaged", [False, True])
def test_a_detector_computes_what_the_classifier_did_for_its_patches(configs, tmp_path, caplog, sharing, averaged):
    source = classifier(VIT, SHARING=sharing)
    with torch.no_grad():
        for name in OPERATORS[sharing]:
            # So that the class token, which the detector has not, tells the patches nothing.
            operator = source.get_submodule(name)
            operator.coefficients[..., 0, :] = 0
            operator.projector[:, 0] = 0
        expected = source.get_intermediate_layers(images(), n=1, reshape=True)[0]
    path = save(tmp_path, classifier(VIT, seed=5, SHARING=sharing), source) if averaged else save(tmp_path, source)
    with caplog.at_level(logging.INFO):
        model = start(detector(configs, {}, SHARING=sharing), path)
    with torch.no_grad():
        torch.testing.assert_close(model.backbone.net(images())["last_feat"], expected, atol=1e-4, rtol=1e-4)
    assert "Weights of a ViT of timm, DeiT or MAE, with KArAt:" in caplog.text
    for name in OPERATORS[sharing]:
        assert f"backbone.net.{name}.projector: 14 × 14 and a class token to 14 × 14" in caplog.text
    absent = caplog.text.partition("left at their initialisation")[2].partition("Ignored")[0]
    assert "  backbone.net.blocks.2.attn.{rel_pos_h, rel_pos_w}\n" in absent
    assert "backbone.net" not in absent.replace(".attn.{rel_pos_h, rel_pos_w}", "").replace("backbone.net.blocks.", "")
    assert "the classifier's head: head.weight, head.bias" in caplog.text
    assert "the classifier's last norm: norm.weight, norm.bias" in caplog.text
    assert "class tokens, which the model does not have: cls_token" in caplog.text


DISTILLED = VIT | {"NAME": "deit_tiny_distilled_patch16_224"}
REGISTERS = VIT | {"NAME": "vit_base_patch16_reg4_gap_256"}


@pytest.mark.parametrize("sharing", OPERATORS)
@pytest.mark.parametrize("told", [True, False], ids=["told", "as before grids were told"])
@pytest.mark.parametrize("through", ["", "converted.safetensors"])
@pytest.mark.parametrize(("keys", "count"), [(DISTILLED, 2), (REGISTERS, 4)])
def test_all_tokens_before_the_patches_are_dropped(configs, tmp_path, caplog, keys, count, told, through, sharing):
    source = classifier(keys, SHARING=sharing)
    assert source.num_prefix_tokens == count
    with torch.no_grad():
        for name in OPERATORS[sharing]:
            operator = source.get_submodule(name)
            operator.coefficients[..., :count, :] = 0
            operator.projector[:, :count] = 0
        expected = source.get_intermediate_layers(images(), n=1, reshape=True)[0]
    path = save(tmp_path, source)
    if told:
        SafeCheckpointer(source, str(tmp_path)).save("checkpoint")
    if through:
        convert_file(path, str(tmp_path / through))
        path = str(tmp_path / through)
    model = detector(configs, {"VIT.PRETRAIN_USE_CLS_TOKEN": count == 2}, SHARING=sharing)
    with caplog.at_level(logging.INFO):
        start(model, path)
    with torch.no_grad():
        torch.testing.assert_close(model.backbone.net(images())["last_feat"], expected, atol=1e-4, rtol=1e-4)
    for name in OPERATORS[sharing]:
        assert f"backbone.net.{name}.projector: 14 × 14 and {count} class tokens to 14 × 14\n" in caplog.text
    reason = "class tokens, which the model does not have: cls_token, dist_token"
    assert through or (reason if count == 2 else "register tokens, which the model does not have: reg_token") in (
        caplog.text
    )


@pytest.mark.parametrize(("keys", "count"), [(DISTILLED, 2), (REGISTERS, 4), (VIT, 1)])
def test_a_classifiers_checkpoint_tells_the_grid_behind_its_class_tokens(tmp_path, keys, count):
    SafeCheckpointer(classifier(keys), str(tmp_path)).save("checkpoint")
    assert torch.load(tmp_path / "checkpoint.pth", weights_only=True)["token_grids"] == {"operator": (14, 14, count)}


@pytest.mark.parametrize(("keys", "count", "embedded"), [(DISTILLED, 2, 2), (REGISTERS, 4, 0)])
def test_class_tokens_and_registers_are_kept_at_another_size(tmp_path, caplog, keys, count, embedded):
    source, larger = classifier(keys | {"IMG_SIZE": 56}), classifier(keys, seed=2)
    with caplog.at_level(logging.INFO):
        load_weights(larger, save(tmp_path, source))
    small, large = TokenGrid(7, 7, count), TokenGrid(14, 14, count)
    expected = resample_operator(source.operator.state_dict(), larger.operator, small, large)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in larger.operator.state_dict().items())
    positions = source.pos_embed.detach()
    grids = (grid._replace(class_tokens=embedded) for grid in (small, large))
    assert torch.equal(larger.pos_embed, resample_tokens(positions, 1, *grids))
    name = "dist_token" if count == 2 else "reg_token"
    assert torch.equal(larger.get_parameter(name), source.get_parameter(name))


def test_a_softmax_vits_registers_are_not_dropped_unasked(configs, tmp_path):
    path = save(tmp_path, classifier(REGISTERS, ENABLED=False))
    with pytest.raises(ValueError, match=r"1 tensors have no place in the model:\n  backbone.net.\{reg_token\}"):
        start(detector(configs, {}), path)


@pytest.mark.parametrize("residual", ["none", "softmax"])
def test_without_a_class_token_nothing_but_the_head_is_lost(configs, tmp_path, residual):
    source = classifier({"NAME": "vit_base_patch16_gap_224"} | VIT, RESIDUAL=residual)
    model = detector(configs, {"VIT.PRETRAIN_USE_CLS_TOKEN": False}, RESIDUAL=residual)
    start(model, save(tmp_path, source))
    with torch.no_grad():
        expected = source.get_intermediate_layers(images(), n=1, reshape=True)[0]
        torch.testing.assert_close(model.backbone.net(images())["last_feat"], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sharing", OPERATORS)
def test_a_classifier_of_smaller_images_is_resampled(configs, tmp_path, caplog, sharing):
    source = classifier(VIT | {"IMG_SIZE": 56}, SHARING=sharing)
    with caplog.at_level(logging.INFO):
        net = start(detector(configs, {}, SHARING=sharing), save(tmp_path, source)).backbone.net
    small, large = TokenGrid(7, 7, 1), TokenGrid(14, 14)
    for name in OPERATORS[sharing]:
        operator = net.get_submodule(name)
        expected = resample_operator(source.get_submodule(name).state_dict(), operator, small, large)
        for key, tensor in operator.state_dict().items():
            assert torch.equal(tensor, expected[key])
        assert f"backbone.net.{name}.coefficients: 7 × 7 and a class token to 14 × 14" in caplog.text
    assert torch.equal(net.pos_embed[:, 1:], resample_tokens(source.pos_embed.detach(), 1, small, large))
    assert torch.equal(net.pos_embed[:, 0], source.pos_embed[:, 0])
    kept = [name for name, _ in net.named_parameters() if "operator" not in name and "pos" not in name]
    assert len(kept) == 2 + 3 * 12
    assert all(torch.equal(net.get_parameter(name), source.get_parameter(name)) for name in kept)


def test_swin_computes_what_the_classifier_did(configs, tmp_path, caplog):
    source = classifier(SWIN)
    model = detector(configs, {"KARAT.GRID_SIZE": 1}, base="swin/swin_t_g1b.yaml")
    with caplog.at_level(logging.INFO):
        start(model, save(tmp_path, source))
    assert "Weights of timm's Swin, with KArAt:" in caplog.text
    assert "Of these resampled" not in caplog.text
    swin = model.backbone.bottom_up
    operators = [module for name, module in source.named_modules() if name.endswith("operator")]
    loaded = [module for name, module in swin.named_modules() if name.endswith("operator")]
    assert len(operators) == 12
    for ours, theirs in zip(loaded, operators, strict=True):
        assert torch.equal(ours.coefficients, theirs.coefficients)
        assert torch.equal(ours.projector, theirs.projector)
    for stage in range(4):
        getattr(swin, f"norm{stage}").register_forward_hook(lambda module, inputs, output: inputs[0])
    with torch.no_grad():
        features = source.forward_intermediates(images(224), intermediates_only=True)
        outputs = swin(images(224))
    # The last stage's map is a single window at 224 pixels. timm does not shift that, Detectron2 does.
    for stage in range(3):
        torch.testing.assert_close(outputs[f"p{stage}"], features[stage], atol=1e-4, rtol=1e-4)


def test_swin_of_smaller_images_brings_its_smaller_windows_to_size(configs, tmp_path, caplog):
    source = classifier(SWIN | {"IMG_SIZE": 112})  # whose last stage has 4 × 4 tokens
    model = detector(configs, {"KARAT.GRID_SIZE": 1}, base="swin/swin_t_g1b.yaml")
    with caplog.at_level(logging.INFO):
        start(model, save(tmp_path, source))
    block = "backbone.bottom_up.layers.3.blocks.1.attn"
    assert f"{block}.operator.coefficients: 4 × 4 to 7 × 7" in caplog.text
    assert f"{block}.relative_position_bias_table: 7 × 7 to 13 × 13" in caplog.text
    assert "layers.2.blocks.1.attn.operator.coefficients: " not in caplog.text


@pytest.mark.parametrize("sharing", ["universal", "blockwise"])
def test_a_convit_starts_a_vit_of_its_sizes(configs, tmp_path, caplog, sharing):
    source = classifier(CONVIT, SHARING=sharing, GRID_SIZE=2)
    model = detector(configs, CONVIT_DETECTOR, SHARING=sharing)
    with caplog.at_level(logging.INFO):
        net = start(model, save(tmp_path, source)).backbone.net
    assert "Weights of ConViT, with KArAt:" in caplog.text
    for name in {"universal": ["operator"], "blockwise": ["blocks.10.attn.operator", "blocks.11.attn.operator"]}[
        sharing
    ]:
        operator = net.get_submodule(name)
        held = source.get_submodule(name).state_dict()
        expected = resample_operator(held, operator, TokenGrid(7, 7, 1), TokenGrid(14, 14))
        assert all(torch.equal(tensor, expected[key]) for key, tensor in operator.state_dict().items())
    gated = source.blocks[9].attn
    assert torch.equal(net.blocks[9].attn.qkv.weight, torch.cat([gated.qk.weight, gated.v.weight]))
    assert torch.equal(net.blocks[11].attn.qkv.weight, source.blocks[11].attn.qkv.weight)
    assert torch.equal(
        net.pos_embed[:, 1:], resample_tokens(source.pos_embed.detach(), 1, TokenGrid(7, 7), TokenGrid(14, 14))
    )
    assert "ConViT's attention to positions: blocks.0.attn.gating_param" in caplog.text


@pytest.mark.parametrize(
    ("source", "keys", "base", "message"),
    [
        (VIT, {"VIT.DEPTH": 2}, "quickstart.yaml", r"no place in the model:\n  backbone.net.blocks.2.norm1"),
        (VIT, {"VIT.EMBED_DIM": 48}, "quickstart.yaml", r"patch_embed.proj.weight: \(96, 3, 8, 8\) .* \(48, 3, 8, 8\)"),
        (VIT, {"KARAT.GRID_SIZE": 3}, "quickstart.yaml", r"coefficients: \(3, 2, 2, 197, 12\) .* \(3, 2, 3, 196, 12\)"),
        (VIT, {"KARAT.ENABLED": False}, "quickstart.yaml", r"no place in the model:\n  backbone.net.operator.{coeff"),
        (CONVIT, {}, "quickstart.yaml", r"blocks.0.norm1.weight: \(192,\) in the file, \(96,\) in the model"),
        (VIT, {}, "swin/swin_t_g1b.yaml", "The file holds the weights of a ViT, and the model is a Swin"),
        (SWIN, {}, "quickstart.yaml", "The file holds the weights of a Swin, and the model is a ViT"),
    ],
)  # fmt: skip
def test_what_does_not_fit_a_detector_is_refused_by_name(configs, tmp_path, source, keys, base, message):
    model = detector(configs, keys, base=base)
    with pytest.raises(ValueError, match=message):
        start(model, save(tmp_path, classifier(source)))


def test_a_universal_classifier_starts_a_blockwise_detector_as_a_universal_one(configs, tmp_path):
    path = save(tmp_path, classifier(VIT))
    outputs = []
    for sharing in ("universal", "blockwise"):
        net = start(detector(configs, {}, SHARING=sharing), path).backbone.net
        outputs.append(net(images())["last_feat"])
    torch.testing.assert_close(*outputs)


def test_a_converted_classifier_starts_the_same_detector(configs, tmp_path):
    path = save(tmp_path, classifier(VIT))
    converted = str(tmp_path / "converted.safetensors")
    convert_file(path, converted)
    one, other = (start(detector(configs, {}), each) for each in (path, converted))
    assert all(torch.equal(tensor, other.state_dict()[key]) for key, tensor in one.state_dict().items())


@pytest.mark.parametrize("keys", [VIT, CONVIT, SWIN], ids=lambda keys: keys.get("NAME", "vit"))
def test_softmax_weights_of_timm_start_a_karat_classifier(tmp_path, caplog, keys):
    sizes = {
        key.lower(): value for key, value in keys.items() if key not in ("NAME", "KARAT.GRID_SIZE", "KARAT.SHARING")
    }
    source = timm.create_model(keys.get("NAME", "vit_tiny_patch16_224"), pretrained=False, num_classes=5, **sizes)
    model = classifier(keys)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items() if ".operator." in f".{key}"}
    with caplog.at_level(logging.INFO):
        load_weights(model, save(tmp_path, source), complete=False)
    assert "KArAt operators start by MODEL.KARAT.INIT scaled" in caplog.text
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key] if key in before else source.state_dict()[key])


@pytest.mark.parametrize("keys", [VIT, CONVIT, SWIN], ids=lambda keys: keys.get("NAME", "vit"))
def test_a_classifier_starts_one_for_other_classes_and_its_head_is_new(tmp_path, caplog, keys):
    source, model = classifier(keys), classifier(keys, num_classes=7, seed=2)
    head = {key: tensor.clone() for key, tensor in model.state_dict().items() if key.startswith("head.")}
    path = save(tmp_path, source)
    with caplog.at_level(logging.INFO):
        load_weights(model, path, complete=False)
    assert len(head) == 2
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, head[key] if key in head else source.state_dict()[key])
    names = ", ".join(head)
    assert f"the classifier's head, for 5 classes where the model has 7: {names}\n" in caplog.text
    weight = names.partition(",")[0]
    with pytest.raises(ValueError, match=rf"{weight}: \(5, .*\) in the file, \(7, .*\) in the model"):
        load_weights(model, path)


def test_a_classifier_is_evaluated_as_it_was_saved_and_fine_tuned_at_another_size(tmp_path, caplog):
    source, model = classifier(VIT | {"IMG_SIZE": 56}), classifier(VIT | {"IMG_SIZE": 56}, seed=2)
    load_weights(model, save(tmp_path, source))
    assert torch.equal(model(images(56)), source(images(56)))
    larger = classifier(VIT, seed=2)
    with caplog.at_level(logging.INFO):
        load_weights(larger, save(tmp_path, source))
    for key in ("pos_embed", "operator.coefficients", "operator.projector"):
        assert f"{key}: 7 × 7 and a class token to 14 × 14 and a class token" in caplog.text
    assert torch.equal(larger.cls_token, source.cls_token)


def test_a_head_of_another_width_is_no_head_for_other_classes(tmp_path):
    path = save(tmp_path, classifier(VIT | {"EMBED_DIM": 48}))
    with pytest.raises(ValueError, match=r"head.weight: \(5, 48\) in the file, \(7, 96\) in the model"):
        load_weights(classifier(VIT, num_classes=7), path, complete=False)
