import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads import FastRCNNConvFCHead

from karat_det.attention import KArAtAttention, KArAtConfig
from karat_det.attention.window import KArAtSwinWindowAttention
from karat_det.config import add_karat_config
from karat_det.engine.model_check import _OnMeta
from karat_det.engine.setup import check_model_and_datasets, load_cfg, parse_command

ALL_CONFIGS = [
    path
    for path in sorted(Path(__file__).parents[2].joinpath("configs").rglob("*.yaml"))
    if path.parent.name != "pretrain"
]
PAPER = {
    "softmax": (False, None),
    "g1b": (True, "blockwise"),
    "g1u": (True, "universal"),
}


@pytest.mark.parametrize("path", ALL_CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_is_frozen(path):
    cfg = load_cfg(str(path), [])
    assert cfg.is_frozen()
    assert ("cuda" if torch.cuda.is_available() else "cpu") == cfg.MODEL.DEVICE


@pytest.mark.parametrize("start", ["random", "imagenet"])
@pytest.mark.parametrize("variant", PAPER)
def test_the_six_rows_of_the_papers_detection_table(configs, variant, start):
    cfg = load_cfg(str(configs / "paper" / f"vitdet_b_{variant}_{start}.yaml"), [])
    enabled, sharing = PAPER[variant]
    assert enabled == cfg.MODEL.KARAT.ENABLED
    if enabled:
        assert (sharing, 1, "paper") == (cfg.MODEL.KARAT.SHARING, cfg.MODEL.KARAT.GRID_SIZE, cfg.MODEL.KARAT.INIT)
        assert (cfg.MODEL.KARAT.RANK, cfg.MODEL.KARAT.BASE_FUNCTION) == (12, "zero")
    assert bool(cfg.MODEL.WEIGHTS) == (start == "imagenet")
    vit, solver, rpn = cfg.MODEL.VIT, cfg.SOLVER, cfg.MODEL.RPN
    assert (vit.IMG_SIZE, vit.PATCH_SIZE, vit.WINDOW_SIZE, vit.EMBED_DIM, vit.DEPTH) == (224, 16, 14, 768, 12)
    assert vit.WINDOW_BLOCKS == [0, 1, 3, 4, 6, 7, 9, 10]
    assert (solver.IMS_PER_BATCH, solver.MAX_ITER, solver.BASE_LR, solver.WEIGHT_DECAY) == (32, 184375, 1e-4, 0.1)
    assert (round(0.88889 * 184375), round(0.96296 * 184375)) == solver.STEPS
    assert (rpn.PRE_NMS_TOPK_TRAIN, rpn.PRE_NMS_TOPK_TEST) == (12000, 6000)
    assert (rpn.POST_NMS_TOPK_TRAIN, rpn.POST_NMS_TOPK_TEST) == (2000, 1000)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["SOLVER.STEPS=(1,2)", "x"], r"There is no key SOLVER.STEPS=\(1,2\). Key and value are two words here"),
        (["MODEL.KARAT.GRIDSIZE", "3"], r"There is no key MODEL.KARAT.GRIDSIZE. Did you mean MODEL.KARAT.GRID_SIZE"),
        (["MODEL.KARAT", "3"], "There is no key MODEL.KARAT"),
        (["SOLVER.MAX_ITER"], "pairs KEY VALUE; these are 1 words"),
        (["SOLVER.MAX_ITER", "many"], "SOLVER.MAX_ITER"),
    ],
)
def test_overrides_that_do_not_fit_are_named(configs, opts, message):
    with pytest.raises(ValueError, match=message):
        load_cfg(str(configs / "quickstart.yaml"), opts)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("MODEL:\n  KARAT:\n    RNAK: 3\n", "There is no key MODEL.KARAT.RNAK. Did you mean MODEL.KARAT.RANK"),
        ("MODEL: [", "is no config that can be read"),
        ("SOLVER:\n  MAX_ITER: many\n", "SOLVER.MAX_ITER"),
        ("OUTPUT_DIR: !!python/object/apply:os.mkdir [made]\n", "is no config that can be read"),
    ],
)
def test_a_config_file_that_does_not_fit_is_named(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_cfg(str(path), [])
    assert "mine.yaml" in str(caught.value)
    assert not (tmp_path / "made").exists()  # no code was run


def test_a_missing_config_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"--config-file nowhere\.yaml"):
        load_cfg("nowhere.yaml", [])


@pytest.mark.parametrize(
    "words",
    [
        "--config-file ~/a.yaml --resume --num-gpus 0 SEED 3 OUTPUT_DIR x",
        "SEED 3 OUTPUT_DIR x --resume --num-gpus 0 --config-file ~/a.yaml",
        "--num-gpus 0 SEED 3 --resume OUTPUT_DIR x --config-file=~/a.yaml",
    ],
)
def test_options_may_stand_behind_the_overrides(monkeypatch, words):
    monkeypatch.setenv("HOME", "/home/me")
    args = parse_command(default_argument_parser(), words.split())
    assert args.resume and args.num_gpus == 0 and not args.eval_only
    assert args.config_file == "/home/me/a.yaml" and args.opts == ["SEED", "3", "OUTPUT_DIR", "x"]


def test_an_unknown_option_behind_the_overrides_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse_command(default_argument_parser(), ["SEED", "3", "--resum-e"])
    assert "unrecognized arguments: --resum-e" in capsys.readouterr().err
    assert parse_command(default_argument_parser(), ["SOLVER.BASE_LR", "-1e-3"]).opts == ["SOLVER.BASE_LR", "-1e-3"]
    assert parse_command(default_argument_parser(), []).opts == []


def test_the_home_folder_is_put_for_a_tilde(monkeypatch, tmp_path, configs):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.yaml").write_text(
        f"_BASE_: {configs / 'quickstart.yaml'}\nOUTPUT_DIR: ~/out\nMODEL: {{WEIGHTS: ~/start.pth}}\n"
    )
    cfg = load_cfg(str(tmp_path / "own.yaml"), ["DATASETS.PROPOSAL_FILES_TEST", "('~/a.pkl', 'b~.pkl')"])
    assert (f"{tmp_path}/out", f"{tmp_path}/start.pth") == (cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS)
    assert (f"{tmp_path}/a.pkl", "b~.pkl") == cfg.DATASETS.PROPOSAL_FILES_TEST
    # Where no shell has done it.
    assert f"{tmp_path}/out" == load_cfg("~/own.yaml", []).OUTPUT_DIR


# Keys that the comment of the one before is about, too.
EXPLAINED_TOGETHER = [
    *("VIT.DEPTH", "VIT.NUM_HEADS", "VIT.PRETRAIN_USE_CLS_TOKEN", "SWIN.IMG_WIDTH", "SWIN.NUM_HEADS"),
    *("SWIN.PRETRAIN_IMG_SIZE", "SOLVER.EPS", "KARAT_DATA.JSONS", "KARAT_DATA.IMAGE_DIRS", "MODEL.PATCH_SIZE"),
    *("MODEL.EMBED_DIM", "MODEL.DEPTH", "MODEL.NUM_HEADS", "DATA.STD", "DATA.LABEL_COLUMN", "AUG.RATIO"),
    *("AUG.CUTMIX", "AUG.CUTMIX_PROB", "SOLVER.WARMUP_LR", "SOLVER.MIN_LR", "SOLVER.EPS"),
    *("CLIP_GRADIENTS.CLIP_TYPE", "CLIP_GRADIENTS.CLIP_VALUE", "CLIP_GRADIENTS.NORM_TYPE"),
]


def test_every_key_is_explained():
    """Each key follows a comment, or the section that it is the first of, or another key of the same comment."""
    source = Path(add_karat_config.__code__.co_filename).read_text().splitlines()
    unexplained = []
    for number, line in enumerate(source):
        added = re.match(r"\s+(?:cfg|model|solver)\.([A-Z_.]+) = (?!CN\(\)|type)", line)
        before = source[number - 1]
        if before.endswith(" = CN()"):  # The comment of a section is about its first key.
            before = source[number - 2]
        if added and not before.strip().startswith("#"):
            unexplained.append(".".join(added[1].split(".")[-2:]))
    assert unexplained == EXPLAINED_TOGETHER
    for field in fields(KArAtConfig):
        assert f"\n        {field.name}: " in KArAtConfig.__doc__
    cfg = CfgNode({"MODEL": {}, "SOLVER": {}, "INPUT": {}, "TEST": {}})
    add_karat_config(cfg)
    assert set(cfg.MODEL) == {"KARAT", "VIT", "SWIN", "WEIGHTS_STRICT"}


def test_the_cpu_trains_in_float32_unless_told_otherwise(configs):
    path, on_cpu = str(configs / "vitdet_karat.yaml"), ["MODEL.DEVICE", "cpu"]
    assert not load_cfg(path, on_cpu).SOLVER.AMP.ENABLED
    assert load_cfg(path, [*on_cpu, "SOLVER.AMP.ENABLED", "True"]).SOLVER.AMP.ENABLED


# Leaves with another backbone or other heads; the rest differ in their start.
BUILT = [path for path in ALL_CONFIGS if "base" not in path.stem and "imagenet" not in path.stem]


@pytest.mark.parametrize("path", BUILT, ids=lambda path: path.stem)
def test_configs_build_their_model(path):
    cfg = load_cfg(str(path), ["MODEL.DEVICE", "cpu"]).clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"  # the random values of millions of weights take a second
    with _OnMeta():
        model = build_model(cfg)
    attentions = [module for module in model.backbone.modules() if hasattr(module, "qkv")]
    num_karat = (
        0 if not cfg.MODEL.KARAT.ENABLED else 8 if cfg.MODEL.KARAT.GLOBAL_BLOCKS == "softmax" else len(attentions)
    )
    assert sum(isinstance(each, (KArAtAttention, KArAtSwinWindowAttention)) for each in attentions) == num_karat
    operators = {name for name, _ in model.named_parameters() if name.endswith("operator.coefficients")}
    assert len(operators) == (min(1, num_karat) if cfg.MODEL.KARAT.SHARING == "universal" else num_karat)
    box_head = model.roi_heads.box_head
    assert isinstance(box_head, FastRCNNConvFCHead)
    assert (len(box_head.conv_norm_relus), len(box_head.fcs)) == ((2, 1) if path.stem == "quickstart" else (4, 1))
    assert len(model.proposal_generator.rpn_head.conv) == 2


@pytest.mark.parametrize(
    ("key", "value"),
    [("MODEL.BACKBONE.NAME", "build_vitdet"), ("MODEL.FPN.NORM", "LNN"), ("MODEL.ROI_HEADS.NAME", "Heads")],
)
def test_what_detectron2_cannot_build_is_said_before_a_run(configs, key, value):
    cfg = load_cfg(str(configs / "quickstart.yaml"), [key, value])
    with pytest.raises(ValueError, match="The model of this config cannot be built: "):
        check_model_and_datasets(cfg, training=True)
