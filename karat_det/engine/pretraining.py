"""Pretraining of classifiers: timm's data, recipe and metrics in Detectron2's loop.

The recipe is the paper's for image classification. An epoch ends with an evaluation and a checkpoint. Random draws
follow from SEED and the count of images, see order.py, so a run that resumes after any step equals an uninterrupted
one.
"""

import logging
import os
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import TrainerBase, create_ddp_model
from detectron2.engine.hooks import IterationTimer
from detectron2.utils import comm
from detectron2.utils.events import JSONWriter, TensorboardXWriter
from timm.utils import AverageMeter, ModelEmaV3, accuracy, random_seed
from torch import nn

from ..backbones.classifiers import build_classifier
from ..checkpoint.loading import SafeCheckpointer, check_weights_file, load_weights
from ..checkpoint.run_folder import clear_partial, end_metrics
from ..config import pretrain_config
from ..data.classification import NO_LABEL, build_datasets
from . import signals
from .checks import check_classes, check_pretrain_config
from .full_disk import Writers, full_disk_named
from .hooks import BEST, LAST, save_after_failure
from .model_check import check_room
from .order import ImageOrder
from .pretraining_builders import WithLoss, build_optimizer, build_scheduler, build_train_loader, build_val_loader
from .pretraining_hooks import METRIC, AfterEpoch, AfterStep, BetweenEpochs, ProgressLine
from .resumption import Resumption
from .setup import merge
from .trainer import Step, autocast_arguments, checked_iteration, foreign_state_refused

logger = logging.getLogger(__name__)


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
        self.after_epoch = after_epoch = AfterEpoch()
        stopping = BetweenEpochs(after_epoch, cfg.SOLVER.CHECKPOINT_MINUTES)
        self.resumption = Resumption(f"{cfg.OUTPUT_DIR}/metrics.json", METRIC, (AfterEpoch,))
        self.register_hooks([IterationTimer(), AfterStep(), stopping, after_epoch, self.resumption])
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
            # The storage keeps the last value of each figure: an epoch's must be written before the next epoch's.
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
            check_classes(f"The run in OUTPUT_DIR, {self.cfg.OUTPUT_DIR},", saved["classes"], self.classes)
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
    """Evaluates a weights file on the validation split, and logs the figures.

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
    check_classes(path, beside_weights.get("classes", val.split.classes), val.split.classes)
    figures = evaluate(model, build_val_loader(cfg, model, val), autocast_arguments(cfg))
    logger.info("%s: top-1 %.2f  top-5 %.2f  validation loss %.4f", path, *figures.values())
    return figures


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
