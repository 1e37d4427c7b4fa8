"""What happens between the steps of a run: checkpoints and evaluations."""

import time

import pytest
import torch
from detectron2.engine import TrainerBase
from detectron2.engine.hooks import EvalHook

from karat_det.checkpoint.loading import SafeCheckpointer
from karat_det.engine import hooks, signals
from karat_det.engine.hooks import Checkpoints, Evaluation, Interval
from karat_det.engine.processes import RunFailed


class Run(TrainerBase):
    """Trains nothing, in steps of some seconds; `evaluate` is called every `eval_period` steps and at the end."""

    def __init__(self, folder, steps, period=0, minutes=0.0, keep=0, eval_period=0, evaluate=dict, seconds=0.0):
        super().__init__()
        self.max_iter, self.seconds = steps, seconds
        self.weight = torch.nn.Linear(1, 1)
        self.checkpointer = SafeCheckpointer(self.weight, str(folder), trainer=self)
        checkpoints = Checkpoints(self.checkpointer, period, minutes, keep)
        self.register_hooks([checkpoints, Evaluation(EvalHook(eval_period, evaluate), checkpoints)])

    def run_step(self):
        time.sleep(self.seconds)

    def run(self, start=0):
        self.train(start, self.max_iter)

    def state_dict(self):
        return {**super().state_dict(), "iteration": min(self.iter, self.max_iter - 1)}


def saved(folder):
    """Names of the checkpoints, and the iteration of each."""
    return {path.stem: torch.load(path)["trainer"]["iteration"] for path in folder.glob("*.pth")}


def test_checkpoints_by_steps_and_at_the_end(tmp_path):
    Run(tmp_path / "all", 5, period=2).run()
    assert saved(tmp_path / "all") == {"model_0000001": 1, "model_0000003": 3, "model_final": 4}
    Run(tmp_path / "last", 7, period=2, keep=1).run()
    assert saved(tmp_path / "last") == {"model_0000005": 5, "model_final": 6}


def test_checkpoints_by_time_take_each_others_place(tmp_path, monkeypatch):
    monkeypatch.setattr(hooks, "_LEAST_OVER_SAVING", 0)
    # A step of 0.06 s is due after 0.1 s: at every second one.
    run = Run(tmp_path, 6, minutes=0.1 / 60, seconds=0.06, evaluate=lambda: iterations.append(saved(tmp_path)))
    iterations = []
    run.after_step, before = lambda: (before(), iterations.append(saved(tmp_path))), run.after_step
    run.run()
    assert iterations[0] == {} and iterations[1] == {"model_last": 1} == iterations[2]
    assert iterations[3] == {"model_last": 3} and saved(tmp_path)["model_final"] == 5
    Run(tmp_path / "never", 3, minutes=0.0, seconds=0.05).run()
    assert saved(tmp_path / "never") == {"model_final": 2}


def test_saving_by_time_takes_a_fiftieth_of_the_time_at_most(monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    interval = Interval(1.0)
    for took, least in ((0.0, 60), (1.0, 60), (5.0, 250)):
        interval.begin(took)
        now += least - 0.1
        assert not interval.is_over()
        now += 0.2
        assert interval.is_over()


def test_what_an_evaluation_could_cost_is_saved_before_it(tmp_path):
    seen = []
    Run(tmp_path, 5, period=4, eval_period=2, evaluate=lambda: seen.append(saved(tmp_path))).run()
    # The one of the period serves, where it is due.
    assert seen[0] == {"model_last": 1} and seen[1] == {"model_last": 1, "model_0000003": 3}
    assert seen[2] == {"model_last": 1, "model_0000003": 3, "model_final": 4}


@pytest.mark.parametrize("error", [TypeError("unsupported\n  format"), ValueError(), RuntimeError("no CUDA")])
def test_an_evaluation_that_fails_says_so_in_one_line_and_costs_nothing(tmp_path, caplog, error):
    def fail():
        raise error

    with pytest.raises(
        RunFailed, match=rf"after iteration 2 failed: {type(error).__name__}: .*model_last.pth"
    ) as caught:
        Run(tmp_path, 6, eval_period=3, evaluate=fail).run()
    assert "\n" not in str(caught.value) and saved(tmp_path) == {"model_last": 2}
    assert "Traceback" not in caplog.text
    with pytest.raises(RunFailed, match=r"model_final.pth"):
        Run(tmp_path, 2, evaluate=fail).run()
    assert saved(tmp_path)["model_final"] == 1


def test_a_signal_ends_the_run_after_the_step_before_any_evaluation(tmp_path, monkeypatch, capfd):
    run = Run(tmp_path, 9, eval_period=1, evaluate=lambda: pytest.fail("evaluated"))
    monkeypatch.setattr(signals._state, "request", 10)
    monkeypatch.setattr(signals._state, "said", False)
    with pytest.raises(signals.Stopped) as stopped:
        run.run(start=4)
    assert stopped.value.code == 138 and saved(tmp_path) == {"model_last": 4}
    assert (
        capfd.readouterr().err
        == f"Stopped by SIGUSR1. Saved {tmp_path} after iteration 4: go on from it with --resume.\n"
    )
