"""Pretraining of classifiers: timm's data, recipe and metrics in Detectron2's loop.

The recipe is the paper's for image classification. An epoch ends by evaluating and saving. What is drawn at random
follows from SEED and the count of images, see order.py, so a run that resumes after any step is the run that was never
interrupted.
"""

import datetime
import logging
import math
import os
import time
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import TrainerBase, create_ddp_model
from detectron2.engine.hooks import HookBase, IterationTimer
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, JSONWriter, TensorboardXWriter, get_event_storage
from PIL import Image
from timm.data import FastCollateMixup, create_loader, create_transform
from timm.data.auto_augment import RandAugment, posterize
from timm.data.loader import PrefetchLoader, fast_collate
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, ModelEmaV3, accuracy, random_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..backbones.classifiers import build_classifier
from ..checkpoint.loading import SafeCheckpointer, check_weights_file, load_weights
from ..checkpoint.run_folder import clear_partial, end_metrics
from ..config import pretrain_config
from ..data.classification import NO_LABEL, LabelledImages, build_datasets
from . import signals
from .checks import check_pretrain_config, mixes_labels
from .full_disk import Writers, full_disk_named
from .hooks import LAST, Interval, evaluate_safely, save_after_failure
from .model_check import check_room
from .optimizer import FULL_MODEL, NO_WEIGHT_DECAY
from .order import CountedLoader, EpochBatches, ImageOrder, SeededImages
from .processes import agree
from .resumption import Resumption
from .setup import merge
from .trainer import Step, autocast_arguments, checked_iteration, foreign_state_refused

logger = logging.getLogger(__name__)

# Images a step for which SOLVER.BASE_LR stands.
_BASE_BATCH = 512
BEST = "model_best"
# The measure that decides which checkpoint is the best one.
METRIC = "top-1"


def load_pretrain_cfg(config_file: str, opts: list[str], data: str = "") -> CfgNode:
    """Reads a YAML config and the overrides behind it, and checks both.

    Args:
        config_file: path of a YAML file, or "" for the defaults.
        opts: keys and values in turn, as on Detectron2's command lines.
        data: DATA.ROOT, if not "".

    Returns:
        The config, frozen.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a key is unknown or its value is not allowed.
    """
    cfg = pretrain_config()
    merge(cfg, config_file, opts)
    if data:
        cfg.DATA.ROOT = data
    check_pretrain_config(cfg)
    cfg.freeze()
    return cfg


class Pretrainer(TrainerBase):
    """Trains and evaluates a classifier from a config, on GPUs or on the CPU, in one process or in many.

    Args:
        cfg: a config of `load_pretrain_cfg`.
        init_from: a weights file to start from, see `load_weights`; its head need not fit. "" is random weights.
        resume: go on from the last checkpoint in OUTPUT_DIR, if there is one.

    Raises:
        ValueError, FileNotFoundError, ImportError: data, weights or sizes are not what the config needs.
    """

    def __init__(self, cfg: CfgNode, init_from: str = "", resume: bool = False):
        super().__init__()
        self.cfg = cfg
        with torch.device("meta"):
            # Checks MODEL in a moment, before the data is read.
            check_room(cfg, build_classifier(cfg, num_classes=1), training=True)
        rank, world_size = comm.get_rank(), comm.get_world_size()
        train, val = build_datasets(cfg, rank, world_size)
        # One seed then starts all processes alike, whatever was drawn before.
        random_seed(cfg.SEED)
        self.model = build_classifier(cfg, len(train.split.classes)).to(cfg.MODEL.DEVICE)
        self.images = train, val
        self.classes = train.split.classes
        self.order = ImageOrder(torch.ones(len(train)), cfg.SEED)
        self.loader = build_train_loader(cfg, self.model, train, self.order)
        self.val_loader = build_val_loader(cfg, self.model, val)
        self.epoch_length = len(train) // cfg.SOLVER.IMS_PER_BATCH
        if not self.epoch_length:
            raise ValueError(
                f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}, and {train.split.place} has {len(train)} images: "
                "too few for one step. Lower it."
            )
        self.max_iter = cfg.SOLVER.EPOCHS * self.epoch_length
        optimizer = build_optimizer(cfg, self.model)
        resumes = resume and SafeCheckpointer(None, cfg.OUTPUT_DIR).has_checkpoint()
        if init_from and not resumes:
            strict = cfg.MODEL.WEIGHTS_STRICT
            load_weights(self.model, init_from, strict=strict, complete=False, classes=self.classes)
        on_cpu = {"device_ids": None} if cfg.MODEL.DEVICE == "cpu" else {}
        in_parallel = create_ddp_model(WithLoss(self.model, cfg), broadcast_buffers=False, **on_cpu)
        # Made after the processes have been brought to the same weights.
        self.ema = ModelEmaV3(self.model, cfg.SOLVER.EMA_DECAY, use_warmup=True) if cfg.SOLVER.EMA_DECAY else None
        self.step = Step(in_parallel, self.loader, optimizer, cfg)
        self.scheduler = build_scheduler(cfg, optimizer, self.epoch_length)
        averaged = {"model_ema": self.ema.module} if self.ema else {}
        self.checkpointer = SafeCheckpointer(
            self.model, cfg.OUTPUT_DIR, save_to_disk=comm.is_main_process(), trainer=self, **averaged
        )
        self.step.checkpointer = self.checkpointer
        self.after_epoch = after_epoch = _AfterEpoch()
        stopping = _BetweenEpochs(after_epoch, cfg.SOLVER.CHECKPOINT_MINUTES)
        self.resumption = Resumption(f"{cfg.OUTPUT_DIR}/metrics.json", METRIC, (_AfterEpoch,))
        self.register_hooks([IterationTimer(), _AfterStep(), stopping, after_epoch, self.resumption])
        if resumes:
            self._resume()
        elif resume:
            self.resumption.start_again()
        logger.info(
            "%d images of %d classes to train on, %d to validate on; %d epochs of %d steps of %d images.",
            *(len(train), len(self.classes), len(val.split.samples)),
            *(cfg.SOLVER.EPOCHS, self.epoch_length, cfg.SOLVER.IMS_PER_BATCH),
        )

    def train(self) -> None:
        """Trains the epochs that are left, and leaves model_best.pth and model_last.pth in OUTPUT_DIR.

        The first signal, see karat_det.engine.signals, ends it with a checkpoint.
        """
        # It may have been killed in its last evaluation.
        if self.start_iter >= self.max_iter and self.resumption.is_told():
            logger.info("The run has had all of its %d epochs (SOLVER.EPOCHS).", self.cfg.SOLVER.EPOCHS)
            return
        self.scheduler.step_update(self.start_iter)
        if comm.is_main_process():
            folder = self.cfg.OUTPUT_DIR
            os.makedirs(folder, exist_ok=True)
            clear_partial(folder)
            end_metrics(f"{folder}/metrics.json")
            writers = [ProgressLine(self), JSONWriter(f"{folder}/metrics.json"), TensorboardXWriter(folder)]
            # The storage keeps the last of each figure: those of an epoch must be written before the next one's.
            self.register_hooks([Writers(writers, period=min(20, self.epoch_length))])
        with signals.awaited(), full_disk_named(self.cfg.OUTPUT_DIR):
            super().train(self.start_iter, self.max_iter)

    def run_step(self) -> None:
        self.step.iter = self.iter
        self.step.run_step()

    def after_train(self) -> None:
        save_after_failure(self, self.step, lambda: self.save(LAST, self.after_epoch.figures))
        super().after_train()

    def evaluate(self) -> dict[str, float]:
        """Measures the averaged weights, or the weights where none are averaged, on the validation split."""
        model = self.ema.module if self.ema else self.model
        try:
            return evaluate(model, self.val_loader, self.step.autocast)
        finally:
            self.model.train()

    def save(self, name: str, figures: dict[str, float]) -> None:
        """Saves the run as name.pth in OUTPUT_DIR."""
        epoch = (self.iter + 1) // self.epoch_length
        about = {"epoch": epoch, "figures": figures, "classes": self.classes, "config": self.cfg.dump()}
        self.checkpointer.save(name, **about, averages=self.ema is not None)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "step": self.step.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError where the state is not of such a run."""
        with foreign_state_refused():
            checked_iteration(state)
            super().load_state_dict(state)
            self.step.load_state_dict(state["step"])
            images = state["step"]["order"]["images"]
        if images != len(self.order):
            raise ValueError(
                f"The run in OUTPUT_DIR, {self.cfg.OUTPUT_DIR}, has trained on {images} images, and the data has "
                f"{len(self.order)} to train on. Resume it with its data."
            )

    def _resume(self) -> None:
        saved = self.checkpointer.resume_or_load("", resume=True)
        with foreign_state_refused(f"The checkpoint in OUTPUT_DIR, {self.cfg.OUTPUT_DIR},"):
            averages = bool(saved["averages"])
            _check_classes(f"The run in OUTPUT_DIR, {self.cfg.OUTPUT_DIR},", saved["classes"], self.classes)
        epoch, place = divmod(self.order.place, len(self.order))
        left = (len(self.order) - place) // self.cfg.SOLVER.IMS_PER_BATCH
        # The step after the last, unless SOLVER.IMS_PER_BATCH is another one: then an epoch has not as many.
        self.start_iter = (epoch + 1) * self.epoch_length - left
        if self.start_iter > self.max_iter:
            raise ValueError(
                f"SOLVER.EPOCHS is {self.cfg.SOLVER.EPOCHS}, and the run in OUTPUT_DIR, {self.cfg.OUTPUT_DIR}, has had "
                f"{self.start_iter / self.epoch_length:.3g} epochs already."
            )
        if self.ema and not averages:
            raise ValueError(
                f"SOLVER.EMA_DECAY is {self.cfg.SOLVER.EMA_DECAY}, but the run in OUTPUT_DIR, {self.cfg.OUTPUT_DIR}, "
                "has averaged no weights so far. Resume it with SOLVER.EMA_DECAY 0.0."
            )
        done, steps = divmod(self.start_iter, self.epoch_length)
        within = f" and {steps} of {self.epoch_length} steps" if steps else ""
        logger.info("Going on after epoch %d%s.", done, within)


def evaluate_file(cfg: CfgNode, path: str = "") -> dict[str, float]:
    """Evaluates a weights file on the validation split, and says the figures in the log.

    Args:
        cfg: a config of `load_pretrain_cfg`.
        path: see `load_weights`; "" is the best checkpoint in OUTPUT_DIR.

    Returns:
        See `evaluate`.

    Raises:
        ValueError, FileNotFoundError, ImportError: data or weights are not what the config needs.
    """
    path = path or os.path.join(cfg.OUTPUT_DIR, f"{BEST}.pth")
    check_weights_file(path, "--init-from")
    _, val = build_datasets(cfg, comm.get_rank(), comm.get_world_size())
    model = build_classifier(cfg, len(val.split.classes)).to(cfg.MODEL.DEVICE)
    beside_weights = load_weights(model, path, strict=cfg.MODEL.WEIGHTS_STRICT)
    _check_classes(path, beside_weights.get("classes", val.split.classes), val.split.classes)
    figures = evaluate(model, build_val_loader(cfg, model, val), autocast_arguments(cfg))
    logger.info("%s: top-1 %.2f  top-5 %.2f  validation loss %.4f", path, *figures.values())
    return figures


class WithLoss(nn.Module):
    """A classifier that takes what timm's loader gives, and returns a dict with its loss, as Detectron2's models do."""

    def __init__(self, model: nn.Module, cfg: CfgNode):
        super().__init__()
        self.model = model
        smoothing = cfg.AUG.LABEL_SMOOTHING
        # Mixed labels are smooth already.
        self.criterion = SoftTargetCrossEntropy() if mixes_labels(cfg) else LabelSmoothingCrossEntropy(smoothing)

    def forward(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        images, targets = batch
        return {"loss": self.criterion(self.model(images), targets)}


def build_train_loader(cfg: CfgNode, model: nn.Module, images: LabelledImages, order: ImageOrder) -> CountedLoader:
    """Builds a loader of augmented and mixed batches by timm's parts, this process's share of each.

    Args:
        cfg: a config with the keys of `pretrain_config`.
        model: of timm; it knows the size of its images.
        images: all those to train on; they get timm's transform.
        order: their order.
    """
    mixup = FastCollateMixup(
        mixup_alpha=cfg.AUG.MIXUP,
        cutmix_alpha=cfg.AUG.CUTMIX,
        prob=cfg.AUG.MIX_PROB,
        switch_prob=cfg.AUG.CUTMIX_PROB,
        label_smoothing=cfg.AUG.LABEL_SMOOTHING,
        num_classes=len(images.split.classes),
    )
    images.transform = create_transform(
        (3, *model.patch_embed.img_size),
        is_training=True,
        use_prefetcher=True,
        scale=tuple(cfg.AUG.SCALE),
        ratio=tuple(cfg.AUG.RATIO),
        hflip=cfg.AUG.FLIP,
        color_jitter=cfg.AUG.COLOR_JITTER,
        auto_augment=cfg.AUG.RAND_AUGMENT or None,
        interpolation="random",
        mean=tuple(cfg.DATA.MEAN),
        std=tuple(cfg.DATA.STD),
    )
    for transform in images.transform.transforms:
        if isinstance(transform, RandAugment):
            for operation in transform.ops:
                if operation.name.startswith("Posterize"):
                    operation.aug_fn = _posterize
    batches = DataLoader(
        SeededImages(images, order),
        batch_sampler=EpochBatches(order, cfg.SOLVER.IMS_PER_BATCH),
        collate_fn=mixup if mixes_labels(cfg) else fast_collate,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        pin_memory=cfg.MODEL.DEVICE != "cpu",
    )
    device = torch.device(cfg.MODEL.DEVICE)
    normalized = PrefetchLoader(batches, mean=tuple(cfg.DATA.MEAN), std=tuple(cfg.DATA.STD), device=device)
    return CountedLoader(signals.leave_to_parent(normalized), order, cfg.SOLVER.IMS_PER_BATCH, whole_epochs=True)


def build_val_loader(cfg: CfgNode, model: nn.Module, images: LabelledImages):
    """Builds timm's loader of centre crops. Arguments as for `build_train_loader`, but for this process's images."""
    loader = create_loader(
        images,
        batch_size=cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size(),
        crop_pct=cfg.TEST.CROP_RATIO,
        interpolation="bicubic",
        input_size=(3, *model.patch_embed.img_size),
        mean=tuple(cfg.DATA.MEAN),
        std=tuple(cfg.DATA.STD),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        persistent_workers=False,
        pin_memory=cfg.MODEL.DEVICE != "cpu",
        device=torch.device(cfg.MODEL.DEVICE),
    )
    return signals.leave_to_parent(loader)


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Builds timm's AdamW at the rate that SOLVER.BASE_LR and IMS_PER_BATCH make.

    Norms, biases, what timm's model names, positions and the operators' coefficients have no weight decay.

    Args:
        cfg: a config with the keys of `pretrain_config`.
        model: of timm.
    """
    spared = {name for name, _ in model.named_parameters() if name.rpartition(".")[2] in NO_WEIGHT_DECAY}
    optimizer = create_optimizer_v2(
        model,
        opt="adamw",
        lr=cfg.SOLVER.BASE_LR * cfg.SOLVER.IMS_PER_BATCH / _BASE_BATCH,
        weight_decay=cfg.SOLVER.WEIGHT_DECAY,
        betas=tuple(cfg.SOLVER.BETAS),
        eps=cfg.SOLVER.EPS,
        param_group_fn=partial(
            param_groups_weight_decay,
            weight_decay=cfg.SOLVER.WEIGHT_DECAY,
            no_weight_decay_list=spared | set(model.no_weight_decay()),
        ),
    )
    if cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE != FULL_MODEL:
        maybe_add_gradient_clipping(cfg, optimizer)
    return optimizer


def build_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer, epoch_length: int):
    """Builds timm's cosine schedule with warm-up, by steps."""
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=cfg.SOLVER.EPOCHS,
        warmup_epochs=cfg.SOLVER.WARMUP_EPOCHS,
        warmup_lr=cfg.SOLVER.WARMUP_LR,
        min_lr=cfg.SOLVER.MIN_LR,
        step_on_epochs=False,
        updates_per_epoch=epoch_length,
    )
    return scheduler


@torch.no_grad()
def evaluate(model: nn.Module, loader, autocast: dict[str, Any]) -> dict[str, float]:
    """Measures a classifier on the images of all processes.

    Args:
        model: the classifier; left in evaluation mode.
        loader: of this process's images; those with NO_LABEL do not count.
        autocast: arguments of torch.autocast.

    Returns:
        "top-1" and "top-5" in percent and "val_loss", of all images, in all processes.
    """
    model.eval()
    meters = {name: AverageMeter() for name in (METRIC, "top-5", "val_loss")}
    for images, labels in loader:
        with torch.autocast(**autocast):
            logits = model(images)
        logits, labels = logits[labels != NO_LABEL].float(), labels[labels != NO_LABEL]
        if not len(labels):
            continue
        loss = nn.functional.cross_entropy(logits, labels)
        for meter, value in zip(meters.values(), (*accuracy(logits, labels, topk=(1, 5)), loss), strict=True):
            meter.update(value.item(), len(labels))
    # Shares differ in size by one image at most, and the mean is over images.
    gathered = comm.all_gather({name: (meter.sum, meter.count) for name, meter in meters.items()})
    count = sum(each[METRIC][1] for each in gathered)
    return {name: sum(each[name][0] for each in gathered) / count for name in meters}


class ProgressLine(EventWriter):
    """Writes a line of how the run goes to the log."""

    def __init__(self, trainer: Pretrainer):
        self.trainer = trainer

    def write(self) -> None:
        storage, trainer = get_event_storage(), self.trainer
        if storage.iter >= trainer.max_iter or not {"time", "total_loss"} <= storage.histories().keys():
            return
        seconds = storage.history("time").median(20)
        left = datetime.timedelta(seconds=int(seconds * (trainer.max_iter - storage.iter - 1)))
        logger.info(
            "epoch %d/%d  step %d/%d  loss %.4f  grad norm %.2f  lr %.2e  %.1f images/s  eta %s",
            *(storage.iter // trainer.epoch_length + 1, trainer.cfg.SOLVER.EPOCHS),
            *(storage.iter % trainer.epoch_length + 1, trainer.epoch_length),
            *(storage.history("total_loss").median(20), storage.history("grad_norm").median(20)),
            *(storage.history("lr").latest(), storage.history("images/s").latest(), left),
        )


class _AfterStep(HookBase):
    """Averages the weights, moves the learning rate on, and measures the throughput."""

    def after_step(self) -> None:
        trainer, storage = self.trainer, self.trainer.storage
        if trainer.ema and trainer.step.updated:
            trainer.ema.update(trainer.model, step=trainer.iter + 1)
        storage.put_scalar(
            "lr", max(group["lr"] for group in trainer.step.optimizer.param_groups), smoothing_hint=False
        )
        trainer.scheduler.step_update(trainer.iter + 1)
        if "time" in storage.histories():
            rate = trainer.cfg.SOLVER.IMS_PER_BATCH / storage.history("time").median(20)
            storage.put_scalar("images/s", rate, smoothing_hint=False)


class _BetweenEpochs(HookBase):
    """Saves the run by time, see Interval, and at a signal, which ends it."""

    def __init__(self, after_epoch: "_AfterEpoch", minutes: float):
        self.after_epoch = after_epoch
        self.interval = Interval(minutes)

    def before_train(self) -> None:
        self.interval.begin(0.0)

    def after_step(self) -> None:
        is_due, signal = agree(self.interval.is_over(), signals.requested())
        if is_due or signal:
            start = time.monotonic()
            self.trainer.save(LAST, self.after_epoch.figures)
            self.interval.begin(time.monotonic() - start)
        if signal:
            signals.stop(int(signal), f"{self.trainer.cfg.OUTPUT_DIR}/{LAST}.pth after step {self.trainer.iter + 1}")


class _AfterEpoch(HookBase):
    """Evaluates, and saves the run: always as the last checkpoint, and as the best one if it is that."""

    def __init__(self):
        self.best = -math.inf
        self.figures: dict[str, float] = {}

    def after_step(self) -> None:
        trainer = self.trainer
        epoch, rest = divmod(trainer.iter + 1, trainer.epoch_length)
        if rest:
            return
        if epoch % trainer.cfg.TEST.EVAL_PERIOD == 0 or epoch == trainer.cfg.SOLVER.EPOCHS:
            trainer.save(LAST, self.figures)
            self.figures = evaluate_safely(trainer.evaluate, trainer.iter, trainer.checkpointer)
            trainer.storage.put_scalars(smoothing_hint=False, **self.figures)
            logger.info(
                "epoch %d/%d  top-1 %.2f  top-5 %.2f  validation loss %.4f%s",
                *(epoch, trainer.cfg.SOLVER.EPOCHS, *self.figures.values()),
                " (of the averaged weights)" if trainer.ema else "",
            )
            if self.figures[METRIC] > self.best:
                self.best = self.figures[METRIC]
                trainer.save(BEST, self.figures)
        for images in trainer.images:
            images.merge_broken(comm.all_gather(images.broken))
        trainer.save(LAST, self.figures)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "figures": self.figures}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = float(state["best"])
        self.figures = {str(name): float(value) for name, value in state["figures"].items()}


def _posterize(image: Image.Image, bits_to_keep: int, **_) -> Image.Image:
    """timm's, but one bit of a colour is kept at least: at full strength timm keeps none, which Pillow refuses."""
    return posterize(image, max(1, bits_to_keep))


def _check_classes(what: str, theirs: list[str], ours: list[str]) -> None:
    """Raises ValueError where the classes are others, or in another order: a label would mean another class."""
    if len(theirs) != len(ours):
        raise ValueError(
            f"{what} was trained on {len(theirs)} classes, and the data has {len(ours)}. Name the data that it was "
            "trained on (--data, DATA.NAME)."
        )
    different = [(label, *names) for label, names in enumerate(zip(theirs, ours, strict=True)) if len(set(names)) > 1]
    if different:
        raise ValueError(
            "{} was trained on other classes: number {} is {!r} there and {!r} in the data. Name the data that it was "
            "trained on (--data, DATA.NAME).".format(what, *different[0])
        )
