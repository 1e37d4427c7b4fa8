"""Weights into models: safe reading, and an account of what was loaded that a user can check.

Files are those of `torch.save`: a state dict, or a dict that holds one under "model", as Detectron2's checkpoints do.
Those saved here hold under "token_grids" the (H, W) of each operator's tokens too. They are read by torch's
weights-only loader, which runs no code from a file.
"""

import logging
import os
from collections import defaultdict
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlparse

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from .resampling import resample_state, token_grids

logger = logging.getLogger(__name__)


class SafeCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, but it runs no code from a file and stops where weights do not fit the model.

    Weights of a model for another image or window size are resampled to the model's tokens, unless a run resumes: the
    state of its optimiser would no longer fit.

    Args:
        model: the model to save and load.
        save_dir: folder of the run's checkpoints.
        strict: whether tensors that the model lacks, or that have another shape than the model's, stop the run.
        complete: whether tensors that the file lacks stop it too. A run that resumes or evaluates wants that, one that
            starts from a pretrained backbone does not.
        checkpointables: further objects with a state dict, as for Detectron2's.
    """

    def __init__(
        self, model: nn.Module, save_dir: str = "", *, strict: bool = True, complete: bool = False, **checkpointables
    ):
        super().__init__(model, save_dir, **checkpointables)
        self.strict = strict
        self.complete = complete
        self.resample = True

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Continues from the run's last checkpoint if `resume` and there is one, else loads the model from `path`."""
        if resume and self.has_checkpoint():
            self.strict = self.complete = True
            self.resample = False
            path = self.get_checkpoint_file()
            check_weights_file(path, "last_checkpoint in OUTPUT_DIR")
            return self.load(path)
        if not path:
            logger.info("MODEL.WEIGHTS names no file: training starts from random weights.")
            return {}
        check_weights_file(path)
        return self.load(path, checkpointables=[])

    def save(self, name: str, **extra: Any) -> None:
        """Saves model and checkpointables as name.pth, and names it the last checkpoint.

        Unlike Detectron2's it never leaves half a file under that name: the old one stands until the new one is whole.
        """
        if not (self.save_dir and self.save_to_disk):
            return
        states = {key: checkpointable.state_dict() for key, checkpointable in self.checkpointables.items()}
        path = os.path.join(self.save_dir, f"{name}.pth")
        logger.info("Saving checkpoint to %s", path)
        model = {"model": self.model.state_dict(), "token_grids": token_grids(self.model)}
        torch.save({**model, **states, **extra}, f"{path}.partial")
        os.replace(f"{path}.partial", path)
        self.tag_last_checkpoint(f"{name}.pth")

    def _load_file(self, filename: str) -> dict[str, Any]:
        try:
            loaded = torch.load(filename, map_location="cpu", weights_only=True)
        except Exception as error:  # what a foreign file raises depends on its bytes
            raise ValueError(
                f"{filename} is no weights file that can be read without running code from it: it is truncated, of "
                f"another format, or holds more than tensors and plain values. Save a state dict with torch.save. "
                f"({error})"
            ) from error
        checkpoint = loaded if isinstance(loaded, dict) and "model" in loaded else {"model": loaded}
        state = checkpoint["model"]
        if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
            held = (
                f"a dict of {', '.join(map(str, list(state)[:5]))}" if isinstance(state, dict) else type(state).__name__
            )
            raise ValueError(f"{filename} holds no state dict, neither bare nor under 'model', but {held}.")
        return checkpoint

    def _load_model(self, checkpoint: dict[str, Any]):
        state = checkpoint["model"]
        in_file = set(state)
        if all(key.startswith("module.") for key in state):  # of a model in DistributedDataParallel
            consume_prefix_in_state_dict_if_present(state, "module.")
        grids = checkpoint.pop("token_grids", {})
        resampled, refused = resample_state(state, self.model, grids) if self.resample else ({}, {})
        incompatible = super()._load_model(checkpoint)
        misfits = {key for key, _, _ in incompatible.incorrect_shapes}
        absent = [key for key in incompatible.missing_keys if key not in misfits]
        loaded = [key for key in self.model.state_dict() if key not in misfits and key not in incompatible.missing_keys]
        logger.info("Loaded %d of the file's %d tensors:\n%s", len(loaded), len(in_file), _by_module(loaded))
        if resampled:
            rows = "\n".join(f"  {key}: {change}" for key, change in resampled.items())
            logger.info("Of these resampled to the model's tokens: %d tensors\n%s", len(resampled), rows)
        if absent:
            logger.info(
                "Not in the file, left at their initialisation: %d tensors\n%s", len(absent), _by_module(absent)
            )

        complaints = []
        if not loaded:
            complaints.append("No tensor of the file has a name and shape of the model's.")
        if self.complete and absent:
            complaints.append(f"The file lacks {len(absent)} tensors of the model:\n{_by_module(absent)}")
        unfit = []
        if misfits:
            rows = "\n".join(
                f"  {key}: {shape_in_file} in the file, {shape_in_model} in the model"
                + (f"; {refused[key]}" if key in refused else "")
                for key, shape_in_file, shape_in_model in incompatible.incorrect_shapes
            )
            unfit.append(f"{len(misfits)} tensors have another shape than the model's:\n{rows}")
        if incompatible.unexpected_keys:
            unexpected = incompatible.unexpected_keys
            unfit.append(f"{len(unexpected)} tensors have no place in the model:\n{_by_module(unexpected)}")
        if self.strict:
            complaints += unfit
        elif unfit:
            logger.warning("Left out, since MODEL.WEIGHTS_STRICT is False: %s", "\n".join(unfit))
        if complaints:
            remedy = (
                "\nSet MODEL.WEIGHTS_STRICT False to load what fits and leave out the rest."
                if unfit and loaded and len(complaints) == len(unfit)
                else "\nUse the config that the weights were made with."
            )
            raise ValueError("The weights do not fit the model. " + "\n".join(complaints) + remedy)
        # All is said above: the caller would only say it again.
        return None


def load_weights(model: nn.Module, path: str, *, strict: bool = True, complete: bool = True) -> None:
    """Loads a weights file into a model.

    Args:
        model: the model.
        path: a file of `torch.save`.
        strict, complete: as for SafeCheckpointer.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or does not fit the model.
    """
    check_weights_file(path)
    SafeCheckpointer(model, strict=strict, complete=complete).load(path)


def check_weights_file(path: str, key: str = "MODEL.WEIGHTS") -> None:
    """Raises FileNotFoundError, naming `key`, unless `path` is a file; addresses with a scheme are PathManager's."""
    if not path:
        raise FileNotFoundError(f"{key} names no weights file, and this needs one.")
    if not urlparse(path).scheme and not os.path.isfile(path):
        raise FileNotFoundError(f"{key} is {path!r}, but there is no such file ({os.path.abspath(path)}). Name one.")


def _by_module(keys: Iterable[str]) -> str:
    """Lists keys a module a line: "  backbone.net.blocks.0.attn.qkv.{weight, bias}"."""
    leaves = defaultdict(list)
    for key in keys:
        module, _, leaf = key.rpartition(".")
        leaves[module].append(leaf)
    return "\n".join(
        f"  {module}.{{{', '.join(names)}}}" if module else f"  {', '.join(names)}" for module, names in leaves.items()
    )
