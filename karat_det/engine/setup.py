"""From a command line to a checked config and running processes, before anything is built."""

import argparse
import itertools
import logging
import os
import re
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg

from ..config import add_karat_config
from ..data.dataset_check import check_datasets
from ..data.registration import register_from_config
from ..yaml_file import read_config
from .checks import check_detector_config
from .config_values import merge_values
from .model_check import check_model

logger = logging.getLogger(__name__)


def parse_command(parser: argparse.ArgumentParser, arguments: list[str] | None = None) -> argparse.Namespace:
    """Parses a command line, whose options may follow the overrides too, and expands `~` in paths.

    Args:
        parser: the command's; its overrides, if it has any, are `opts`.
        arguments: the words; default this process's.
    """
    args, opts = parser.parse_args(arguments), []
    while rest := list(getattr(args, "opts", None) or ()):
        words = list(itertools.takewhile(lambda word: not word.startswith("--"), rest))
        opts += words
        args.opts = None
        if len(words) < len(rest):
            parser.parse_args(rest[len(words) :], args)
    if hasattr(args, "opts"):
        args.opts = opts
    for name, value in vars(args).items():
        if name != "opts":
            setattr(args, name, _at_home(value))
    return args


def load_cfg(config_file: str, opts: list[str], own_data_needed: bool = True) -> CfgNode:
    """Reads a YAML config and the overrides behind it, checks both, and registers the datasets of KARAT_DATA.

    Args:
        config_file: path of a YAML file, or "" for the defaults.
        opts: keys and values in turn, as on Detectron2's command lines.
        own_data_needed: if False, files of KARAT_DATA may be absent, for use of a model without training; the log says
            so and the datasets stay unregistered.

    Returns:
        The config, frozen. MODEL.DEVICE is "cpu" where there is no GPU; on the CPU SOLVER.AMP.ENABLED is False unless
        `opts` has it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a key is unknown or its value is not allowed.
    """
    cfg = get_cfg()
    add_karat_config(cfg)
    merge(cfg, config_file, opts)
    check_detector_config(cfg)
    try:
        register_from_config(cfg)
    except FileNotFoundError as error:
        if own_data_needed:
            raise
        logger.warning("Going on without the datasets of KARAT_DATA: %s", error)
    cfg.freeze()
    return cfg


def merge(cfg: CfgNode, config_file: str, opts: list[str]) -> None:
    """Merges a YAML config and the overrides behind it into the defaults, and sets keys that depend on the machine.

    Without a GPU, MODEL.DEVICE becomes "cpu". On the CPU, SOLVER.AMP.ENABLED becomes False unless `opts` has it.
    DATALOADER.NUM_WORKERS becomes at most the number of cores.

    Args:
        cfg: the defaults; changed in place.
        config_file, opts: as for `load_cfg`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, a key is unknown, or a value is of another type than the default.
    """
    config_file = os.path.expanduser(config_file)
    if len(opts) % 2:
        raise ValueError(f"Overrides are pairs KEY VALUE; these are {len(opts)} words: {' '.join(opts)}")
    if config_file:
        try:
            merge_values(cfg, read_config(config_file), [])
        except FileNotFoundError as error:
            raise FileNotFoundError(f"--config-file {error}") from None
        except ValueError as error:
            raise ValueError(str(error) if str(error).startswith(config_file) else f"{config_file}: {error}") from None
    merge_values(cfg, {}, opts)
    if re.fullmatch(r"cuda(:\d+)?", cfg.MODEL.DEVICE) and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    if cfg.MODEL.DEVICE == "cpu" and "SOLVER.AMP.ENABLED" not in opts:
        # Most CPUs emulate bfloat16, at a quarter of float32's speed.
        cfg.SOLVER.AMP.ENABLED = False
    # More workers than cores only make torch warn.
    cfg.DATALOADER.NUM_WORKERS = min(cfg.DATALOADER.NUM_WORKERS, os.cpu_count() or 1)
    _expand_home(cfg)


def check_model_and_datasets(cfg: CfgNode, training: bool, num_processes: int = 1) -> None:
    """Checks the model and the datasets' files, in seconds and before there is a log.

    Args:
        cfg: a config of `load_cfg`.
        training: whether the run trains; else it evaluates alone.
        num_processes: how many processes share the images of a step.

    Raises:
        ValueError, FileNotFoundError: sizes of the model do not fit each other, or see `check_datasets`.
    """
    check_model(cfg, training, num_processes)
    check_datasets(cfg, training)  # Last: a model's mistakes should not wait until a dataset is there.


def log_device(cfg: CfgNode, num_gpus: int) -> None:
    """Warns in the log if no GPU is used although --num-gpus asks for some."""
    if cfg.MODEL.DEVICE == "cpu" and num_gpus > 0:
        # One GPU is the default of --num-gpus, more were asked for.
        logger.log(
            logging.WARNING if num_gpus > 1 else logging.INFO,
            "--num-gpus is %d, but no GPU is used: MODEL.DEVICE is cpu, SOLVER.AMP.ENABLED %s.",
            *(num_gpus, cfg.SOLVER.AMP.ENABLED),
        )


def _expand_home(cfg: CfgNode) -> None:
    """Replaces a leading ~ of paths by the home folder, as a shell does; YAML has no shell."""
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            _expand_home(value)
        else:
            cfg[key] = _at_home(value)


def _at_home(value: Any) -> Any:
    """A path, or paths in lists and tuples, with the home folder for ~; any other value unchanged."""
    if isinstance(value, str):
        return os.path.expanduser(value)
    if isinstance(value, Path):
        return value.expanduser()
    return type(value)(map(_at_home, value)) if type(value) in (list, tuple) else value
