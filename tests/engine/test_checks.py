import pytest

from karat_det.engine.pretraining import load_pretrain_cfg
from karat_det.engine.setup import load_cfg

# A pretraining that is small enough to be changed in one key.
SMALL = {"SOLVER.IMS_PER_BATCH": 4, "SOLVER.EPOCHS": 3, "SOLVER.WARMUP_EPOCHS": 1}


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["SOLVER.MAX_ITER", "0"], "SOLVER.MAX_ITER is 0. It must be at least 1"),
        (["SOLVER.LAYER_DECAY", "1.5"], "SOLVER.LAYER_DECAY is 1.5"),
        (["SOLVER.CHECKPOINT_MINUTES", "-1"], "SOLVER.CHECKPOINT_MINUTES is -1.0"),
        (["SOLVER.KEEP_CHECKPOINTS", "-1"], "SOLVER.KEEP_CHECKPOINTS is -1"),
        (["SOLVER.ON_DIVERGENCE", "wait"], "ON_DIVERGENCE is 'wait'.*skip_not_finite, skip, rollback, stop"),
        (["SOLVER.SPIKE_FACTOR", "1.0"], "SOLVER.SPIKE_FACTOR is 1.0. It must be above 1"),
        (["SOLVER.MAX_SKIPPED_STEPS", "-1"], "SOLVER.MAX_SKIPPED_STEPS is -1. It must be at least 0"),
        (["SOLVER.MAX_ROLLBACKS", "-1"], "SOLVER.MAX_ROLLBACKS is -1. It must be at least 0"),
        (["SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "sum"], "CLIP_TYPE is 'sum'.*full_model, norm, value"),
        (["SOLVER.LR_SCHEDULER_NAME", "Cosine"], "SOLVER.LR_SCHEDULER_NAME is 'Cosine'.*WarmupCosineLR"),
        (["INPUT.RESIZE", "stretch"], "INPUT.RESIZE is 'stretch'.*'fixed' or 'lsj'"),
        (["INPUT.CROP.ENABLED", "True", "INPUT.CROP.TYPE", "half"], "INPUT.CROP.TYPE is 'half'.*relative_range"),
        (["TEST.BEST_METRIC", "segm/mAP"], "TEST.BEST_METRIC is 'segm/mAP'.*segm/AP"),
        (
            ["MODEL.MASK_ON", "False", "TEST.BEST_METRIC", "segm/AP"],
            "TEST.BEST_METRIC is 'segm/AP'. With MODEL.MASK_ON",
        ),
    ],
)
def test_mistakes_in_a_detector_are_named(configs, opts, message):
    with pytest.raises(ValueError, match=message):
        load_cfg(str(configs / "quickstart.yaml"), opts)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"SOLVER.IMS_PER_BATCH": 3}, r"SOLVER\.IMS_PER_BATCH is 3, .*must be even; or set AUG\.MIX_PROB 0"),
        ({"SOLVER.IMS_PER_BATCH": 0}, r"SOLVER\.IMS_PER_BATCH is 0\. It must be at least 1"),
        ({"SOLVER.WARMUP_EPOCHS": 3}, r"SOLVER\.WARMUP_EPOCHS is 3\. It must be below SOLVER\.EPOCHS, 3"),
        ({"SOLVER.EPOCHS": 0}, r"SOLVER\.EPOCHS is 0\. It must be at least 1"),
        ({"SOLVER.EMA_DECAY": 1.0}, r"SOLVER\.EMA_DECAY is 1\.0\. It must be from 0 to below 1"),
        ({"SOLVER.BASE_LR": 0.0}, r"SOLVER\.BASE_LR is 0\.0\. It must be above 0"),
        ({"AUG.MIX_PROB": 1.5}, r"AUG\.MIX_PROB is 1\.5\. It must be from 0 to 1"),
        ({"DATA.MEAN": "(0.5, 0.5)"}, r"DATA\.MEAN is \(0\.5, 0\.5\)\. It must have a number for each of red, green"),
        ({"DATA.STD": "(0.5, 0.5, 0.0)"}, r"DATA\.STD is .* from 0 to 1, above 0\."),
        ({"AUG.SCALE": "(1.0, 0.5)"}, r"AUG\.SCALE is \(1\.0, 0\.5\)\. It must be \(smallest, largest\)"),
        ({"AUG.RAND_AUGMENT": "m9"}, r"AUG\.RAND_AUGMENT is 'm9'"),
        ({"AUG.RAND_AUGMENT": "rand-x9"}, r"AUG\.RAND_AUGMENT is 'rand-x9'.*Unknown RandAugment config section"),
        ({"AUG.RAND_AUGMENT": "rand-m9.5"}, r"AUG\.RAND_AUGMENT is 'rand-m9\.5'"),
        ({"SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "total"}, r"CLIP_TYPE is 'total'\. Known: full_model, norm, value"),
        ({"TEST.CROP_RATIO": 0.0}, r"TEST\.CROP_RATIO is 0"),
        ({"SEED": -1}, r"SEED is -1\. It must be at least 0"),
    ],
)
def test_mistakes_in_pretraining_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_pretrain_cfg("", [str(word) for pair in (SMALL | overrides).items() for word in pair])
