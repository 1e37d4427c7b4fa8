"""Reactions to divergence, by SOLVER.ON_DIVERGENCE: stop, skip the step, or go back to a checkpoint.

All processes decide the same: they must agree on what one has seen before they call `Divergence.answer`.
"""

import logging
from collections import deque
from collections.abc import Callable
from statistics import median
from typing import Any

from detectron2.config import CfgNode

from ..checkpoint.run_folder import say_last_good

logger = logging.getLogger(__name__)

ACTIONS = ("skip_not_finite", "skip", "rollback", "stop")
# Most and fewest gradient norms of the running median; the first steps differ from later ones.
_NORMS, _FEWEST = 100, 5
_COUNTS = ("skipped", "in_a_row", "rollbacks")


class Divergence:
    """Counts diverged steps, and skips them, takes the run back or ends it.

    Args:
        solver: SOLVER of either config.
    """

    def __init__(self, solver: CfgNode):
        self.action = solver.ON_DIVERGENCE
        self.max_skipped = solver.MAX_SKIPPED_STEPS
        self.max_rollbacks = solver.MAX_ROLLBACKS
        self.spike_factor = solver.SPIKE_FACTOR
        self.norms: deque[float] = deque(maxlen=_NORMS)
        self.skipped = self.in_a_row = self.rollbacks = 0

    @property
    def rate_factor(self) -> float:
        """Factor of the learning rate: a half for each time that the run went back."""
        return 0.5**self.rollbacks

    def spike(self, norm: float) -> str:
        """Says why the norm of a gradient is a spike; "" if it is none, or spikes are allowed."""
        if self.action not in ("skip", "rollback") or len(self.norms) < _FEWEST:
            return ""
        usual = median(self.norms)
        if norm <= self.spike_factor * usual:
            return ""
        return f"The gradient's norm is {norm:.3g}, over {self.spike_factor:g} times the running median, {usual:.3g}."

    def passed(self, norm: float) -> None:
        """Counts a step that has updated the weights, with the norm of its gradient."""
        self.norms.append(norm)
        self.in_a_row = 0

    def answer(self, reason: str, iteration: int, lost: str, folder: str, restore: Callable[[], str]) -> None:
        """Skips the step, or takes the run back, or ends it.

        Args:
            reason: the fault, in a sentence.
            iteration: the step's.
            lost: name of a weight that is not finite any more, so that skipping would not help; "" if all are finite.
            folder: the run's, with its checkpoints.
            restore: takes the run back to its last checkpoint, and returns its path; "" if there is none.

        Raises:
            FloatingPointError: the run is to end.
        """
        diverged = f"Training diverged at iteration {iteration}. {reason}"
        may_go_back = self.action == "rollback" and self.rollbacks < self.max_rollbacks
        if may_go_back and (path := restore()):
            self.rollbacks += 1
            self.norms.clear()
            logger.warning(
                "%s Rolled back to the weights of %s, and on with the images that follow, at %g of the rate: "
                "%d of at most %d times (SOLVER.MAX_ROLLBACKS)",
                *(diverged, path, self.rate_factor, self.rollbacks, self.max_rollbacks),
            )
            return
        tried = ""
        if self.action.startswith("skip") and not lost:
            self.skipped += 1
            self.in_a_row += 1
            if self.in_a_row <= self.max_skipped:
                logger.warning(
                    "%s This step updates nothing: skipped, %d in a row of at most %d (SOLVER.MAX_SKIPPED_STEPS)",
                    *(diverged, self.in_a_row, self.max_skipped),
                )
                return
            tried = f" {self.max_skipped} steps in a row were skipped before it (SOLVER.MAX_SKIPPED_STEPS)."
        elif self.action == "rollback":
            tried = f" The run was rolled back {self.rollbacks} times (SOLVER.MAX_ROLLBACKS {self.max_rollbacks})."
        raise FloatingPointError(
            f"{diverged}{tried} {say_last_good(folder)} Try a lower SOLVER.BASE_LR, a longer warm-up, MODEL.KARAT.INIT "
            "scaled, or SOLVER.AMP.ENABLED False."
        )

    def state_dict(self) -> dict[str, Any]:
        return {"norms": list(self.norms), **{name: getattr(self, name) for name in _COUNTS}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over counts; those that a checkpoint lacks stay. Raises ValueError for invalid ones."""
        norms = state.get("norms", []) if isinstance(state, dict) else None
        counts = {name: state.get(name, 0) for name in _COUNTS} if isinstance(state, dict) else {}
        if (
            not isinstance(norms, list)
            or not all(type(norm) is float for norm in norms)
            or not all(type(count) is int and 0 <= count < 2**63 for count in counts.values())
        ):
            raise ValueError(f"The counts of diverged steps are {state!r}, which are none.")
        self.norms = deque(norms, maxlen=_NORMS)
        for name, count in counts.items():
            setattr(self, name, count)
