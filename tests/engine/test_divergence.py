"""What becomes of a run whose loss, gradient or update is not what training needs."""

import math

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine import TrainerBase, create_ddp_model
from detectron2.engine.hooks import HookBase
from detectron2.utils import comm
from forked import in_processes

from karat_det.checkpoint.loading import SafeCheckpointer
from karat_det.engine.hooks import Checkpoints
from karat_det.engine.order import ImageOrder
from karat_det.engine.trainer import Step


class Line(torch.nn.Module):
    """One weight, whose gradient is the number that a batch holds; the batch "early" fails as Detectron2's RPN does."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.0))
        self.norm = torch.nn.BatchNorm1d(1, affine=False)

    def forward(self, batch):
        if batch == "early":
            raise FloatingPointError("Predicted boxes or scores contain Inf/NaN.")
        if batch == "loss":
            return {"loss": self.weight + math.inf}
        self.norm(torch.full((2, 1), batch))
        return {"loss": self.weight * batch}


class Batches(list):
    """A loader of batches, with its place in an order of images."""

    def __init__(self, batches):
        super().__init__(batches)
        self.order = ImageOrder(torch.ones(9), seed=0)


class Run(TrainerBase):
    """Takes a step for each batch; saves every second step if it has a folder."""

    def __init__(self, batches, folder=None, period=2, rate=1.0, **solver):
        super().__init__()
        keys = {"ON_DIVERGENCE": "skip_not_finite", "MAX_SKIPPED_STEPS": 2, "MAX_ROLLBACKS": 3, "SPIKE_FACTOR": 20.0}
        clip = {"ENABLED": False, "CLIP_TYPE": "norm", "CLIP_VALUE": 1.0, "NORM_TYPE": 2.0}
        solver = {"AMP": {"ENABLED": False}, "CLIP_GRADIENTS": clip, **keys, **solver}
        cfg = CfgNode({"MODEL": {"DEVICE": "cpu"}, "SOLVER": solver})
        self.model, self.rate, self.max_iter = Line(), rate, len(batches)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=rate)
        self.step = Step(self.model, Batches(batches), self.optimizer, cfg)
        self.rates, self.counts = [], []
        if folder:
            self.step.checkpointer = SafeCheckpointer(self.model, str(folder), trainer=self)
            self.register_hooks([Checkpoints(self.step.checkpointer, period, 0)])

    def run_step(self):
        self.step.iter = self.iter
        self.optimizer.param_groups[0]["lr"] = self.rate  # as schedules do
        self.step.run_step()
        if self.step.updated:
            self.rates.append(self.optimizer.param_groups[0]["lr"])
        self.counts.append(int(self.storage.latest()["skipped_steps"][0]))

    def run(self):
        self.train(0, self.max_iter)
        return self

    @property
    def weight(self):
        return self.model.weight.item()

    def state_dict(self):
        return {**super().state_dict(), "step": self.step.state_dict()}


NOT_FINITE = (math.nan, math.inf, "loss", "early")


@pytest.mark.parametrize("action", ["skip_not_finite", "skip"])
@pytest.mark.parametrize("bad", NOT_FINITE)
def test_a_step_that_is_not_finite_updates_nothing_and_is_counted(caplog, action, bad):
    run = Run([-1.0, bad, -1.0, bad, bad, -1.0], ON_DIVERGENCE=action).run()
    assert run.weight == 3 and run.counts == [0, 1, 1, 2, 3, 3]
    assert run.model.norm.num_batches_tracked == 3
    assert run.model.norm.running_mean.item() == pytest.approx(0.9**3 - 1)
    assert "diverged at iteration 4" in caplog.text and "skipped, 2 in a row of at most 2" in caplog.text


@pytest.mark.parametrize("bad", NOT_FINITE)
def test_more_of_them_in_a_row_than_allowed_end_the_run(tmp_path, bad):
    batches = [-1.0, -1.0, bad, bad, bad, -1.0]
    with pytest.raises(FloatingPointError, match=r"iteration 4\. .* 2 steps in a row were skipped .* there is none"):
        Run(batches).run()
    with pytest.raises(FloatingPointError, match=r"The last good checkpoint is .*model_0000003.pth"):
        Run(batches, tmp_path).run()
    assert torch.load(tmp_path / "model_0000003.pth")["model"]["weight"] == 2


@pytest.mark.parametrize("bad", NOT_FINITE)
def test_stop_ends_at_the_first(bad):
    run = Run([-1.0, bad, -1.0], ON_DIVERGENCE="stop")
    with pytest.raises(FloatingPointError, match="Training diverged at iteration 1"):
        run.run()
    assert run.weight == 1


def test_a_spike_is_skipped_only_if_asked(caplog):
    batches = [-1.0] * 6 + [-21.0, -19.0, -1.0]
    assert Run(batches).run().weight == 47
    skipped = Run(batches, ON_DIVERGENCE="skip").run()
    assert skipped.weight == 26 and skipped.counts[-1] == 1
    assert "norm is 21, over 20 times the running median, 1" in caplog.text
    # Of the first steps there is no median yet.
    assert Run([-1.0, -21.0, -1.0], ON_DIVERGENCE="skip").run().weight == 23


def test_an_update_that_overflows_ends_the_run_and_is_not_saved(tmp_path):
    batches = [-1.0, 1.0, -3e38, -1.0]
    for action in ("stop", "skip", "skip_not_finite"):
        run = Run(batches, tmp_path / action, rate=2.0, ON_DIVERGENCE=action)
        with pytest.raises(FloatingPointError, match=r"iteration 2\. The update made weight not finite.*model_0000001"):
            run.run()
        assert [path.name for path in (tmp_path / action).glob("*.pth")] == ["model_0000001.pth"]
    assert Run(batches, tmp_path / "rollback", rate=2.0, ON_DIVERGENCE="rollback").run().weight == 1


@pytest.mark.parametrize("bad", NOT_FINITE)
def test_a_rollback_goes_on_from_the_last_checkpoint_with_other_images_at_half_the_rate(tmp_path, caplog, bad):
    # Saved after steps 1, 3, 5 and 7: what step 4 has added is lost, the image of step 5 is not seen again.
    run = Run([-1.0, -1.0, -1.0, -1.0, -100.0, bad, -1.0, -1.0], tmp_path, rate=2.0, ON_DIVERGENCE="rollback").run()
    assert run.weight == 4 * 2 + 2 * 1 and run.rates == [2, 2, 2, 2, 2, 1, 1]
    assert "Rolled back to the weights of" in caplog.text and "model_0000003.pth" in caplog.text
    assert run.step.divergence.rollbacks == 1
    assert torch.load(tmp_path / "model_final.pth")["trainer"]["step"]["divergence"]["rollbacks"] == 1


def test_a_spike_is_rolled_back_too(tmp_path):
    run = Run([-1.0] * 6 + [-21.0, -1.0], tmp_path, ON_DIVERGENCE="rollback").run()
    assert run.weight == 6.5


def test_a_run_is_rolled_back_three_times_at_most_and_not_without_a_checkpoint(tmp_path):
    batches = [-1.0, -1.0, math.nan, math.nan, math.nan, math.nan]
    with pytest.raises(FloatingPointError, match=r"iteration 5.*rolled back 3 times \(SOLVER.MAX_ROLLBACKS 3\)"):
        Run(batches, tmp_path / "a", period=2, ON_DIVERGENCE="rollback").run()
    with pytest.raises(FloatingPointError, match=r"iteration 0.*rolled back 0 times.*there is none"):
        Run([math.nan], tmp_path / "b", ON_DIVERGENCE="rollback").run()


def test_where_a_weight_is_not_finite_no_step_is_skipped_in_vain():
    run = Run([-1.0, -1.0])
    run.model.weight.data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="iteration 0"):
        run.run()


def test_counts_and_the_rate_outlive_a_resume(tmp_path):
    first = Run([-1.0] * 6 + [math.nan, -1.0], tmp_path, ON_DIVERGENCE="rollback").run()
    second = Run([-1.0], ON_DIVERGENCE="rollback")
    second.step.load_state_dict(first.step.state_dict())
    assert second.run().rates == [0.5] and list(second.step.divergence.norms) == [1.0, 1.0]
    old = {key: value for key, value in first.step.state_dict().items() if key != "divergence"}
    second.step.load_state_dict(old)  # a checkpoint from before there were counts
    for state in ([], {"skipped": -1}, {"norms": 3}, {"norms": ["x"]}, {"rollbacks": 2.0}):
        with pytest.raises(ValueError, match="which are none"):
            second.step.load_state_dict({**old, "divergence": state})


class Poison(HookBase):
    def after_step(self):
        if self.trainer.iter == 2:
            self.trainer.model.weight.data.fill_(math.inf)


def test_nothing_that_a_hook_has_spoilt_is_saved(tmp_path):
    run = Run([-1.0] * 4, tmp_path)
    run._hooks.insert(0, Poison())
    run._hooks[0].trainer = run
    with pytest.raises(FloatingPointError, match=r"not finite.*The last good checkpoint is .*model_0000001.pth"):
        run.run()
    assert [path.name for path in tmp_path.glob("*.pth")] == ["model_0000001.pth"]


def run_in_parallel():
    """Where runs end in which process 1 alone sees what is not finite, in one of two processes."""
    ends = []
    for bad in NOT_FINITE:
        run = Run([-1.0, bad if comm.get_rank() else -1.0, -1.0, -1.0])
        run.step.model = create_ddp_model(run.model, broadcast_buffers=False, device_ids=None)
        run.run()
        ends.append((run.weight, run.counts))
    return ends


def test_processes_skip_alike_where_one_alone_sees_what_is_not_finite(tmp_path):
    ends = [(3.0, [0, 1, 1, 1])] * len(NOT_FINITE)
    assert in_processes(tmp_path, 2, run_in_parallel) == [ends] * 2
