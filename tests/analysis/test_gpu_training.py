"""What a GPU is asked about training, asked of the CPU with a small detector."""

import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from forked_command import run_in_fork

from karat_det.analysis import benchmark_detector, gpu_training
from karat_det.analysis.check_runner import FAIL, FOR_THE_RECORD, PASS, Skip
from karat_det.analysis.gpu_training import (
    NUM_STEPS,
    Steps,
    check_processes,
    check_resume,
    check_training,
    take_steps,
    train_net,
)
from karat_det.engine.setup import load_cfg

SMALL_MODEL = [
    *("MODEL.VIT.EMBED_DIM", "24", "MODEL.VIT.DEPTH", "2", "MODEL.FPN.OUT_CHANNELS", "8"),
    *("MODEL.ROI_BOX_HEAD.CONV_DIM", "8", "MODEL.ROI_BOX_HEAD.FC_DIM", "8", "MODEL.ROI_MASK_HEAD.CONV_DIM", "8"),
    *("DATALOADER.NUM_WORKERS", "0", "SOLVER.IMS_PER_BATCH", "2"),
]


def check_small_training(configs, batch_sizes=(2,)):
    return check_training("cpu", configs / "quickstart.yaml", SMALL_MODEL, batch_sizes, num_steps=4)


def test_steps_in_bfloat16_are_compared_with_softmaxs(configs):
    rows = check_small_training(configs)
    what = "training: quickstart.yaml, 112 × 112, bfloat16, 2 images a step: "
    assert [(row.name.removeprefix(what), row.goal, row.result) for row in rows] == [
        ("loss", "finite", PASS),
        ("KArAt's loss over softmax's, last 1 steps", "0.80 to 1.20", PASS),
        ("images a second, KArAt over softmax", FOR_THE_RECORD, PASS),
        ("peak memory, KArAt over softmax", FOR_THE_RECORD, PASS),
    ]
    assert rows[0].measured.endswith(", in 4 steps")


def test_the_steps_learn(configs):
    opts = [*SMALL_MODEL, "MODEL.DEVICE", "cpu", "SOLVER.WARMUP_ITERS", "0", "SOLVER.BASE_LR", "0.01"]
    cfg = load_cfg(str(configs / "quickstart.yaml"), opts)
    steps = take_steps(cfg, batch_size=2, num_steps=12)
    assert len(steps.losses) == 12
    assert steps.losses[-1] < 0.97 * steps.losses[0]
    assert steps.images_per_second > 0


def test_a_step_that_the_trainer_skips_is_not_finite(configs, monkeypatch):
    class NaNOnce(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.inside, self.calls = model, 0

        def forward(self, data):
            self.calls += 1
            losses = self.inside(data)
            return {name: loss * (math.nan if self.calls == 3 else 1) for name, loss in losses.items()}

    def make_step(cfg, batch_size):
        step = benchmark_detector.make_step(cfg, batch_size)
        step.model = NaNOnce(step.model)
        return step

    monkeypatch.setattr(gpu_training, "make_step", make_step)
    rows = check_small_training(configs)
    assert [row.result for row in rows] == [FAIL, FAIL, PASS, PASS]


@pytest.mark.parametrize(
    "losses, results",
    [
        ([5.0, 4.7], [PASS, PASS]),
        ([5.0, 4.9], [PASS, FAIL]),
        ([5.0, math.nan], [FAIL, FAIL]),
        ([math.inf, 4.0], [FAIL, FAIL]),
    ],
)
def test_losses_have_to_be_finite_and_close(configs, monkeypatch, losses, results):
    def take(cfg, batch_size, num_steps):
        return Steps(losses if cfg.MODEL.KARAT.ENABLED else [5.0, 4.0], images_per_second=3.0, peak_bytes=2**30)

    monkeypatch.setattr(gpu_training, "take_steps", take)
    assert [row.result for row in check_small_training(configs)][:2] == results


def test_fewer_images_are_tried_where_the_memory_does_not_suffice(configs, monkeypatch):
    tried = []

    def take(cfg, batch_size, num_steps):
        tried.append((cfg.MODEL.KARAT.ENABLED, batch_size))
        # KArAt needs more here: softmax has to be measured again with as many images.
        if batch_size > (1 if cfg.MODEL.KARAT.ENABLED else 2):
            raise torch.OutOfMemoryError
        return Steps([5.0, 4.0], images_per_second=3.0, peak_bytes=2**30)

    monkeypatch.setattr(gpu_training, "take_steps", take)
    rows = check_small_training(configs, batch_sizes=(4, 2, 1))
    assert all("1 images a step" in row.name for row in rows)
    assert tried == [(False, 4), (False, 2), (True, 2), (False, 1), (True, 1)]

    monkeypatch.setattr(gpu_training, "_memory", lambda device: 2**32)
    with pytest.raises(Skip, match=r"a step of 2 images needs more memory than this GPU's 4\.0 GiB"):
        check_small_training(configs, batch_sizes=(2,))


def test_a_resumed_run_that_differs_fails(tmp_path, monkeypatch):
    torch.manual_seed(0)

    def run(device, root, opts, folder, output, *arguments, launcher=()):
        assert ("--resume" in arguments) == (output.name == "resumed")
        output.mkdir(exist_ok=True)
        # Of the same size, the changes of both since the checkpoint are one in ten alike.
        for done in range(1, NUM_STEPS + 1):
            weight = torch.full((1000,), 0.1 * done) + torch.randn(1000) * (done > 4)
            if not (output / f"model_{done - 1:07d}.pth").exists():
                torch.save({"model": {"weight": weight}}, output / f"model_{done - 1:07d}.pth")

    monkeypatch.setattr(gpu_training, "train_net", run)
    assert [row.result for row in check_resume("cpu", tmp_path, [], tmp_path)] == [FAIL, FAIL]


def test_several_processes_train(tmp_path, configs):
    """By gloo; one of them, since tests/tools/test_train_net.py has two."""
    (row,) = check_processes("cpu", configs.parent, SMALL_MODEL, tmp_path, num_processes=1)
    assert (row.name, row.goal, row.result) == ("1 processes by gloo, torchrun", "finite", PASS)
    assert "after 8 steps" in row.measured


def test_more_processes_than_gpus_are_skipped(tmp_path):
    with pytest.raises(Skip, match="needs 2 GPUs, and PyTorch finds 0 here"):
        check_processes("cuda", tmp_path, [], tmp_path)


def test_nothing_trains_on_the_cpu_instead(tmp_path, configs):
    """As configs and tools/train_net.py do where there is no GPU."""
    with pytest.raises(RuntimeError, match="finds no GPU"):
        check_training("cuda", configs / "quickstart.yaml", SMALL_MODEL, [2])
    with pytest.raises(RuntimeError, match="finds no GPU"):
        check_resume("cuda", configs.parent, SMALL_MODEL, tmp_path)


def test_a_run_that_fails_is_an_error(tmp_path, configs):
    shutil.copytree(configs, tmp_path / "configs")
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "train_net.py").write_text("raise SystemExit(7)")
    with pytest.raises(RuntimeError, match=r"tools/train_net\.py ended with status 7: .*OUTPUT_DIR"):
        train_net("cpu", tmp_path, [], tmp_path, tmp_path / "out")


def test_a_resumed_run_and_an_unbroken_one_end_with_the_same_weights(tmp_path, configs, monkeypatch):
    monkeypatch.setattr(gpu_training, "subprocess", SimpleNamespace(run=run_in_fork, DEVNULL=None))
    rows = check_resume("cpu", configs.parent, SMALL_MODEL, tmp_path)
    assert [row.name.rpartition(", ")[2] for row in rows] == ["one step later", "4 steps later"]
    assert [(row.measured, row.result) for row in rows] == 2 * [
        ("they differ by 0.0e+00 of what changed since the checkpoint", PASS)
    ]
    assert not list(tmp_path.iterdir())
