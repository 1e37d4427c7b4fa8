"""A run of a detector that goes on from a checkpoint is the run that never stopped."""

import itertools
import random
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.utils import comm
from detectron2.utils.events import JSONWriter
from forked import differences, differences_of_checkpoints, in_processes, killed, metrics, workers_ended

from karat_det.checkpoint import run_folder
from karat_det.data.broken_images import TooManyBroken
from karat_det.data.digits import generate_digits
from karat_det.engine.order import SeededImages
from karat_det.engine.setup import load_cfg
from karat_det.engine.trainer import Step, Trainer

SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.VIT.EMBED_DIM": 24,
    "MODEL.VIT.DEPTH": 2,
    "MODEL.VIT.DROP_PATH_RATE": 0.3,
    "MODEL.FPN.OUT_CHANNELS": 8,
    "MODEL.ROI_BOX_HEAD.CONV_DIM": 8,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 8,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 8,
    "INPUT.RANDOM_FLIP": "horizontal",
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": 6,
    "SOLVER.CHECKPOINT_PERIOD": 2,
    "DATASETS.TRAIN": ("eight_digits",),
    "DATASETS.TEST": (),
    "KARAT_DATA.NAMES": ["eight_digits", "three_digits"],
    "SEED": 3,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return generate_digits(tmp_path_factory.mktemp("data"), {"train": 8, "val": 3})


@pytest.fixture
def make_cfg(data, tmp_path, configs):
    def make(folder="out", **overrides):
        (tmp_path / folder).mkdir(exist_ok=True)
        files = {
            "KARAT_DATA.JSONS": [str(data / "annotations" / f"instances_{split}.json") for split in ("train", "val")],
            "KARAT_DATA.IMAGE_DIRS": [str(data / split) for split in ("train", "val")],
            "OUTPUT_DIR": tmp_path / folder,
        }
        keys = SMALL | files | overrides
        words = [str(word) for pair in keys.items() for word in pair]
        return load_cfg(str(configs / "quickstart.yaml"), words)

    return make


def start(cfg, resume=False):
    torch.manual_seed(0)
    trainer = Trainer(cfg)
    # Whatever the generators' states are.
    seed = 1 if resume else 2
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
    trainer.resume_or_load(resume)
    return trainer


def train(cfg, resume=False, until=None):
    """Trains from the start or from the last checkpoint, until a step has been done or to the end."""
    return run(start(cfg, resume), until)


def run(trainer, until):
    after_step = trainer.after_step

    def stop():
        after_step()
        if trainer.iter == until:
            raise KeyboardInterrupt

    trainer.after_step = stop
    try:
        with workers_ended(trainer._trainer):
            trainer.train()
    except KeyboardInterrupt:
        assert trainer.iter == until
    return trainer


def saved(cfg, name="model_final"):
    return torch.load(Path(cfg.OUTPUT_DIR) / f"{name}.pth", weights_only=True)


def test_stopped_anywhere_it_ends_as_the_unbroken_run_with_any_workers(make_cfg):
    cfg = make_cfg()
    train(cfg)
    other = make_cfg("other")
    # Before the first checkpoint, one step behind one, at one.
    train(other, until=0)
    train(other, until=2)
    train(make_cfg("other", **{"DATALOADER.NUM_WORKERS": 2}), resume=True, until=3)
    train(other, resume=True)
    final = saved(cfg)
    assert final["trainer"]["_trainer"]["order"] == {"seed": 3, "place": 12, "images": 8}
    assert not differences(final, saved(other))
    train(make_cfg("third", SEED=4))
    assert differences(final["model"], saved(make_cfg("third"))["model"])


def test_killed_while_it_steps_saves_evaluates_or_writes_it_leaves_what_the_unbroken_run_leaves(make_cfg):
    keys = {
        **{"SOLVER.MAX_ITER": 25, "SOLVER.CHECKPOINT_PERIOD": 5, "TEST.EVAL_PERIOD": 10},
        **{"DATASETS.TEST": ("three_digits",), "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0},
    }
    cfg, other = make_cfg(**keys), make_cfg("other", **keys)
    train(cfg)
    killed(partial(start, other), Step, "run_step", 3)
    goes_on = partial(start, other, resume=True)
    killed(goes_on, Step, "run_step", 7)
    killed(goes_on, Trainer, "test", 9)
    killed(goes_on, JSONWriter, "write", 19)
    killed(goes_on, run_folder, "write_whole", 24)
    killed(goes_on, Trainer, "test", 25)
    train(other, resume=True)
    assert [line["iteration"] for line in metrics(cfg.OUTPUT_DIR)] == ["19", "24", "25"]
    assert metrics(other.OUTPUT_DIR) == metrics(cfg.OUTPUT_DIR)
    assert not differences_of_checkpoints(cfg.OUTPUT_DIR, other.OUTPUT_DIR)


def test_killed_in_its_only_evaluation_it_leaves_the_best_checkpoint_of_the_unbroken_run(make_cfg):
    keys = {"SOLVER.MAX_ITER": 2, "DATASETS.TEST": ("three_digits",), "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0}
    cfg, other = make_cfg(**keys), make_cfg("other", **keys)
    train(cfg)
    killed(partial(start, other), Trainer, "test", 2)
    train(other, resume=True)
    assert saved(cfg, "model_best") and metrics(other.OUTPUT_DIR) == metrics(cfg.OUTPUT_DIR)
    assert not differences_of_checkpoints(cfg.OUTPUT_DIR, other.OUTPUT_DIR)


def test_an_error_costs_no_step(make_cfg, caplog):
    cfg, other = make_cfg(), make_cfg("other")
    train(cfg)
    period = {"SOLVER.CHECKPOINT_PERIOD": 100}
    for workers, owner, iteration, error in (
        (0, GeneralizedRCNN, 0, MemoryError()),
        (0, GeneralizedRCNN, 2, MemoryError()),
        (2, SeededImages, 3, TooManyBroken("Image 7 is broken.")),
        (0, SeededImages, 5, TooManyBroken("Image 7 is broken.")),
    ):
        overrides = period | {"DATALOADER.NUM_WORKERS": workers}
        assert type(error).__name__ in failed(make_cfg("other", **overrides), iteration > 0, owner, iteration, error)
        if iteration:
            left = saved(other, "model_last")["trainer"]
            assert left["iteration"] == left["_trainer"]["iteration"] == iteration - 1
            assert left["_trainer"]["order"]["place"] == 2 * iteration
    assert "Traceback" not in caplog.text
    # What is the program's fault keeps its trace, and costs no step either.
    failed(make_cfg("other", **period), True, GeneralizedRCNN, 5, TypeError("unsupported"))
    assert "Traceback" in caplog.text and saved(other, "model_last")["iteration"] == 4
    train(other, resume=True)
    assert not differences(saved(cfg), saved(other))
    # Where a run ends early it writes a line more.
    assert metrics(cfg.OUTPUT_DIR) == metrics(other.OUTPUT_DIR)[-1:]


def test_images_that_one_of_two_processes_lacks_cost_no_step(make_cfg, tmp_path):
    def failed_in_two(folder, iteration, resume=False):
        meeting = tmp_path / f"{folder}_{iteration}"
        meeting.mkdir()
        error = TooManyBroken("Image 7 is broken.")
        return in_processes(meeting, 2, failed, make_cfg(folder), resume, SeededImages, iteration, error)

    assert failed_in_two("two", 99) == ["", ""]
    told = failed_in_two("again", 3)
    assert told[0] == "TooManyBroken: Image 7 is broken." and told[1].startswith("RunFailed: Another process")
    assert saved(make_cfg("again"), "model_last")["iteration"] == 2
    assert failed_in_two("again", 99, resume=True) == ["", ""]
    assert not differences(saved(make_cfg("two")), saved(make_cfg("again")))


def failed(cfg, resume, owner, iteration, error):
    """Trains, where a method of a model, or of the images, raises an error in an iteration. Returns what is raised."""
    trainer, name = start(cfg, resume), "forward" if owner is GeneralizedRCNN else "__getitem__"
    method = getattr(owner, name)

    def fail(self, argument):
        # The first image of a step is that of the first process.
        if argument == 2 * iteration if name == "__getitem__" else trainer.iter == iteration:
            raise error
        return method(self, argument)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, fail)
        try:
            with workers_ended(trainer._trainer):
                trainer.train()
        except Exception as raised:
            return f"{type(raised).__name__}: {raised}"
    return ""


def test_two_processes_go_on_bitwise_and_through_the_order_of_one(make_cfg, tmp_path):
    def taken_by(folder, *parts, processes=2):
        images = {}
        for resume, until, overrides in parts:
            meeting = tmp_path / f"{folder}_{resume}_{until}"
            meeting.mkdir()
            cfg = make_cfg(folder, **overrides)
            for taken in in_processes(meeting, processes, train_and_tell_images, cfg, resume, until):
                images |= taken
        return images

    workers = {"DATALOADER.NUM_WORKERS": 1}
    images = taken_by("two", (False, None, {}))
    assert sorted(images) == list(range(12)) and len({images[place][0] for place in range(8)}) == 8
    # Flipped or not.
    assert len(set(images.values())) > 8
    assert taken_by("again", (False, 3, workers), (True, None, {})) == images
    assert not differences(saved(make_cfg("two")), saved(make_cfg("again")))
    # RetinaNet divides its losses by a mean over the steps before, which each process has of its own.
    retina = {"MODEL.META_ARCHITECTURE": "RetinaNet", "MODEL.MASK_ON": False, "MODEL.RETINANET.NUM_CLASSES": 10}
    retina |= {"MODEL.RETINANET.IN_FEATURES": ["p2", "p3", "p4"], "SOLVER.BASE_LR": 1e-4}
    taken_by("retina", (False, None, retina))
    taken_by("retina_again", (False, 3, retina), (True, None, retina))
    assert len(saved(make_cfg("retina"))["trainer"]["_trainer"]["loss_normalizers"]) == 2
    assert not differences(saved(make_cfg("retina")), saved(make_cfg("retina_again")))
    # One process takes over, and then with larger steps.
    larger = {"SOLVER.IMS_PER_BATCH": 4, "SOLVER.MAX_ITER": 5}
    mixed = taken_by("mixed", (False, 1, {}))
    mixed |= taken_by("mixed", (True, 3, {}), (True, None, larger), processes=1)
    assert mixed == images


def train_and_tell_images(cfg, resume, until):
    """Trains. Returns which image, and how flipped, this process has had at which place of the order."""
    trainer, images = start(cfg, resume), {}
    order, loader = trainer._trainer.data_loader.order, trainer._trainer.data_loader.loader

    def noted():
        rank, world_size = comm.get_rank(), comm.get_world_size()
        for step, batch in enumerate(loader):
            first = order_at_start + step * cfg.SOLVER.IMS_PER_BATCH + rank
            for place, record in zip(itertools.count(first, world_size), batch, strict=False):
                images[place] = record["image_id"], int(record["image"][:, :, :9].sum())
            yield batch

    order_at_start, trainer._trainer.data_loader.loader = order.place, noted()
    run(trainer, until)
    return images


def rates(trainer):
    """(learning rate, weight decay) of each parameter, by name."""
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    return {
        names[parameter]: (group["lr"], group["weight_decay"])
        for group in trainer._trainer.optimizer.param_groups
        for parameter in group["params"]
    }


def test_a_resumed_run_has_the_settings_of_its_config(make_cfg):
    first = make_cfg()
    train(first, until=3)
    averages = saved(first, "model_0000003")["trainer"]["_trainer"]["optimizer"]["state"]
    # Other rates, other groups of parameters and another schedule.
    changes = {
        **{"SOLVER.BASE_LR": 0.02, "SOLVER.WEIGHT_DECAY": 0.0, "SOLVER.LAYER_DECAY": 0.5, "SOLVER.MAX_ITER": 8},
        **{"SOLVER.IMS_PER_BATCH": 4, "SOLVER.OPERATOR_LR_FACTOR": 3.0},
    }
    resumed = start(make_cfg(**changes), resume=True)
    seen = []
    before_step = resumed.before_step

    def note():
        before_step()
        seen.append((rates(resumed), resumed._trainer.data_loader.order.place))

    resumed.before_step = note
    new, old = resumed._trainer.optimizer.state_dict()["state"], averages
    assert {tuple(state["exp_avg"].flatten().tolist()) for state in new.values()} == {
        tuple(state["exp_avg"].flatten().tolist()) for state in old.values()
    }
    resumed.train()
    assert [place for _, place in seen] == [8, 12, 16, 20]
    # A run that has had these settings from the start, at the same iteration.
    fresh = start(make_cfg("fresh", **changes))
    steps = []
    fresh.before_step = lambda: steps.append(rates(fresh))
    fresh.run_step = fresh._trainer.optimizer.step
    fresh.train()
    assert [rate for rate, _ in seen] == steps[4:]


def test_what_cannot_be_resumed_is_refused_by_name(make_cfg):
    cfg = make_cfg()
    train(cfg)
    with pytest.raises(ValueError, match=r"model_final\.pth: SOLVER\.MAX_ITER is 5, and the run has had 6 iterations"):
        start(make_cfg(**{"SOLVER.MAX_ITER": 5}), resume=True)
    path, checkpoint = Path(cfg.OUTPUT_DIR) / "model_final.pth", saved(cfg)

    def refused(match, **changes):
        torch.save({key: value for key, value in {**checkpoint, **changes}.items() if value is not None}, path)
        with pytest.raises(ValueError, match=match):
            start(cfg, resume=True)

    run = checkpoint["trainer"]
    refused(r"model_final\.pth holds weights and no state of a run, so no run can be resumed from it", trainer=None)
    refused(r"model_final\.pth: It holds no state of a run to resume", trainer={"iteration": 3})
    refused(r"model_final\.pth: It holds no state of a run to resume", trainer=[3])
    refused(r"last iteration is 'six', which is none", trainer={**run, "iteration": "six"})
    refused(r"place in the order of images is None", trainer={**run, "_trainer": {**run["_trainer"], "order": None}})
    refused(r"optimizer's state is none", trainer={**run, "_trainer": {**run["_trainer"], "optimizer": None}})
