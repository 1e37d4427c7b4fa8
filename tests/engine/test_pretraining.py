import copy
import itertools
import json
import math
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import JSONWriter
from forked import differences_of_checkpoints, killed, metrics, workers_ended
from PIL import Image
from timm.data.auto_augment import RandAugment

from karat_det.checkpoint.loading import load_weights
from karat_det.checkpoint.resampling import TokenGrid, resample_operator
from karat_det.engine.hooks import Interval
from karat_det.engine.order import SeededImages
from karat_det.engine.pretraining import Pretrainer, evaluate, evaluate_file, load_pretrain_cfg
from karat_det.engine.pretraining_builders import WithLoss, build_optimizer, build_scheduler
from karat_det.engine.setup import load_cfg

SMALL = {
    "MODEL.IMG_SIZE": 16,
    "MODEL.PATCH_SIZE": 8,
    "MODEL.EMBED_DIM": 12,
    "MODEL.DEPTH": 2,
    "MODEL.NUM_HEADS": 2,
    "MODEL.DROP_PATH_RATE": 0.2,
    "MODEL.KARAT.RANK": 3,
    "MODEL.DEVICE": "cpu",
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 4,
    "SOLVER.EPOCHS": 3,
    "SOLVER.WARMUP_EPOCHS": 1,
    "SOLVER.BASE_LR": 0.1,
    "SOLVER.EMA_DECAY": 0.9,
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A folder of dark and bright images: 9 to train on, 5 to validate on."""
    root = tmp_path_factory.mktemp("tree")
    rng = np.random.default_rng(0)
    for split, counts in (("train", (5, 4)), ("val", (3, 2))):
        for name, count in zip(("bright", "dark"), counts, strict=True):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(128, size=(20, 20, 3)) + 128 * (name == "bright")
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture
def make_cfg(tree, tmp_path):
    def make(**overrides):
        keys = SMALL | {"OUTPUT_DIR": str(tmp_path / "out")} | overrides
        return load_pretrain_cfg("", [str(word) for pair in keys.items() for word in pair], str(tree))

    return make


def train(cfg, **arguments):
    trainer = Pretrainer(cfg, **arguments)
    with workers_ended(trainer.step):
        trainer.train()
    return trainer


def saved(cfg, name="model_last"):
    return torch.load(f"{cfg.OUTPUT_DIR}/{name}.pth", weights_only=True)


def equal(a, b):
    """Whether two nested containers of tensors and numbers are the same, bit by bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def train_until(cfg, step, save=True, **arguments):
    """Trains until a step has been done, and then saves the run if asked to."""
    trainer = Pretrainer(cfg, **arguments)
    after_step = trainer.after_step

    def stop():
        after_step()
        if trainer.iter == step:
            if save:
                trainer.save("model_last", {})
            raise KeyboardInterrupt

    trainer.after_step = stop
    with workers_ended(trainer.step), pytest.raises(KeyboardInterrupt):
        trainer.train()


@pytest.mark.parametrize(("workers", "others"), [(0, 2), (2, 0)])
def test_a_resumed_run_is_the_uninterrupted_one(make_cfg, tmp_path, workers, others):
    cfg = make_cfg(**{"DATALOADER.NUM_WORKERS": workers})
    train(cfg)
    other = make_cfg(**{"DATALOADER.NUM_WORKERS": workers, "OUTPUT_DIR": tmp_path / "other"})
    # In the first epoch; in the third, where the end of the second was saved last.
    train_until(other, 0)
    train_until(other, 4, save=False, resume=True)
    assert saved(other)["epoch"] == 2
    # Whatever was drawn in the meantime, and with other workers.
    torch.rand(7), np.random.rand(7)
    train(make_cfg(**{"DATALOADER.NUM_WORKERS": others, "OUTPUT_DIR": tmp_path / "other"}), resume=True)
    a, b = saved(cfg), saved(other)
    assert a.pop("config") != b.pop("config")
    assert a["epoch"] == 3 and a["trainer"]["iteration"] == 5
    assert equal(a, b)
    # And something was learned from one epoch to the next.
    assert not equal(saved(cfg, "model_best"), {}) and a["model"].keys() == a["model_ema"].keys()


def test_killed_while_it_steps_evaluates_or_writes_it_leaves_what_the_unbroken_run_leaves(make_cfg, tmp_path):
    cfg, other = make_cfg(), make_cfg(OUTPUT_DIR=tmp_path / "other")
    train(cfg)
    goes_on = partial(Pretrainer, other, resume=True)
    killed(goes_on, Pretrainer, "run_step", 1)
    killed(goes_on, Pretrainer, "evaluate", 1)
    killed(goes_on, Pretrainer, "run_step", 3)
    killed(goes_on, JSONWriter, "write", 3)
    killed(goes_on, Pretrainer, "evaluate", 5)
    train(other, resume=True)
    assert [line["iteration"] for line in metrics(cfg.OUTPUT_DIR)] == ["1", "3", "5"]
    assert metrics(tmp_path / "other") == metrics(cfg.OUTPUT_DIR)
    assert not differences_of_checkpoints(cfg.OUTPUT_DIR, tmp_path / "other")


def test_a_run_is_saved_by_time_within_an_epoch(make_cfg, monkeypatch):
    cfg = make_cfg(**{"SOLVER.CHECKPOINT_MINUTES": 1e-9})
    steps, save = [], Pretrainer.save
    monkeypatch.setattr(Interval, "begin", lambda self, took: setattr(self, "due_at", 0.0))
    monkeypatch.setattr(Pretrainer, "save", lambda self, *what: (steps.append(self.iter), save(self, *what)))
    train(cfg)
    assert set(steps) == set(range(6))


@pytest.mark.parametrize("error", [MemoryError(), OSError("The disk is gone.")])
def test_an_error_costs_no_step(make_cfg, tmp_path, monkeypatch, caplog, error):
    cfg, other = make_cfg(), make_cfg(OUTPUT_DIR=tmp_path / "other")
    train(cfg)
    failing, owner = Pretrainer(other), WithLoss if isinstance(error, MemoryError) else SeededImages
    method, name = (WithLoss.forward, "forward") if owner is WithLoss else (SeededImages.__getitem__, "__getitem__")

    def fail(self, argument):
        if failing.iter == 3:
            raise error
        return method(self, argument)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        with pytest.raises(type(error)):
            failing.train()
    # Within the second epoch.
    assert saved(other)["trainer"]["iteration"] == 2 and saved(other)["epoch"] == 1
    assert "Traceback" not in caplog.text
    train(other, resume=True)
    # Where a run ends early it writes a line more.
    assert [line for line in metrics(tmp_path / "other") if line["iteration"] != "2"] == metrics(cfg.OUTPUT_DIR)
    assert not differences_of_checkpoints(cfg.OUTPUT_DIR, tmp_path / "other")


def test_steps_of_another_size_go_on_at_the_same_image(make_cfg, caplog):
    cfg = make_cfg(**{"AUG.MIX_PROB": 0.0})
    every = list(itertools.islice(iter(Pretrainer(cfg).loader), 4))
    train_until(cfg, 2)
    caplog.set_level("INFO")
    # Of 9 images an epoch has 2 steps of 4, or 4 of 2: one is left out. The second epoch goes on with its second half.
    resumed = Pretrainer(make_cfg(**{"AUG.MIX_PROB": 0.0, "SOLVER.IMS_PER_BATCH": 2}), resume=True)
    assert resumed.start_iter == 6 and "Going on after epoch 1 and 2 of 4 steps." in caplog.text
    assert {group["initial_lr"] for group in resumed.step.optimizer.param_groups} == {0.1 * 2 / 512}
    halves = [images for images, _ in itertools.islice(iter(resumed.loader), 2)]
    assert torch.equal(torch.cat(halves), every[3][0])
    resumed.train()
    assert saved(cfg)["epoch"] == 3 and saved(cfg)["trainer"]["iteration"] == 11


def test_epochs_differ_in_order_and_seeds_in_weights(make_cfg, tmp_path):
    first = Pretrainer(make_cfg())
    batches = iter(first.loader)
    epochs = [[next(batches)[0] for _ in range(first.epoch_length)] for _ in range(2)]
    assert not torch.equal(epochs[0][0], epochs[1][0])
    second = Pretrainer(make_cfg(SEED=1))
    assert not equal(first.model.state_dict(), second.model.state_dict())
    assert equal(first.model.state_dict(), Pretrainer(make_cfg()).model.state_dict())


def test_a_checkpoint_holds_what_a_detector_and_a_card_need(make_cfg):
    cfg = make_cfg()
    train(cfg)
    best, last = saved(cfg, "model_best"), saved(cfg)
    assert {"model", "model_ema", "token_grids", "config", "epoch", "figures", "classes"} <= last.keys()
    assert last["classes"] == ["bright", "dark"] and last["config"] == cfg.dump()
    assert last["figures"].keys() == {"top-1", "top-5", "val_loss"}
    assert not equal(last["model"], last["model_ema"])
    lines = [json.loads(line) for line in Path(cfg.OUTPUT_DIR, "metrics.json").read_text().splitlines()]
    measured = {line["iteration"]: line["top-1"] for line in lines if "top-1" in line}
    assert measured.keys() == {1, 3, 5}
    # The first of the best.
    assert best["figures"]["top-1"] == max(measured.values())
    assert best["trainer"]["iteration"] == min(i for i, top in measured.items() if top == max(measured.values()))
    assert {"lr", "grad_norm", "total_loss", "images/s"} <= {key for line in lines for key in line}


def test_the_evaluation_of_a_file_is_that_of_the_run(make_cfg):
    cfg = make_cfg()
    trainer = train(cfg)
    assert evaluate_file(cfg, f"{cfg.OUTPUT_DIR}/model_last.pth") == trainer.evaluate() == saved(cfg)["figures"]
    assert evaluate_file(cfg) == saved(cfg, "model_best")["figures"]


def test_other_classes_of_the_same_number_are_refused(make_cfg, tree, tmp_path):
    trainer = train(make_cfg())
    folder = trainer.cfg.OUTPUT_DIR
    renamed = shutil.copytree(tree, tmp_path / "renamed")
    for split in ("train", "val"):
        (renamed / split / "dark").rename(renamed / split / "dim")
    other = make_cfg(**{"SOLVER.EPOCHS": 4})
    other.defrost()
    other.DATA.ROOT = str(renamed)
    message = r"was trained on other classes: number 1 is 'dark' there and 'dim' in the data"
    with pytest.raises(ValueError, match=rf"The run in OUTPUT_DIR, {folder}, {message}"):
        Pretrainer(other, resume=True)
    with pytest.raises(ValueError, match=rf"model_best\.pth {message}"):
        evaluate_file(other)
    # Weights to start from may be of any classes.
    other.OUTPUT_DIR = str(tmp_path / "transfer")
    Pretrainer(other, f"{folder}/model_best.pth")


def test_fine_tuning_leaves_a_head_for_other_classes_at_its_start(make_cfg, tmp_path, tree, caplog):
    cfg = make_cfg()
    train(cfg)
    (tmp_path / "more").mkdir()
    for split in ("train", "val"):
        for name in ("bright", "dark", "third"):
            (tmp_path / "more" / split).mkdir(exist_ok=True)
            source = tree / split / ("dark" if name == "third" else name)
            (tmp_path / "more" / split / name).symlink_to(source)
    fresh = make_cfg(**{"DATA.ROOT": tmp_path / "more", "OUTPUT_DIR": tmp_path / "fine"})
    fresh.defrost()
    fresh.DATA.ROOT = str(tmp_path / "more")
    caplog.set_level("INFO")
    tuned = Pretrainer(fresh, init_from=f"{cfg.OUTPUT_DIR}/model_best.pth")
    start = Pretrainer(fresh).model.state_dict()
    averaged = saved(cfg, "model_best")["model_ema"]
    for key, tensor in tuned.model.state_dict().items():
        assert torch.equal(tensor, start[key] if key.startswith("head.") else averaged[key]), key
    # What is averaged and trained starts from the same.
    assert equal(tuned.ema.module.state_dict(), tuned.model.state_dict())
    assert "the classifier's head, for 2 classes where the model has 3" in caplog.text


def test_weights_that_do_not_fit_are_refused(make_cfg, tmp_path):
    cfg = make_cfg()
    train(cfg)
    best = f"{cfg.OUTPUT_DIR}/model_best.pth"
    wider = {"MODEL.EMBED_DIM": 24, "OUTPUT_DIR": tmp_path / "other"}
    with pytest.raises(ValueError, match=r"do not fit the model.*another shape"):
        Pretrainer(make_cfg(**wider), init_from=best)
    with pytest.raises(ValueError, match=r"do not fit the model.*another shape"):
        Pretrainer(make_cfg(**wider | {"OUTPUT_DIR": cfg.OUTPUT_DIR}), resume=True)
    with pytest.raises(ValueError, match="model is a Swin"):
        keys = {"MODEL.NAME": "swin_tiny_patch4_window7_224", "MODEL.IMG_SIZE": 224, "MODEL.PATCH_SIZE": 4}
        keys |= {f"MODEL.{key}": None for key in ("EMBED_DIM", "DEPTH", "NUM_HEADS")} | {"MODEL.KARAT.ENABLED": False}
        Pretrainer(make_cfg(**keys, OUTPUT_DIR=tmp_path / "other"), init_from=best)
    with pytest.raises(ValueError, match=r"SOLVER\.EPOCHS is 2, and the run in .* has had 3 epochs already"):
        Pretrainer(make_cfg(**{"SOLVER.EPOCHS": 2}), resume=True)
    no_average = make_cfg(**{"SOLVER.EMA_DECAY": 0.0, "OUTPUT_DIR": tmp_path / "plain"})
    train(no_average)
    assert "model_ema" not in saved(no_average)
    with pytest.raises(ValueError, match=r"EMA_DECAY is 0\.9, but .* has averaged no weights"):
        Pretrainer(make_cfg(OUTPUT_DIR=tmp_path / "plain"), resume=True)


def test_a_checkpoint_without_a_part_of_the_runs_state_is_refused(make_cfg):
    cfg = make_cfg(**{"SOLVER.EPOCHS": 2})
    train(cfg)
    whole = saved(cfg)

    def refused(message, without=(), **changes):
        kept = {key: value for key, value in {**whole, **changes}.items() if key not in without}
        torch.save(kept, f"{cfg.OUTPUT_DIR}/model_last.pth")
        with pytest.raises(ValueError, match=message):
            Pretrainer(cfg, resume=True)

    run, step = whole["trainer"], whole["trainer"]["step"]
    refused("holds weights and no state of a run", without=["trainer"])
    refused("lacks model_ema, so no run can be resumed from it", without=["model_ema"])
    refused(r"The checkpoint in OUTPUT_DIR, .* holds no state of a run to resume \(KeyError", without=["averages"])
    refused(r"holds no state of a run to resume \(TypeError", classes=3)
    refused("last iteration is -3", trainer={**run, "iteration": -3})
    refused("could not convert", trainer={**run, "hooks": {"_AfterEpoch": {"best": "good", "figures": {}}}})
    refused("has trained on 8 images", trainer={**run, "step": {**step, "order": {**step["order"], "images": 8}}})
    refused("optimizer's state is none", trainer={**run, "step": {**step, "optimizer": {}}})
    refused(
        r"has had 1e\+11 epochs", trainer={**run, "step": {**step, "order": {**step["order"], "place": 9 * 10**11}}}
    )


def test_a_finished_run_does_nothing_and_goes_on_with_more_epochs(make_cfg, caplog):
    cfg = make_cfg()
    train(cfg)
    before = saved(cfg)
    caplog.set_level("INFO")
    train(cfg, resume=True)
    assert "has had all of its 3 epochs" in caplog.text and equal(saved(cfg), before)
    train(make_cfg(**{"SOLVER.EPOCHS": 4}), resume=True)
    assert saved(cfg)["epoch"] == 4


def test_weights_that_are_no_numbers_stop_the_run_and_keep_the_checkpoint(make_cfg):
    cfg = make_cfg()
    trainer = Pretrainer(cfg)
    before_step = trainer.before_step

    def poison():
        before_step()
        if trainer.iter == 3:
            trainer.model.head.bias.data.fill_(math.nan)

    trainer.before_step = poison
    with pytest.raises(FloatingPointError, match=r"diverged at iteration 3\. The loss is not finite"):
        trainer.train()
    last = saved(cfg)
    assert last["epoch"] == 1 and all(tensor.isfinite().all() for tensor in last["model"].values())


def test_a_rollback_takes_weights_averages_and_the_optimisers_state_back(make_cfg, caplog):
    cfg = make_cfg(**{"SOLVER.ON_DIVERGENCE": "rollback", "SOLVER.EPOCHS": 2})
    trainer = Pretrainer(cfg)
    run_step, compared = trainer.run_step, []

    def poison():
        if trainer.iter != 3:
            return run_step()
        last = saved(cfg)  # of iteration 1
        trainer.model.head.bias.data.fill_(math.nan)
        run_step()
        assert equal(trainer.model.state_dict(), last["model"])
        assert equal(trainer.ema.module.state_dict(), last["model_ema"])
        state = trainer.step.state_dict()
        assert equal(state["optimizer"]["state"], last["trainer"]["step"]["optimizer"]["state"])
        assert state["order"]["place"] > last["trainer"]["step"]["order"]["place"]
        compared.append(state["divergence"]["rollbacks"])

    trainer.run_step = poison
    trainer.train()
    assert compared == [1] and "Rolled back to the weights of" in caplog.text
    assert saved(cfg)["epoch"] == 2 and saved(cfg)["trainer"]["step"]["divergence"]["rollbacks"] == 1


def test_the_rate_is_that_of_the_batch_and_follows_a_cosine_after_the_warm_up(make_cfg):
    cfg = make_cfg(**{"SOLVER.BASE_LR": 0.0005, "SOLVER.IMS_PER_BATCH": 128, "SOLVER.EPOCHS": 10})
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.0005 * 128 / 512)
    scheduler = build_scheduler(cfg, optimizer, epoch_length=10)
    rates = []
    for step in range(100):
        scheduler.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(1e-6) and rates[10] == pytest.approx(1.25e-4, rel=0.05)
    assert rates[5] == pytest.approx((1e-6 + 1.25e-4) / 2)
    assert rates[50] == pytest.approx((1e-5 + 1.25e-4) / 2) and rates[99] == pytest.approx(1e-5, rel=0.1)
    model = Pretrainer(make_cfg()).model
    assert {group["lr"] for group in build_optimizer(cfg, model).param_groups} == {1.25e-4}


def test_operators_norms_biases_and_positions_have_no_weight_decay(make_cfg):
    cfg = make_cfg()
    model = Pretrainer(cfg).model
    spared = {
        id(parameter)
        for group in build_optimizer(cfg, model).param_groups
        for parameter in group["params"]
        if not group["weight_decay"]
    }
    names = {name for name, parameter in model.named_parameters() if id(parameter) in spared}
    assert {"operator.coefficients", "pos_embed", "cls_token", "norm.weight", "blocks.0.attn.qkv.bias"} <= names
    assert not {"operator.projector", "blocks.0.attn.qkv.weight", "head.weight", "patch_embed.proj.weight"} & names


def test_top_1_and_top_5_count_each_image_once():
    logits = torch.eye(10)[[3, 4, 5, 6]] + torch.linspace(0, 0.1, 10)
    # Right; among five; not among five; not to be counted.
    labels = torch.tensor([3, 9, 0, -1])
    batches = [(logits[:3], labels[:3]), (logits[3:], labels[3:])]
    figures = evaluate(torch.nn.Identity(), batches, {"device_type": "cpu", "enabled": False})
    assert figures["top-1"] == pytest.approx(100 / 3) and figures["top-5"] == pytest.approx(200 / 3)
    expected = torch.nn.functional.cross_entropy(logits[:3], labels[:3]).item()
    assert figures["val_loss"] == pytest.approx(expected, rel=1e-5)


def test_unknown_keys_are_named(make_cfg):
    with pytest.raises(ValueError, match=r"There is no key SOLVER\.EPOCH\. Did you mean SOLVER\.EPOCHS"):
        make_cfg(**{"SOLVER.EPOCH": 3})
    with pytest.raises(ValueError, match=r"There is no key MODEL\.VIT\.DEPTH"):
        make_cfg(**{"MODEL.VIT.DEPTH": 3})


def test_too_few_images_for_one_step(make_cfg):
    with pytest.raises(ValueError, match=r"IMS_PER_BATCH is 64, and .*train has 9 images: too few"):
        Pretrainer(make_cfg(**{"SOLVER.IMS_PER_BATCH": 64}))


def test_the_papers_augmentation_never_asks_for_what_pillow_refuses(make_cfg):
    operations = [
        operation
        for transform in Pretrainer(make_cfg()).images[0].transform.transforms
        if isinstance(transform, RandAugment)
        for operation in transform.ops
    ]
    assert len(operations) > 10
    image = Image.new("RGB", (16, 16), (200, 100, 50))
    for operation in operations:
        operation.prob = 1.0
        operation(image)


def test_without_mixing_the_labels_are_smoothed(make_cfg):
    trainer = Pretrainer(make_cfg(**{"AUG.MIX_PROB": 0.0}))
    images, labels = next(iter(trainer.loader))
    assert labels.dtype == torch.int64
    with_loss = copy.deepcopy(trainer.step.model).eval()
    expected = torch.nn.functional.cross_entropy(with_loss.model(images), labels, label_smoothing=0.1)
    assert with_loss((images, labels))["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    _, mixed = next(iter(Pretrainer(make_cfg()).loader))
    assert mixed.shape == (4, 2) and torch.allclose(mixed.sum(dim=1), torch.ones(4))


def test_bfloat16_trains_on_the_cpu_if_asked(make_cfg):
    assert not make_cfg().SOLVER.AMP.ENABLED
    cfg = make_cfg(**{"SOLVER.AMP.ENABLED": True, "SOLVER.EPOCHS": 2})
    trainer = train(cfg)
    assert trainer.step.autocast == {"device_type": "cpu", "dtype": torch.bfloat16, "enabled": True}
    model = saved(cfg)["model"]
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in model.values())


def test_a_detector_starts_from_the_averaged_weights(make_cfg, configs):
    sizes = {"EMBED_DIM": 12, "DEPTH": 2, "NUM_HEADS": 2}
    cfg = make_cfg(**{"MODEL.IMG_SIZE": 24} | {f"MODEL.{key}": value for key, value in sizes.items()})
    train(cfg)
    opts = [word for key, value in sizes.items() for word in (f"MODEL.VIT.{key}", str(value))]
    opts += ["MODEL.DEVICE", "cpu", "MODEL.VIT.IMG_SIZE", "48", "MODEL.VIT.PRETRAIN_IMG_SIZE", "48"]
    opts += ["MODEL.KARAT.RANK", "3", "MODEL.KARAT.RESIDUAL", "none"]
    detector = build_model(load_cfg(str(configs / "quickstart.yaml"), opts))
    load_weights(detector, f"{cfg.OUTPUT_DIR}/model_best.pth", complete=False)
    averaged, vit = saved(cfg, "model_best")["model_ema"], detector.backbone.net
    assert torch.equal(vit.blocks[1].attn.qkv.weight, averaged["blocks.1.attn.qkv.weight"])
    # 3 × 3 tokens and a class token become 6 × 6.
    assert averaged["operator.projector"].shape[1] == 10 and vit.operator.projector.shape[1] == 36
    expected = resample_operator(
        {key: averaged[f"operator.{key}"] for key in ("coefficients", "projector")},
        vit.operator,
        TokenGrid(3, 3, class_tokens=1),
        TokenGrid(6, 6),
    )
    assert torch.allclose(vit.operator.projector, expected["projector"])
