import math

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine import TrainerBase
from detectron2.engine.hooks import EvalHook
from detectron2.utils.events import EventStorage

from karat_det.checkpoint.loading import SafeCheckpointer
from karat_det.engine.setup import load_cfg
from karat_det.engine.trainer import BestCheckpointer, Step, Trainer, best_metric

METRIC = "segm/AP"


class NoState:
    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class Run(Trainer):
    """Trains nothing; its evaluations after each second iteration give the figures it is made with."""

    def __init__(self, folder, figures):
        TrainerBase.__init__(self)
        self._trainer = NoState()
        self.max_iter = 2 * len(figures)
        self.figures = figures
        self.weight = torch.nn.Linear(1, 1)
        self.checkpointer = SafeCheckpointer(self.weight, str(folder), trainer=self)
        self.register_hooks([BestCheckpointer(2, self.checkpointer, METRIC)])

    def run_step(self):
        self.weight.weight.data.fill_(self.iter)
        if self.iter % 2:
            self.storage.put_scalar(METRIC, self.figures[self.iter // 2], smoothing_hint=False)

    def run(self, start, end):
        TrainerBase.train(self, start, end)


def best(folder):
    return torch.load(folder / "model_best.pth", weights_only=True)


def test_the_best_checkpoint_is_that_of_the_best_evaluation(tmp_path):
    Run(tmp_path, [1.0, 7.0, math.nan, 3.0]).run(0, 8)
    assert best(tmp_path)["model"]["weight"].item() == 3
    assert best(tmp_path)["trainer"]["hooks"]["BestCheckpointer"]["best"] == 7.0


def test_the_best_value_outlives_a_resume(tmp_path):
    Run(tmp_path, [7.0]).run(0, 2)
    resumed = Run(tmp_path, [7.0, 5.0, 9.0])
    resumed.checkpointer.resume_or_load("", resume=True)
    assert resumed.iter == 1
    resumed.run(resumed.iter + 1, 4)
    assert best(tmp_path)["model"]["weight"].item() == 1
    resumed.run(4, 6)
    assert best(tmp_path)["model"]["weight"].item() == 5


def test_a_last_evaluation_that_is_the_best_is_saved_under_the_last_iteration(tmp_path):
    Run(tmp_path, [1.0, 2.0]).run(0, 4)
    assert best(tmp_path)["trainer"]["iteration"] == 3


@pytest.mark.parametrize("iteration", [0, 2, 3])
def test_a_run_that_an_error_ends_is_not_evaluated_and_keeps_its_checkpoint(tmp_path, iteration):
    run, evaluated = Run(tmp_path, [1.0, 2.0]), []
    run.register_hooks([EvalHook(2, lambda: evaluated.append(run.iter))])
    steps = run.run_step

    def step_or_fail():
        steps()
        if run.iter == iteration:
            raise FloatingPointError(f"diverged at {iteration}")

    run.run_step = step_or_fail
    with pytest.raises(FloatingPointError, match=f"diverged at {iteration}"):
        run.run(0, 4)
    assert evaluated == [1] * (iteration > 1)
    if iteration > 1:
        assert best(tmp_path)["trainer"]["iteration"] == 1


def test_a_run_that_ends_well_is_evaluated_last(tmp_path):
    run, evaluated = Run(tmp_path, [1.0, 2.0]), []
    run.register_hooks([EvalHook(2, lambda: evaluated.append(run.iter))])
    run.run(0, 4)
    assert evaluated == [1, 4]


def test_metric_of_the_best_checkpoint(configs):
    def metric(*opts):
        return best_metric(load_cfg(str(configs / "quickstart.yaml"), list(opts)))

    assert metric() == "segm/AP"
    assert metric("MODEL.MASK_ON", "False") == "bbox/AP"
    assert metric("TEST.BEST_METRIC", "bbox/AP50") == "bbox/AP50"
    assert metric("DATASETS.TEST", "('digits_val', 'digits_train')") == "digits_val/segm/AP"
    assert metric("DATASETS.TEST", "()") is None


class Quadratic(torch.nn.Module):
    """Two parameters with gradients 30 and 40 at the start; the loss is what `loss` makes of it."""

    def __init__(self, loss=lambda x: x):
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor(0.0))
        self.b = torch.nn.Parameter(torch.tensor(0.0))
        self.loss = loss

    def forward(self, data):
        return {"loss_a": self.loss(30 * self.a), "loss_b": 40 * self.b}


def make_step(model, clip_type="full_model", enabled=True, action="stop"):
    clip = CfgNode({"ENABLED": enabled, "CLIP_TYPE": clip_type, "CLIP_VALUE": 1.0, "NORM_TYPE": 2.0})
    faults = {"ON_DIVERGENCE": action, "MAX_SKIPPED_STEPS": 2, "MAX_ROLLBACKS": 1, "SPIKE_FACTOR": 20.0}
    solver = {"AMP": {"ENABLED": False}, "CLIP_GRADIENTS": clip, **faults}
    cfg = CfgNode({"MODEL": {"DEVICE": "cpu"}, "SOLVER": solver})
    return Step(model, iter([None] * 9), torch.optim.SGD(model.parameters(), lr=1.0), cfg)


def test_gradients_are_clipped_by_their_total_norm():
    model = Quadratic()
    with EventStorage() as storage:
        make_step(model).run_step()
        assert storage.latest()["grad_norm"][0] == pytest.approx(50)
    assert (model.a.item(), model.b.item()) == pytest.approx((-0.6, -0.8))
    unclipped = Quadratic()
    with EventStorage():
        make_step(unclipped, enabled=False).run_step()
    assert (unclipped.a.item(), unclipped.b.item()) == pytest.approx((-30, -40))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            lambda x: x + math.inf,
            r"iteration 0\. The loss is not finite\. Loss terms: \{'loss_a': inf, 'loss_b': 0\.0\}",
        ),
        # A finite loss with an infinite slope.
        (lambda x: (x + 0.0).sqrt(), r"iteration 0\. The gradient is not finite\. Loss terms: \{'loss_a': 0\.0"),
    ],
)
def test_divergence_stops_before_the_weights_change(loss, message):
    model = Quadratic(loss)
    with EventStorage(), pytest.raises(FloatingPointError, match=message):
        make_step(model).run_step()
    assert (model.a.item(), model.b.item()) == (0, 0)


@pytest.mark.parametrize(
    ("opts", "iterations", "factors"),
    [
        # Warm-up over the first tenth, a step at 80 % and at 90 %.
        (["SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.STEPS", "(80, 90)"], (50, 85, 95), (1, 0.1, 0.01)),
        (["SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"], (50, 99), (0.5, 0.5 * (1 + math.cos(0.99 * math.pi)))),
    ],
)
def test_learning_rate_follows_steps_or_cosine_after_the_warm_up(configs, opts, iterations, factors):
    opts = [*opts, "SOLVER.MAX_ITER", "100", "SOLVER.WARMUP_ITERS", "10", "SOLVER.BASE_LR", "1.0"]
    cfg = load_cfg(str(configs / "quickstart.yaml"), opts)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = Trainer.build_lr_scheduler(cfg, optimizer)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[0] == pytest.approx(cfg.SOLVER.WARMUP_FACTOR)
    assert [rates[i] for i in iterations] == pytest.approx(factors)
