"""The training loop: Detectron2's, with bfloat16 on any device, clipping by the total norm, and a stop at NaN."""

import logging
import math
import time
import weakref
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.engine import DefaultTrainer, SimpleTrainer, TrainerBase, create_ddp_model
from detectron2.engine.hooks import EvalHook, HookBase, PeriodicCheckpointer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage

from ..checkpoint.loading import SafeCheckpointer
from ..checkpoint.run_folder import clear_partial, end_metrics
from ..data.mapper import build_mapper
from ..data.registration import load_checked_dicts
from ..evaluation.coco import FasterCOCOEvaluator
from . import signals
from .hooks import Checkpoints, Evaluation
from .optimizer import FULL_MODEL, build_optimizer

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """Trains and evaluates a detector from a config.

    It is Detectron2's DefaultTrainer with this project's optimiser, mapper, evaluator and checkpointer. It runs on
    GPUs and on the CPU, in one process or in many.

    Args:
        cfg: a config of `load_cfg`.

    Raises:
        ValueError, FileNotFoundError: the datasets or the model's sizes are not what the config needs.
    """

    def __init__(self, cfg: CfgNode):
        TrainerBase.__init__(self)
        self.cfg = cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        # The model first: its sizes are checked in seconds, while COCO takes half a minute to load.
        model = self.build_model(cfg)
        data_loader = self.build_train_loader(cfg)
        optimizer = self.build_optimizer(cfg, model)
        on_cpu = {"device_ids": None} if cfg.MODEL.DEVICE == "cpu" else {}
        model = create_ddp_model(model, broadcast_buffers=False, **on_cpu)
        self._trainer = Step(model, data_loader, optimizer, cfg)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = SafeCheckpointer(
            model, cfg.OUTPUT_DIR, strict=cfg.MODEL.WEIGHTS_STRICT, trainer=weakref.proxy(self)
        )
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[HookBase | None]:
        solver = self.cfg.SOLVER
        # Detectron2's hook is the main process's alone.
        hooks = [hook for hook in super().build_hooks() if not isinstance(hook, PeriodicCheckpointer)]
        checkpoints = Checkpoints(
            self.checkpointer, solver.CHECKPOINT_PERIOD, solver.CHECKPOINT_MINUTES, solver.KEEP_CHECKPOINTS
        )
        index = next(i for i, hook in enumerate(hooks) if isinstance(hook, EvalHook))
        hooks[index : index + 1] = [checkpoints, Evaluation(hooks[index], checkpoints)]
        if metric := best_metric(self.cfg):
            # After the evaluation, before the writers.
            hooks.insert(index + 2, BestCheckpointer(self.cfg.TEST.EVAL_PERIOD, self.checkpointer, metric))
        return hooks

    def build_writers(self):
        clear_partial(self.cfg.OUTPUT_DIR)
        end_metrics(f"{self.cfg.OUTPUT_DIR}/metrics.json")
        return super().build_writers()

    def train(self) -> None:
        """Trains. The first signal, see karat_det.engine.signals, ends it with a checkpoint."""
        with signals.awaited():
            super().train()

    def after_train(self) -> None:
        if self.iter < self.max_iter:
            # An error ended the run. In the last iteration Detectron2 would still evaluate what it left behind.
            self._hooks = [hook for hook in self._hooks if not isinstance(hook, (EvalHook, BestCheckpointer))]
        super().after_train()

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        # When training is over Detectron2 counts one further; what is saved then is still the last iteration's.
        state["iteration"] = min(self.iter, self.max_iter - 1)
        return state

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: torch.nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        mapper = build_mapper(cfg, is_train=True)
        return build_detection_train_loader(cfg, dataset=load_checked_dicts(cfg), mapper=mapper)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        return build_detection_test_loader(cfg, dataset_name, mapper=build_mapper(cfg, is_train=False))

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str):
        # Named, since a model that predicts nothing yet would be measured by its boxes alone.
        tasks = ("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",)
        return FasterCOCOEvaluator(dataset_name, tasks, output_dir=f"{cfg.OUTPUT_DIR}/inference/{dataset_name}")


def best_metric(cfg: CfgNode) -> str | None:
    """Name under which the metric that decides the best checkpoint is stored; None without a test set."""
    if not cfg.DATASETS.TEST:
        return None
    # Detectron2 names the dataset where there are several; the first one decides.
    prefix = f"{cfg.DATASETS.TEST[0]}/" if len(cfg.DATASETS.TEST) > 1 else ""
    return prefix + (cfg.TEST.BEST_METRIC or ("segm/AP" if cfg.MODEL.MASK_ON else "bbox/AP"))


class Step(SimpleTrainer):
    """One optimiser step: forward under bfloat16 if SOLVER.AMP.ENABLED, backward, clip, update.

    Detectron2's AMPTrainer is for CUDA and float16; bfloat16 needs no loss scaling, and runs on the CPU too.
    """

    def __init__(self, model, data_loader, optimizer, cfg: CfgNode):
        super().__init__(model, data_loader, optimizer)
        self.autocast = autocast_arguments(cfg)
        clip = cfg.SOLVER.CLIP_GRADIENTS
        # An infinite bound leaves gradients as they are, and still measures them.
        self.max_norm = clip.CLIP_VALUE if clip.ENABLED and clip.CLIP_TYPE == FULL_MODEL else math.inf
        self.norm_type = clip.NORM_TYPE
        self.last_losses: dict[str, float] = {}

    def run_step(self) -> None:
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        try:
            with torch.autocast(**self.autocast):
                losses = self.model(data)
        except FloatingPointError as error:
            # Detectron2's RPN sees NaN before there is a loss.
            raise self._diverged(f"{error} Loss terms of the step before: {self.last_losses or 'none'}.") from error
        self.optimizer.zero_grad()
        sum(losses.values()).backward()
        before, self.last_losses = self.last_losses, {name: loss.item() for name, loss in losses.items()}
        if not all(map(math.isfinite, self.last_losses.values())):
            raise self._diverged(
                f"The loss is not finite. Loss terms: {self.last_losses}; of the step before: {before or 'none'}."
            )
        self._write_metrics(losses, data_time)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm, self.norm_type).item()
        if not math.isfinite(norm):
            raise self._diverged(f"The gradient is not finite. Loss terms: {self.last_losses}.")
        get_event_storage().put_scalar("grad_norm", norm)
        self.optimizer.step()

    def _diverged(self, what: str) -> FloatingPointError:
        return FloatingPointError(
            f"Training diverged at iteration {self.iter}. {what} This step updated no weights and wrote no checkpoint; "
            "the last one is whole. Try a lower SOLVER.BASE_LR, a longer warm-up, MODEL.KARAT.INIT scaled, or "
            "SOLVER.AMP.ENABLED False."
        )


def autocast_arguments(cfg: CfgNode) -> dict[str, Any]:
    """Arguments of torch.autocast: bfloat16 if SOLVER.AMP.ENABLED."""
    return {
        "device_type": torch.device(cfg.MODEL.DEVICE).type,
        "dtype": torch.bfloat16,
        "enabled": cfg.SOLVER.AMP.ENABLED,
    }


class BestCheckpointer(HookBase):
    """Keeps the checkpoint with the best metric as model_best.pth.

    Unlike Detectron2's hook of this name it remembers the best value across --resume.

    Args:
        period: iterations between evaluations, as in Detectron2's EvalHook; 0 for none but the last.
        checkpointer: saves the run.
        metric: name of the metric among the evaluation's results, for example "segm/AP". Higher is better.
    """

    def __init__(self, period: int, checkpointer: SafeCheckpointer, metric: str):
        self.period = period
        self.checkpointer = checkpointer
        self.metric = metric
        self.best = -math.inf

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if self.period > 0 and done % self.period == 0 and done != self.trainer.max_iter:
            self._keep_if_best()

    def after_train(self) -> None:
        self._keep_if_best()

    def _keep_if_best(self) -> None:
        # Only the main process has results.
        value = comm.all_gather(self.trainer.storage.latest().get(self.metric, (math.nan, 0))[0])[0]
        if value > self.best:
            logger.info("%s is %.3f, the best so far: saving model_best.pth", self.metric, value)
            self.best = value
            self.checkpointer.save("model_best")

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = state["best"]
