"""Hooks of a run between its steps: checkpoints, signals, evaluations."""

import logging
import math
import time
from collections.abc import Callable
from typing import Any

from detectron2.data.detection_utils import SizeMismatchError
from detectron2.engine import TrainerBase
from detectron2.engine.hooks import EvalHook, HookBase
from detectron2.utils import comm

from ..checkpoint.loading import SafeCheckpointer
from ..checkpoint.run_folder import keep_last
from ..data.broken_images import TooManyBroken
from . import signals
from .full_disk import is_full
from .processes import RunFailed, agree, is_lack_of_memory, is_loss, without_trace

logger = logging.getLogger(__name__)

# Name of the checkpoint between the numbered ones; each replaces the one before.
LAST = "model_last"
# Name of the checkpoint with the best evaluation.
BEST = "model_best"
# Least time between two checkpoints by time, over the time to save one.
_LEAST_OVER_SAVING = 50
# Errors of the machine or the data. Any other error is the program's, and keeps its trace.
_NO_TRACE = OSError, FloatingPointError, RunFailed, TooManyBroken, SizeMismatchError


def _tell_in_one_line(record: logging.LogRecord) -> bool:
    """Drops the trace in the log of Detectron2's loop for errors that the command reports in a line."""
    error = record.exc_info[1] if record.exc_info else None
    return not (isinstance(error, _NO_TRACE) or is_loss(error) or is_lack_of_memory(error))


logging.getLogger("detectron2.engine.train_loop").addFilter(_tell_in_one_line)


class Interval:
    """Times of checkpoints: every some minutes, or later if saving would take over a fiftieth of the time.

    Args:
        minutes: 0 is never.
    """

    def __init__(self, minutes: float):
        self.seconds = 60 * minutes
        self.begin(0.0)

    def begin(self, took: float) -> None:
        """Begins anew after saving, which took `took` seconds."""
        self.due_at = time.monotonic() + max(self.seconds, _LEAST_OVER_SAVING * took)

    def is_over(self) -> bool:
        """Whether it is time to save. Only the main process saves and knows how long it takes; others return False."""
        return self.seconds > 0 and comm.is_main_process() and time.monotonic() >= self.due_at


class Checkpoints(HookBase):
    """Saves the run by steps, by time, at the end and at a signal, which ends the run. All processes need it.

    Args:
        checkpointer: saves the run.
        period: steps between numbered checkpoints; 0 is none.
        minutes: time between checkpoints, numbered or not, see Interval.
        keep: number of numbered checkpoints to keep; 0 is all.
    """

    def __init__(self, checkpointer: SafeCheckpointer, period: int, minutes: float, keep: int = 0):
        self.checkpointer = checkpointer
        self.period = period
        self.interval = Interval(minutes)
        self.keep = keep
        self.saved = -1

    def before_train(self) -> None:
        self.saved = self.trainer.start_iter - 1
        self.interval.begin(0.0)

    def after_step(self) -> None:
        iteration = self.trainer.iter
        if self.period and (iteration + 1) % self.period == 0:
            self._save(f"model_{iteration:07d}")
            if self.checkpointer.save_to_disk:
                keep_last(self.checkpointer.save_dir, self.keep)
        if iteration + 1 >= self.trainer.max_iter:
            self._save("model_final")
        is_due, signal = agree(self.interval.is_over(), signals.requested())
        if is_due or signal:
            self.save()
        if signal:
            signals.stop(int(signal), f"{self.checkpointer.save_dir} after iteration {iteration}")

    def save(self) -> None:
        """Saves the run as model_last.pth, unless it is saved since its last step."""
        if self.saved != self.trainer.iter:
            self._save(LAST)

    def _save(self, name: str) -> None:
        start = time.monotonic()
        self.checkpointer.save(name, iteration=self.trainer.iter)
        self.saved = self.trainer.iter
        self.interval.begin(time.monotonic() - start)


class Evaluation(EvalHook):
    """Detectron2's evaluation, but the run is saved first, and a failure is reported in one line.

    Args:
        hook: Detectron2's hook, whose period and function it uses.
        checkpoints: saves the run.
    """

    def __init__(self, hook: EvalHook, checkpoints: Checkpoints):
        super().__init__(hook._period, hook._func)
        self.checkpoints = checkpoints

    def _do_eval(self) -> None:
        if self.trainer.iter < self.trainer.max_iter:
            self.checkpoints.save()
        evaluate_safely(super()._do_eval, self.trainer.iter, self.checkpoints.checkpointer)


class KeepsBest(HookBase):
    """A hook that saves the run as BEST when a metric is better than ever before, also before --resume."""

    def __init__(self):
        self.best = -math.inf

    def is_best(self, value: float) -> bool:
        """Whether a value is the highest so far. If so it is remembered, and the run must be saved."""
        if not value > self.best:  # NaN is not
            return False
        self.best = value
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = float(state["best"])


class BestCheckpointer(KeepsBest):
    """Keeps a detector's checkpoint with the best metric. Unlike Detectron2's of this name it survives --resume.

    Args:
        period: iterations between evaluations, as in Detectron2's EvalHook; 0 for none but the last.
        checkpointer: saves the run.
        metric: name of the metric among the evaluation's results, for example "segm/AP". Higher is better.
    """

    def __init__(self, period: int, checkpointer: SafeCheckpointer, metric: str):
        super().__init__()
        self.period = period
        self.checkpointer = checkpointer
        self.metric = metric

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if self.period > 0 and done % self.period == 0 and done != self.trainer.max_iter:
            self._evaluated()

    def after_train(self) -> None:
        self._evaluated()

    def _evaluated(self) -> None:
        # Only the main process has results.
        value = comm.all_gather(self.trainer.storage.latest().get(self.metric, (math.nan, 0))[0])[0]
        if self.is_best(value):
            logger.info("%s is %.3f, the best so far: saving %s.pth", self.metric, value, BEST)
            self.checkpointer.save(BEST)


def save_after_failure(trainer: TrainerBase, step, save: Callable[[], None]) -> None:
    """Saves a run that an error ends, as after its last whole step. If saving fails, the first error is still raised.

    Args:
        trainer: the run's. Its iteration is the one that failed; the saved one is the one before.
        step: see `Step.intact`.
        save: saves the run.
    """
    if not step.intact or trainer.iter <= trainer.start_iter:
        return
    step.undo()
    trainer.iter = trainer.storage.iter = step.iter = trainer.iter - 1
    try:
        save()
        # No process ends while the main one writes: the launcher would then end the main one too.
        comm.synchronize()
    except Exception as error:
        logger.warning("The run could not be saved: %s: %s", type(error).__name__, error)


def evaluate_safely(evaluate, iteration: int, checkpointer: SafeCheckpointer):
    """Calls `evaluate` on a saved run: a signal ends the process at once, a failure the run in one line.

    Args:
        evaluate: takes no arguments; its result is returned.
        iteration: the run's, for the message of a failure.
        checkpointer: the one that has saved the run.

    Raises:
        RunFailed: it fails.
    """
    try:
        with signals.awaited(False):
            return evaluate()
    except Exception as error:
        if is_loss(error) or is_full(error):
            raise
        told = without_trace(error).splitlines()
        raise RunFailed(
            f"The evaluation after iteration {iteration} failed: {type(error).__name__}: "
            f"{told[-1] if told else ''} The run was saved before it, as "
            f"{checkpointer.get_checkpoint_file()}. With --eval-only --resume it fails alike, and shows where."
        ) from error
