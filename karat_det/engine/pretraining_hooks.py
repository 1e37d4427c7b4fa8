"""Hooks of pretraining after a step and after an epoch: averages, rates, evaluations, checkpoints, the log."""

import datetime
import logging
import time
from typing import Any

from detectron2.engine import TrainerBase
from detectron2.engine.hooks import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, get_event_storage

from . import signals
from .hooks import BEST, LAST, Interval, KeepsBest, evaluate_safely
from .processes import agree

logger = logging.getLogger(__name__)

# The measure of the best checkpoint.
METRIC = "top-1"


class ProgressLine(EventWriter):
    """Writes a line on the progress of the run to the log."""

    def __init__(self, trainer: TrainerBase):
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


class AfterStep(HookBase):
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


class AfterEpoch(KeepsBest):
    """Evaluates, and saves the run: always as the last checkpoint, and as the best one if it is that."""

    __qualname__ = "_AfterEpoch"  # Checkpoints have its state by this name.

    def __init__(self):
        super().__init__()
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
            if self.is_best(self.figures[METRIC]):
                trainer.save(BEST, self.figures)
        for images in trainer.images:
            images.merge_broken(comm.all_gather(images.broken))
        trainer.save(LAST, self.figures)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "figures": self.figures}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.figures = {str(name): float(value) for name, value in state["figures"].items()}


class BetweenEpochs(HookBase):
    """Saves the run by time, see Interval, and at a signal, which ends it."""

    def __init__(self, after_epoch: AfterEpoch, minutes: float):
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
