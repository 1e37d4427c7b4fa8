"""Every single override starts a run, or is refused by an error that names its key: 500 of them, drawn by a seed."""

import os
import random
import time

import odd_runs
import pytest


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return odd_runs.write_data(tmp_path_factory.mktemp("odd"))


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")


@pytest.mark.parametrize("kind", ["detector", "pretraining"])
def test_the_runs_start_without_an_override(data, tmp_path, kind):
    run = (odd_runs.run_detector, odd_runs.run_pretraining)[kind == "pretraining"]
    run(data[kind == "pretraining"], str(tmp_path / "out"), "SEED", "1")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "draws"), [("detector", 400), ("pretraining", 100)])
def test_an_odd_value_starts_a_run_or_is_refused_by_key(data, tmp_path, kind, draws):
    is_detector = kind == "detector"
    keys = odd_runs.detector_keys() if is_detector else odd_runs.pretraining_keys()
    run, place = (odd_runs.run_detector, data[0]) if is_detector else (odd_runs.run_pretraining, data[1])
    drawn = random.Random(7)
    outcomes = {"started": 0, "refused": 0}
    for number in range(draws):
        key, value = drawn.choice(keys), drawn.choice(odd_runs.VALUES)
        start = time.process_time()
        try:
            run(place, str(tmp_path / f"out{number}"), key, value)
            outcomes["started"] += 1
        except Exception as error:
            assert odd_runs.is_proper(key, error), (key, value, repr(error)[:1000])
            # Before anything large is built.
            assert time.process_time() - start < 5, (key, value)
            outcomes["refused"] += 1
    assert min(outcomes.values()) >= 4, outcomes


@pytest.mark.filterwarnings("ignore")
def test_a_value_near_the_runs_own_starts_it_or_is_refused_by_key(data, tmp_path):
    drawn = random.Random(11)
    values = {key: value for key, value in odd_runs.detector_values().items() if value != odd_runs.nearby(value, drawn)}
    outcomes = {"started": 0, "refused": 0}
    for number, key in enumerate(drawn.sample(sorted(values), 80)):
        value = str(odd_runs.nearby(values[key], drawn))
        try:
            odd_runs.run_detector(data[0], str(tmp_path / f"out{number}"), key, value)
            outcomes["started"] += 1
        except Exception as error:
            assert odd_runs.is_proper(key, error), (key, value, repr(error)[:1000])
            outcomes["refused"] += 1
    assert min(outcomes.values()) >= 16, outcomes


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "-1.0"),
        ("SOLVER.CLIP_GRADIENTS.NORM_TYPE", "-2.0"),
        ("SOLVER.WARMUP_FACTOR", "-1.0"),
        ("SOLVER.WEIGHT_DECAY", "-1.0"),
        ("SOLVER.BASE_LR", "-0.1"),
        ("SOLVER.BASE_LR", "0.0"),
        ("SOLVER.BASE_LR", "inf"),
        ("SOLVER.BASE_LR_END", "-0.1"),
        ("SOLVER.GAMMA", "-0.1"),
        ("SOLVER.EPS", "-1e-6"),
        ("SOLVER.BETAS", "(1.0, 0.999)"),
        ("SOLVER.STEPS", "(2, 1)"),
        ("SOLVER.STEPS", "(-1,)"),
        ("SOLVER.LAYER_DECAY", "-0.5"),
        ("SOLVER.OPERATOR_LR_FACTOR", "-1.0"),
        ("SOLVER.REFERENCE_WORLD_SIZE", "3"),
        ("MODEL.VIT.DROP_PATH_RATE", "-1.0"),
        ("MODEL.VIT.DROP_PATH_RATE", "1.0"),
        ("MODEL.SWIN.DROP_PATH_RATE", "-1.0"),
        ("MODEL.PIXEL_STD", "[0.0, 1.0, 1.0]"),
        ("MODEL.PIXEL_MEAN", "[1.0]"),
        ("MODEL.RPN.LOSS_WEIGHT", "-1.0"),
        ("MODEL.RPN.IOU_THRESHOLDS", "[0.7, 0.3]"),
        ("MODEL.RPN.IOU_LABELS", "[0, 1]"),
        ("MODEL.RPN.NMS_THRESH", "-0.5"),
        ("MODEL.RPN.SMOOTH_L1_BETA", "-1.0"),
        ("MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT", "-1.0"),
        ("MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS", "(0.0, 1.0, 1.0, 1.0)"),
        ("MODEL.ROI_HEADS.POSITIVE_FRACTION", "-0.5"),
        ("MODEL.ROI_HEADS.IOU_THRESHOLDS", "[1.5]"),
        ("MODEL.ANCHOR_GENERATOR.SIZES", "[[-8]]"),
        ("MODEL.ANCHOR_GENERATOR.OFFSET", "1.0"),
        ("MODEL.ANCHOR_GENERATOR.SIZES", "[[8, 8], [16], [32], [64], [128]]"),
        ("MODEL.ROI_HEADS.IN_FEATURES", "['p2', 'p3', 'p4', 'p5', 'p5']"),
        ("INPUT.LSJ_SCALE", "(0.1, 1000.0)"),
        ("INPUT.FORMAT", "YUV-BT.601"),
        ("MODEL.DEVICE", "mps"),
        ("MODEL.DEVICE", "cuda:x"),
        ("MODEL.KEYPOINT_ON", "True"),
        ("MODEL.LOAD_PROPOSALS", "True"),
        ("MODEL.META_ARCHITECTURE", "PanopticFPN"),
        ("TEST.AUG.ENABLED", "True"),
        ("TEST.EXPECTED_RESULTS", "[['bbox', 'AP', 38.5]]"),
        ("SOLVER.MOMENTUM", "0.5"),
        ("MODEL.KARAT.GRID_SIZE", "1000000000"),
        ("MODEL.KARAT.BLOCKS", "[0.0]"),
        ("MODEL.VIT.IMG_SIZE", "1000000000"),
        ("MODEL.ROI_BOX_HEAD.USE_FED_LOSS", "True"),
        ("MODEL.FPN.NORM", "''"),
        ("MODEL.FPN.NORM", "SyncBN"),
        ("DATALOADER.SAMPLER_TRAIN", "RandomSubsetTrainingSampler"),
        ("OUTPUT_DIR", ""),
        ("OUTPUT_DIR", "s3://runs/1"),
        ("OUTPUT_DIR", "x" * 300),
    ],
)
def test_what_cannot_train_is_refused_by_key_and_value(data, tmp_path, key, value):
    with pytest.raises(ValueError) as caught:
        odd_runs.run_detector(data[0], str(tmp_path / "out"), key, value)
    message = str(caught.value)
    assert key.rpartition(".")[2] in message and value.strip("[]()'")[:4] in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (
            {"MODEL.VIT.EMBED_DIM": 65_536, "MODEL.VIT.DEPTH": 90, "MODEL.VIT.NUM_HEADS": 64},
            r"million weights, which take [\d,]+ GB.*EMBED_DIM is 65536",
        ),
        ({"MODEL.ROI_BOX_HEAD.FC_DIM": 65_536, "MODEL.ROI_BOX_HEAD.NUM_FC": 9}, "FC_DIM is 65536"),
        ({"SOLVER.IMS_PER_BATCH": 1_000_000}, r"SOLVER.IMS_PER_BATCH is 1000000: the images of a step"),
    ],
)
def test_what_has_no_room_is_refused_before_it_is_built(data, tmp_path, monkeypatch, opts, message):
    monkeypatch.setattr("karat_det.engine.model_check._memory", lambda cfg: (32e9, "this machine"))
    monkeypatch.setattr(odd_runs, "DETECTOR", odd_runs.DETECTOR | opts)
    start = time.process_time()
    with pytest.raises(ValueError, match=message):
        odd_runs.run_detector(data[0], str(tmp_path / "out"), "SEED", "1")
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("pipe", "JSONS.*it is a named pipe"),
        ("folder", "JSONS.*it is a folder"),
        ("device", "JSONS.*it is a device"),
        ("loop", "JSONS.*it is a loop of links"),
        ("deep", "JSONS.*is not a JSON file: maximum recursion depth"),
        ("a terabyte", "JSONS.*more than there is memory for"),
    ],
)
def test_a_json_that_is_none_is_refused_at_once(data, tmp_path, kind, message):
    path = tmp_path / "odd.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "deep":
        path.write_text("[" * 200_000)
    elif kind == "a terabyte":
        path.touch()
        os.truncate(path, 2**40)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        odd_runs.run_detector(data[0], str(tmp_path / "out"), "KARAT_DATA.JSONS", f"['{path}']")
