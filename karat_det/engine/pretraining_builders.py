"""Builds the parts of pretraining from the config: timm's data, loss, optimiser and schedule."""

import logging
from functools import partial

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils import comm
from PIL import Image
from timm.data import FastCollateMixup, create_loader, create_transform
from timm.data.auto_augment import RandAugment, posterize
from timm.data.loader import PrefetchLoader, fast_collate
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..data.classification import LabelledImages
from . import signals
from .checks import mixes_labels
from .optimizer import FULL_MODEL, NO_WEIGHT_DECAY
from .order import CountedLoader, EpochBatches, ImageOrder, SeededImages

logger = logging.getLogger(__name__)

# Images a step that SOLVER.BASE_LR is for.
_BASE_BATCH = 512


class WithLoss(nn.Module):
    """A classifier that takes batches of timm's loader, and returns a dict with its loss, as Detectron2's models do."""

    def __init__(self, model: nn.Module, cfg: CfgNode):
        super().__init__()
        self.model = model
        smoothing = cfg.AUG.LABEL_SMOOTHING
        # Mixed labels are smooth already.
        self.criterion = SoftTargetCrossEntropy() if mixes_labels(cfg) else LabelSmoothingCrossEntropy(smoothing)

    def forward(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        images, targets = batch
        return {"loss": self.criterion(self.model(images), targets)}


def build_train_loader(cfg: CfgNode, model: nn.Module, images: LabelledImages, order: ImageOrder) -> CountedLoader:
    """Builds a loader of augmented and mixed batches by timm's parts, this process's share of each.

    Args:
        cfg: a config with the keys of `pretrain_config`.
        model: timm's, with the size of its images.
        images: all images to train on; they get timm's transform.
        order: their order.
    """
    mixup = FastCollateMixup(
        mixup_alpha=cfg.AUG.MIXUP,
        cutmix_alpha=cfg.AUG.CUTMIX,
        prob=cfg.AUG.MIX_PROB,
        switch_prob=cfg.AUG.CUTMIX_PROB,
        label_smoothing=cfg.AUG.LABEL_SMOOTHING,
        num_classes=len(images.split.classes),
    )
    images.transform = create_transform(
        (3, *model.patch_embed.img_size),
        is_training=True,
        use_prefetcher=True,
        scale=tuple(cfg.AUG.SCALE),
        ratio=tuple(cfg.AUG.RATIO),
        hflip=cfg.AUG.FLIP,
        color_jitter=cfg.AUG.COLOR_JITTER,
        auto_augment=cfg.AUG.RAND_AUGMENT or None,
        interpolation="random",
        mean=tuple(cfg.DATA.MEAN),
        std=tuple(cfg.DATA.STD),
    )
    for transform in images.transform.transforms:
        if isinstance(transform, RandAugment):
            for operation in transform.ops:
                if operation.name.startswith("Posterize"):
                    operation.aug_fn = _posterize
    batches = DataLoader(
        SeededImages(images, order),
        batch_sampler=EpochBatches(order, cfg.SOLVER.IMS_PER_BATCH),
        collate_fn=mixup if mixes_labels(cfg) else fast_collate,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        pin_memory=cfg.MODEL.DEVICE != "cpu",
    )
    device = torch.device(cfg.MODEL.DEVICE)
    normalized = PrefetchLoader(batches, mean=tuple(cfg.DATA.MEAN), std=tuple(cfg.DATA.STD), device=device)
    return CountedLoader(signals.leave_to_parent(normalized), order, cfg.SOLVER.IMS_PER_BATCH, whole_epochs=True)


def build_val_loader(cfg: CfgNode, model: nn.Module, images: LabelledImages):
    """Builds timm's loader of centre crops. Arguments as for `build_train_loader`, but for this process's images."""
    loader = create_loader(
        images,
        batch_size=cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size(),
        crop_pct=cfg.TEST.CROP_RATIO,
        interpolation="bicubic",
        input_size=(3, *model.patch_embed.img_size),
        mean=tuple(cfg.DATA.MEAN),
        std=tuple(cfg.DATA.STD),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        persistent_workers=False,
        pin_memory=cfg.MODEL.DEVICE != "cpu",
        device=torch.device(cfg.MODEL.DEVICE),
    )
    return signals.leave_to_parent(loader)


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Builds timm's AdamW at the rate that SOLVER.BASE_LR and IMS_PER_BATCH make.

    Norms, biases, what timm's model names, positions and the operators' coefficients have no weight decay.

    Args:
        cfg: a config with the keys of `pretrain_config`.
        model: of timm.
    """
    spared = {name for name, _ in model.named_parameters() if name.rpartition(".")[2] in NO_WEIGHT_DECAY}
    optimizer = create_optimizer_v2(
        model,
        opt="adamw",
        lr=cfg.SOLVER.BASE_LR * cfg.SOLVER.IMS_PER_BATCH / _BASE_BATCH,
        weight_decay=cfg.SOLVER.WEIGHT_DECAY,
        betas=tuple(cfg.SOLVER.BETAS),
        eps=cfg.SOLVER.EPS,
        param_group_fn=partial(
            param_groups_weight_decay,
            weight_decay=cfg.SOLVER.WEIGHT_DECAY,
            no_weight_decay_list=spared | set(model.no_weight_decay()),
        ),
    )
    if cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE != FULL_MODEL:
        maybe_add_gradient_clipping(cfg, optimizer)
    return optimizer


def build_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer, epoch_length: int):
    """Builds timm's cosine schedule with warm-up, by steps."""
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=cfg.SOLVER.EPOCHS,
        warmup_epochs=cfg.SOLVER.WARMUP_EPOCHS,
        warmup_lr=cfg.SOLVER.WARMUP_LR,
        min_lr=cfg.SOLVER.MIN_LR,
        step_on_epochs=False,
        updates_per_epoch=epoch_length,
    )
    return scheduler


def _posterize(image: Image.Image, bits_to_keep: int, **_) -> Image.Image:
    """timm's, but at least one bit of a colour is kept: at full strength timm keeps none, which Pillow refuses."""
    return posterize(image, max(1, bits_to_keep))
