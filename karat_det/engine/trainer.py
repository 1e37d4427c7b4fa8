"""The training loop: Detectron2's, with bfloat16 on any device, clipping by the total norm, and an answer to NaN."""

import logging
import math
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, build_detection_test_loader, build_detection_train_loader
from detectron2.engine import DefaultTrainer, SimpleTrainer, TrainerBase, create_ddp_model
from detectron2.engine.hooks import EvalHook, HookBase, LRScheduler, PeriodicCheckpointer, PeriodicWriter
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel

from ..checkpoint.loading import SafeCheckpointer
from ..checkpoint.run_folder import clear_partial, end_metrics, first_not_finite
from ..data.dataset_check import load_checked_dicts
from ..data.mapper import MappedImages, build_mapper
from ..evaluation.coco import FasterCOCOEvaluator
from . import signals
from .divergence import Divergence
from .full_disk import Writers, full_disk_named
from .hooks import BestCheckpointer, Checkpoints, Evaluation, save_after_failure
from .optimizer import FULL_MODEL, build_optimizer, load_optimizer_state, optimizer_state
from .order import CountedLoader, SeededImages, build_order
from .processes import RunFailed, agree
from .resumption import Resumption

logger = logging.getLogger(__name__)

# The running mean by which Detectron2's RetinaNet divides its losses; it is no part of the weights.
_NORMALIZER = "loss_normalizer"


class Trainer(DefaultTrainer):
    """Trains and evaluates a detector from a config.

    It is Detectron2's DefaultTrainer with this project's optimiser, mapper, evaluator and checkpointer. It runs on
    GPUs and on the CPU, in one process or in many.

    Args:
        cfg: a config of `load_cfg`.

    Raises:
        ValueError, FileNotFoundError: the datasets or the model's sizes do not fit the config.
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
        self._trainer.checkpointer = self.checkpointer
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[HookBase | None]:
        solver = self.cfg.SOLVER
        # Detectron2's hook is the main process's alone.
        hooks = [hook for hook in super().build_hooks() if not isinstance(hook, PeriodicCheckpointer)]
        checkpoints = Checkpoints(
            self.checkpointer, solver.CHECKPOINT_PERIOD, solver.CHECKPOINT_MINUTES, solver.KEEP_CHECKPOINTS
        )
        hooks = [Rates() if isinstance(hook, LRScheduler) else hook for hook in hooks]
        hooks = [Writers(hook._writers) if isinstance(hook, PeriodicWriter) else hook for hook in hooks]
        index = next(i for i, hook in enumerate(hooks) if isinstance(hook, EvalHook))
        hooks[index : index + 1] = [checkpoints, Evaluation(hooks[index], checkpoints)]
        if metric := best_metric(self.cfg):
            # After the evaluation, before the writers.
            hooks.insert(index + 2, BestCheckpointer(self.cfg.TEST.EVAL_PERIOD, self.checkpointer, metric))
        evaluations = Evaluation, BestCheckpointer
        self.resumption = Resumption(f"{self.cfg.OUTPUT_DIR}/metrics.json", metric or "", evaluations)
        return [*hooks, self.resumption]

    def resume_or_load(self, resume: bool = True) -> None:
        super().resume_or_load(resume)
        if resume and not self.start_iter:
            self.resumption.start_again()

    def build_writers(self):
        clear_partial(self.cfg.OUTPUT_DIR)
        end_metrics(f"{self.cfg.OUTPUT_DIR}/metrics.json")
        return super().build_writers()

    def train(self) -> None:
        """Trains. The first signal, see karat_det.engine.signals, ends it with a checkpoint."""
        with signals.awaited(), full_disk_named(self.cfg.OUTPUT_DIR):
            super().train()

    def after_train(self) -> None:
        if self.iter < self.max_iter:
            # An error ended the run. In the last iteration Detectron2 would still evaluate what it left behind.
            self._hooks = [hook for hook in self._hooks if not isinstance(hook, (EvalHook, BestCheckpointer))]
            for checkpoints in self._hooks:
                if isinstance(checkpoints, Checkpoints):
                    save_after_failure(self, self._trainer, checkpoints.save)
        # A run that had had its last iteration counts it again.
        self.iter = min(self.iter, self.max_iter)
        super().after_train()

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        # When training is over Detectron2 counts one further; what is saved then is still the last iteration's.
        state["iteration"] = min(self.iter, self.max_iter - 1)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError if the state is not such a run's, or is beyond SOLVER.MAX_ITER."""
        with foreign_state_refused():
            done = checked_iteration(state) + 1
            if done > self.max_iter:
                raise ValueError(f"SOLVER.MAX_ITER is {self.max_iter}, and the run has had {done} iterations already.")
            super().load_state_dict(state)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: torch.nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> CountedLoader:
        records = load_checked_dicts(cfg)
        order = build_order(cfg, records)
        mapper = build_mapper(cfg, is_train=True)
        images = MappedImages(DatasetFromList(records, copy=False), mapper, ", ".join(cfg.DATASETS.TRAIN))
        loader = build_detection_train_loader(
            SeededImages(images, order),
            mapper=None,
            sampler=order,
            total_batch_size=cfg.SOLVER.IMS_PER_BATCH,
            # It would make the order depend on the batch and the processes, and the model pads images to its own size.
            aspect_ratio_grouping=False,
            num_workers=cfg.DATALOADER.NUM_WORKERS,
        )
        return CountedLoader(signals.leave_to_parent(loader), order, cfg.SOLVER.IMS_PER_BATCH)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        loader = build_detection_test_loader(cfg, dataset_name, mapper=build_mapper(cfg, is_train=False))
        return signals.leave_to_parent(loader)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str):
        # Named, since a model that predicts nothing yet would be measured by its boxes alone.
        tasks = ("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",)
        return FasterCOCOEvaluator(dataset_name, tasks, output_dir=f"{cfg.OUTPUT_DIR}/inference/{dataset_name}")


def best_metric(cfg: CfgNode) -> str | None:
    """Name in the storage of the best checkpoint's metric; None without a test set."""
    if not cfg.DATASETS.TEST:
        return None
    # Detectron2 names the dataset where there are several; the first one decides.
    prefix = f"{cfg.DATASETS.TEST[0]}/" if len(cfg.DATASETS.TEST) > 1 else ""
    return prefix + (cfg.TEST.BEST_METRIC or ("segm/AP" if cfg.MODEL.MASK_ON else "bbox/AP"))


class Step(SimpleTrainer):
    """One optimiser step: forward under bfloat16 if SOLVER.AMP.ENABLED, backward, clip, update.

    Detectron2's AMPTrainer is for CUDA and float16; bfloat16 needs no loss scaling, and runs on the CPU too.
    SOLVER.ON_DIVERGENCE sets what happens if a loss, a gradient or the update is not finite.

    Attributes:
        updated: whether the last step has changed the weights.
        intact: whether an error in this step leaves all processes as before it, except for what `undo` undoes.
        checkpointer: the run's, once there is one.
    """

    def __init__(self, model, data_loader, optimizer, cfg: CfgNode):
        super().__init__(model, data_loader, optimizer)
        self.autocast = autocast_arguments(cfg)
        clip = cfg.SOLVER.CLIP_GRADIENTS
        # An infinite bound leaves gradients as they are, and still measures them.
        self.max_norm = clip.CLIP_VALUE if clip.ENABLED and clip.CLIP_TYPE == FULL_MODEL else math.inf
        self.norm_type = clip.NORM_TYPE
        self.last_losses: dict[str, float] = {}
        self.divergence = Divergence(cfg.SOLVER)
        self.checkpointer: SafeCheckpointer | None = None
        self.updated = self.intact = False
        norms = [module for module in model.modules() if isinstance(module, _NormBase)]
        self._statistics = [buffer for norm in norms for buffer in norm.buffers()]

    def run_step(self) -> None:
        order = getattr(self.data_loader, "order", None)  # A benchmark's images have none.
        statistics = [buffer.clone() for buffer in self._statistics]
        self._before = getattr(order, "place", 0), statistics, getattr(unwrapped(self.model), _NORMALIZER, None)
        # One of several processes may fail alone.
        self.intact = comm.get_world_size() == 1
        start = time.perf_counter()
        data = self._next_images()
        data_time = time.perf_counter() - start
        before, self.updated = self.last_losses, False
        losses, reason = {}, ""
        try:
            # TorchScript, as RetinaNet's loss is, is optimised after some steps, and then rounds in another way.
            optimized = self.autocast["device_type"] != "cpu"
            with torch.autocast(**self.autocast), torch.jit.optimized_execution(optimized):
                losses = self.model(data)
        except FloatingPointError as error:
            # Detectron2's RPN sees NaN before there is a loss.
            reason = f"{error} Loss terms of the step before: {before or 'none'}."
        terms = {name: loss.item() for name, loss in losses.items()}
        if not all(map(math.isfinite, terms.values())):
            reason = f"The loss is not finite. Loss terms: {terms}; of the step before: {before or 'none'}."
        # Before the backward pass, in which each process would wait for the others.
        if agree(bool(reason))[0]:
            self._diverged(reason or "The loss of another process is not finite.")
            return
        self.last_losses = terms
        self.optimizer.zero_grad()
        sum(losses.values()).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm, self.norm_type).item()
        if not math.isfinite(norm):
            self._diverged(f"The gradient is not finite. Loss terms: {terms}.")
            return
        if spike := self.divergence.spike(norm):
            self._diverged(spike)
            return
        self._write_metrics(losses, data_time)
        self._count(grad_norm=norm)
        self.intact = False
        for group in self.optimizer.param_groups:
            # The schedule sets the rate anew for each step.
            group["lr"] *= self.divergence.rate_factor
        self.optimizer.step()
        self.updated = True
        if lost := first_not_finite(dict(self.model.named_parameters())):
            self._diverged(f"The update made {lost} not finite. Loss terms: {terms}.", lost)
            return
        self.divergence.passed(norm)

    def undo(self) -> None:
        """Takes back the changes of a step without an update."""
        self.data_loader.order.place = self._before[0]
        self._undo_forward()

    def _undo_forward(self) -> None:
        _, statistics, normalizer = self._before
        for buffer, before in zip(self._statistics, statistics, strict=True):
            buffer.copy_(before)
        if normalizer is not None:
            setattr(unwrapped(self.model), _NORMALIZER, normalizer)

    def _next_images(self) -> Any:
        """The images of this step. If one process has none, all fail, so that they can save the run together."""
        images = failure = None
        try:
            with signals.images_awaited():
                images = next(self._data_loader_iter)
        except Exception as error:
            failure = error
        if agree(failure is not None)[0]:
            self.intact = True
            raise failure or RunFailed("Another process has no images for this step, and says why.")
        return images

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        state["optimizer"] = optimizer_state(self.optimizer, unwrapped(self.model))
        if (normalizer := getattr(unwrapped(self.model), _NORMALIZER, None)) is not None:
            # Each process has its own.
            state["loss_normalizers"] = comm.all_gather(normalizer)
        return {**state, "order": self.data_loader.order.state_dict(), "divergence": self.divergence.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError where the state is not of such a run."""
        load_optimizer_state(self.optimizer, unwrapped(self.model), state.get("optimizer"))
        TrainerBase.load_state_dict(self, state)
        self.data_loader.order.load_state_dict(state.get("order"))
        self.divergence.load_state_dict(state.get("divergence", {}))
        if normalizers := [float(each) for each in state.get("loss_normalizers", ())]:
            # With other processes, their mean.
            alike = len(normalizers) == comm.get_world_size()
            own = normalizers[comm.get_rank()] if alike else sum(normalizers) / len(normalizers)
            setattr(unwrapped(self.model), _NORMALIZER, own)
        # Images loaded ahead are for another place.
        self._data_loader_iter_obj = None

    def restore(self) -> str:
        """Gives the run the weights, their averages and the optimiser's state of its last checkpoint.

        Its iteration, its schedule and its place in the order of images stay.

        Returns:
            Path of the checkpoint; "" if there is none.
        """
        if not (self.checkpointer and self.checkpointer.has_checkpoint()):
            return ""
        path, content = self.checkpointer.last_that_can_be_read()
        self.checkpointer.model.load_state_dict(content["model"])
        for key, held in self.checkpointer.checkpointables.items():
            if isinstance(held, torch.nn.Module):
                held.load_state_dict(content[key])
        trainer = content["trainer"]
        state = trainer["_trainer"] if "_trainer" in trainer else trainer["step"]
        load_optimizer_state(self.optimizer, unwrapped(self.model), state["optimizer"])
        return path

    def _diverged(self, reason: str, lost: str = "") -> None:
        lost = lost or first_not_finite(dict(self.model.named_parameters()))
        folder = self.checkpointer.save_dir if self.checkpointer else ""
        self._undo_forward()
        self.intact = False
        self.divergence.answer(reason, self.iter, lost, folder, self.restore)
        self.updated = False
        self._count()

    def _count(self, **scalars: float) -> None:
        counts = {"skipped_steps": self.divergence.skipped, "rollbacks": self.divergence.rollbacks}
        get_event_storage().put_scalars(smoothing_hint=False, **counts)
        get_event_storage().put_scalars(**scalars)


@contextmanager
def foreign_state_refused(what: str = "It") -> Iterator[None]:
    """A context that turns errors of reading an invalid state into a ValueError with the subject `what`."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{what} holds no state of a run to resume ({type(error).__name__}: {error}).") from error


def checked_iteration(state: Any) -> int:
    """The last iteration of a run's state; raises ValueError if it is invalid."""
    iteration = state["iteration"]
    if type(iteration) is not int or not 0 <= iteration < 2**63:
        raise ValueError(f"Its last iteration is {iteration!r}, which is none.")
    return iteration


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The model, without a DistributedDataParallel around it."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def autocast_arguments(cfg: CfgNode) -> dict[str, Any]:
    """Arguments of torch.autocast: bfloat16 if SOLVER.AMP.ENABLED."""
    return {
        "device_type": torch.device(cfg.MODEL.DEVICE).type,
        "dtype": torch.bfloat16,
        "enabled": cfg.SOLVER.AMP.ENABLED,
    }


class Rates(LRScheduler):
    """Detectron2's hook, but a resumed run has the config's rates, not the checkpoint's."""

    def before_train(self) -> None:
        super().before_train()
        self.go_to(self.trainer.start_iter)

    def go_to(self, iteration: int) -> None:
        """Sets the rates for the beginning of an iteration."""
        self.scheduler.last_epoch = iteration
        for group, rate in zip(self._optimizer.param_groups, self.scheduler.get_lr(), strict=True):
            group["lr"] = rate

    def state_dict(self) -> dict[str, Any]:
        return {}
