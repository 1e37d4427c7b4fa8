"""Prepares a resumed run, so that its figures equal those of an uninterrupted one.

Logged scalars are medians over the last steps, so a checkpoint has these steps' scalars. metrics.json may be ahead of
the checkpoint or behind it: a run may be killed between saving, evaluating and writing.
"""

import contextlib
import json
import logging
import math
from typing import Any

from detectron2.engine.hooks import EvalHook, HookBase, PeriodicWriter
from detectron2.utils import comm

from ..checkpoint.run_folder import read_metrics

logger = logging.getLogger(__name__)

# Steps over which Detectron2's writers take the median of a scalar.
_WINDOW = 20
# They differ from run to run.
_CLOCKS = ("time", "data_time", "rank_data_time", "eta_seconds", "images/s")


class Resumption(HookBase):
    """Restores the scalars of a resumed run, and completes its last step.

    Args:
        metrics: path of the run's metrics.json.
        measure: name of a scalar of each evaluation; "" if there is none.
        evaluations: classes of hooks that evaluate after a step.
    """

    def __init__(self, metrics: str, measure: str, evaluations: tuple[type[HookBase], ...] = (EvalHook,)):
        self.metrics = metrics
        self.measure = measure
        self.evaluations = evaluations
        # The scalars of the checkpoint's last steps, and the step that it goes on with; None where none goes on.
        self.scalars: dict[str, list[tuple[float, int]]] = {}
        self.smoothed: list[str] = []
        self.next_iteration: int | None = None

    def state_dict(self) -> dict[str, Any]:
        storage = getattr(self.trainer, "storage", None)
        if storage is None:
            return {}
        # Values that are not finite would make equal checkpoints differ.
        last = {
            name: [(float(value), int(step)) for value, step in history.values()[-_WINDOW:] if math.isfinite(value)]
            for name, history in storage.histories().items()
            if name not in _CLOCKS
        }
        hints = storage.smoothing_hints()
        # Those that have not come again since the run went on are as they were.
        smoothed = [name for name in last if hints.get(name, name in self.smoothed)]
        return {"scalars": last, "smoothed": smoothed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        scalars, smoothed = state["scalars"], list(state["smoothed"])
        if not all(
            isinstance(name, str) and type(value) is float and type(step) is int
            for name, steps in scalars.items()
            for value, step in steps
        ):
            raise ValueError("The scalars of its last steps are none.")
        self.scalars, self.smoothed = scalars, smoothed
        self.next_iteration = self.trainer.iter + 1

    def start_again(self) -> None:
        """For a resumed run without a checkpoint: the next step is the first."""
        self.next_iteration = 0

    def is_told(self) -> bool:
        """Whether metrics.json has the evaluation after the last step; all processes must call it."""
        return bool(self._told())

    def _told(self) -> dict[str, float]:
        """The line of metrics.json that has the evaluation after the last step; {} if none has."""
        records = self._records(self.measure)
        return comm.all_gather(next((each for each in records if each["iteration"] == self.next_iteration - 1), {}))[0]

    def before_train(self) -> None:
        trainer = self.trainer
        # With another SOLVER.IMS_PER_BATCH, steps of pretraining have other numbers.
        if self.next_iteration is None or self.next_iteration != trainer.start_iter:
            return
        last, storage = trainer.start_iter - 1, trainer.storage
        if comm.is_main_process():
            _cut(self.metrics, trainer.start_iter)
        written = comm.all_gather(max((each["iteration"] for each in self._records()), default=-1))[0]
        for name, steps in self.scalars.items():
            history = storage.histories()[name]
            for value, step in steps:
                if (value, step) == steps[-1] and step > written:
                    # To be written.
                    storage.put_scalar(name, value, smoothing_hint=name in self.smoothed, cur_iter=step)
                else:
                    history.update(value, step)
        told = self._told()
        for name, value in told.items():
            is_figure = isinstance(value, float) and name not in (*self.smoothed, *_CLOCKS)
            if is_figure and self._last_step(name) < last:
                storage.histories()[name].update(value, last)
        due = () if told or self._last_step(self.measure) == last else self.evaluations
        trainer.iter = storage.iter = last
        for hook in trainer._hooks:
            if last >= 0 and isinstance(hook, (*due, PeriodicWriter)):
                hook.after_step()
        trainer.iter = storage.iter = trainer.start_iter

    def _last_step(self, name: str) -> int:
        """The last step of which the checkpoint has a scalar of this name; −1 if it has none."""
        return max((step for _, step in self.scalars.get(name, ())), default=-1)

    def _records(self, name: str = "iteration") -> list[dict[str, Any]]:
        """The lines of metrics.json that have a scalar of this name."""
        with contextlib.suppress(FileNotFoundError):
            return [each for each in read_metrics(self.metrics) if name in each and type(each.get("iteration")) is int]
        return []


def _cut(metrics: str, iteration: int) -> None:
    """Cuts metrics.json off before the first line of a step from `iteration` on."""
    with contextlib.suppress(FileNotFoundError), open(metrics, "rb+") as file:
        place = 0
        for line in file:
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict) and record.get("iteration", -1) >= iteration:
                    file.truncate(place)
                    logger.info("Cut off the lines of %s from iteration %d on, which comes again", metrics, iteration)
                    return
            place += len(line)
