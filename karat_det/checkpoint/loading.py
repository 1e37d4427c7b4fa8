"""Loads weights into models safely, and reports what was loaded so that a user can check it.

files.py reads the files, layouts.py knows the names of weights in them. Files saved here also have under "token_grids"
the grid of each operator's tokens, and under "operator_config" the fields of their KArAtConfig and their "sharing".
"""

import logging
import os
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import urlparse

from detectron2.checkpoint import DetectionCheckpointer
from fvcore.common.checkpoint import Checkpointer
from tabulate import tabulate
from torch import Tensor, nn

from ..attention import KArAtAttention, KArAtConfig, KArAtOperator
from ..attention.window import KArAtSwinWindowAttention
from .files import check_weights, read_weights
from .inspection import not_a_file
from .layouts import HEAD, LAYOUTS, convert_state, copy_operator_to_blocks, required_tensors
from .resampling import resample_state, token_grids
from .run_folder import check_finite, checkpoints, write_checkpoint

logger = logging.getLogger(__name__)

# Settings in which two operators with the same tensors may differ and be the same function. Every other field of
# KArAtConfig, including one added later, makes another function. Sharing shows in the names of tensors.
_HARMLESS = {"rank", "num_karat_heads", "triton", "sharing"}
# Harmless too, except for B-splines: their G + k + 1 coefficients do not show G, k and the range.
_SPLINE = {"grid_size", "spline_order", "spline_range"}
# Swin's index of pairs of tokens: a constant, which files of other layouts do not have.
_COMPUTED_BY_THE_MODEL = "relative_position_index"


class SafeCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, but it runs no code from a file and stops if weights do not fit the model.

    Weights of another layout get the model's names. Weights of a model for another image or window size are resampled
    to its tokens, unless a run resumes: the state of its optimiser would no longer fit.

    Args:
        model: the model to save and load.
        save_dir: folder of the run's checkpoints.
        strict: whether tensors that the model lacks, or that have another shape than the model's, stop the run, and a
            ViT or Swin in the file that lacks blocks of the model's.
        complete: whether any tensor that the file lacks stops it too, except operators left out as other functions when
            not `strict`. It is for resuming and evaluating, and not for a start from a pretrained backbone or from a
            classifier for other classes.
        classes: names of a classifier's classes, if known: unless `complete`, a head for others is left out.
        checkpointables: further objects with a state dict, as for Detectron2's.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        strict: bool = True,
        complete: bool = False,
        classes: list[str] | None = None,
        **checkpointables,
    ):
        super().__init__(model, save_dir, **checkpointables)
        self.strict = strict
        self.complete = complete
        self.classes = classes
        self.resumes = False
        self._read: dict[str, Any] | None = None

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Continues from the run's last checkpoint if `resume` and there is one, else loads the model from `path`.

        If the last checkpoint cannot be read, for example after a power cut, the one before replaces it, and the log
        says so.

        Raises:
            ValueError: the run has checkpoints, and none can be read; the weights do not fit the model, or it is no
                checkpoint of a run.
        """
        if resume and self.has_checkpoint():
            self.strict = self.complete = True
            self.resumes = True
            path, self._read = self.last_that_can_be_read()
            return self.load(path)
        if not path:
            logger.info("MODEL.WEIGHTS names no file: training starts from random weights.")
            return {}
        check_weights_file(path)
        return self.load(path, checkpointables=[])

    def has_checkpoint(self) -> bool:
        """Whether the folder holds a checkpoint to go on from, be it one that last_checkpoint does not name."""
        return bool(self.save_dir and checkpoints(self.save_dir))

    def save(self, name: str, **extra: Any) -> None:
        """Saves model and checkpointables as name.pth, and names it the last checkpoint.

        Unlike Detectron2's it never leaves half a file under that name: the old one stays until the new one is whole.
        All processes must call it, since states may be gathered; only the main one writes.

        Raises:
            OSError: it cannot be written, for example on a full disk.
            FloatingPointError: something in it is not finite.
        """
        states = {key: checkpointable.state_dict() for key, checkpointable in self.checkpointables.items()}
        if not (self.save_dir and self.save_to_disk):
            return
        model = {"model": self.model.state_dict(), "token_grids": token_grids(self.model)}
        if config := _operator_config(self.model):
            model["operator_config"] = config
        content = {**model, **states, **extra}
        check_finite(content, self.save_dir)
        logger.info("Saving checkpoint to %s", os.path.join(self.save_dir, f"{name}.pth"))
        write_checkpoint(content, self.save_dir, f"{name}.pth")

    def last_that_can_be_read(self) -> tuple[str, dict[str, Any]]:
        """Path and content of the run's last checkpoint that can be read. ValueError if none can."""
        refused = []
        for path in checkpoints(self.save_dir):
            try:
                check_weights_file(path, "last_checkpoint in OUTPUT_DIR")
                content = read_weights(path, averaged=False)
            except (ValueError, OSError) as error:
                refused.append(str(error))
                continue
            if refused:
                # A file of weights alone is no checkpoint to fall back to.
                if not self.checkpointables.keys() <= content.keys():
                    continue
                logger.warning(
                    "The last checkpoint cannot be read: going on from %s, the one before. %s", path, " ".join(refused)
                )
            return path, content
        raise ValueError(
            f"OUTPUT_DIR, {self.save_dir}, has no checkpoint that can be read: {' '.join(refused)} Remove the folder "
            "to start again."
        )

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Detectron2's; a ValueError names the file."""
        # Detectron2 takes what follows a question mark for options, as in an address, and a colon for the end of one's
        # scheme.
        is_plain = "://" in path or urlparse(path)._replace(query="").geturl() == path
        try:
            return (DetectionCheckpointer if is_plain else Checkpointer).load(self, path, checkpointables)
        except ValueError as error:
            message = str(error)
            raise ValueError(message if message.startswith(path) else f"{path}: {message}") from error
        except (RuntimeError, IndexError, TypeError) as error:
            # The names are those of a layout, but a tensor has other dimensions than any file of it.
            raise ValueError(
                f"{path}: its tensors cannot be brought to the model's. Use a file of one of the known layouts: "
                f"{LAYOUTS}. ({type(error).__name__}: {error})"
            ) from error

    def _load_file(self, filename: str) -> dict[str, Any]:
        checkpoint, self._read = self._read or read_weights(filename, averaged=not self.resumes), None
        if self.resumes and "trainer" in self.checkpointables and "trainer" not in checkpoint:
            raise ValueError(
                f"{filename} holds weights and no state of a run, so no run can be resumed from it. Start one from its "
                "weights: name it as MODEL.WEIGHTS (in pretraining, --init-from), with another OUTPUT_DIR and without "
                "--resume."
            )
        lacking = [key for key in self.checkpointables if self.resumes and key not in checkpoint]
        # A run that has averaged no weights so far says so.
        if lacking and checkpoint.get("averages", True):
            raise ValueError(f"{filename} lacks {' and '.join(lacking)}, so no run can be resumed from it.")
        # Names are matched here by layout, and not by Detectron2's guess.
        checkpoint.pop("matching_heuristics", None)
        return checkpoint

    def _load_model(self, checkpoint: dict[str, Any]):
        file = self._convert(checkpoint)
        incompatible = super()._load_model(checkpoint)
        outcome = self._outcome(incompatible)
        self._report(file, outcome)
        self._refuse_misfits(file, outcome)
        # All is said above: the caller would only say it again.
        return None

    def _convert(self, checkpoint: dict[str, Any]) -> "_File":
        """Gives the checkpoint's "model" the names and shapes of the model's, unless it is the run's own."""
        file = _File(dict(checkpoint["model"]), checkpoint.pop("operator_config", {}), _operator_config(self.model))
        grids = checkpoint.pop("token_grids", {})
        if self.resumes:
            return file
        expected = self.model.state_dict().keys()
        state, grids, file.source, file.ignored = convert_state(file.state, grids, expected)
        # Only for a start: weights trained as universal are not evaluated as another model.
        starts = not self.complete and (self.strict or not file.different)
        if starts and (copies := copy_operator_to_blocks(state, grids, expected)):
            file.source += f", its operator copied to {copies} blocks"
        file.resampled, file.refused = resample_state(state, self.model, grids)
        if not self.complete:
            file.ignored |= _drop_foreign_head(state, self.model, checkpoint.get("classes"), self.classes)
        if file.different and not self.strict:
            own = tuple(f"{name}." for name in _operators(self.model))
            file.foreign = _drop(state, [key for key in state if key.startswith(own)], "other functions, see below")
            file.ignored |= file.foreign
        checkpoint["model"] = state
        return file

    def _outcome(self, incompatible: Any) -> "_Outcome":
        misfits = {key for key, _, _ in incompatible.incorrect_shapes}
        missing = set(incompatible.missing_keys)
        absent = [
            key for key in incompatible.missing_keys if key not in misfits and not key.endswith(_COMPUTED_BY_THE_MODEL)
        ]
        loaded = [key for key in self.model.state_dict() if key not in misfits and key not in missing]
        return _Outcome(loaded, absent, incompatible.incorrect_shapes, incompatible.unexpected_keys)

    def _report(self, file: "_File", outcome: "_Outcome") -> None:
        """Logs what became of the tensors of the file and of the model."""
        loaded, absent = outcome.loaded, outcome.absent
        count = len(self.model.state_dict())
        # If everything is loaded, a list of it is of no use.
        partly = absent or file.ignored or outcome.misfits or outcome.unexpected
        rows = f":\n{_by_module(loaded)}" if partly else ", which is all of the file and of the model"
        logger.info(
            "Loaded %d of the model's %d tensors from the file's %d%s", len(loaded), count, len(file.state), rows
        )
        if file.resampled:
            rows = "\n".join(f"  {key}: {change}" for key, change in file.resampled.items())
            logger.info("Of these resampled to the model's tokens: %d tensors\n%s", len(file.resampled), rows)
        if absent:
            logger.info(
                "Not in the file, left at their initialisation: %d tensors\n%s", len(absent), _by_module(absent)
            )
        if starting := [name for name in _operators(self.model) if any(key.startswith(f"{name}.") for key in absent)]:
            inits = sorted({_operators(self.model)[name].config.init for name in starting})
            has_operators = any(key.endswith("operator.coefficients") for key in file.state)
            logger.info(
                "%s: %d KArAt operators start by MODEL.KARAT.INIT %s: %s",
                "Weights of other operators" if has_operators else "Softmax weights",
                len(starting),
                ", ".join(inits),
                ", ".join(starting),
            )
        if file.ignored:
            reasons = defaultdict(list)
            for key, reason in file.ignored.items():
                reasons[reason].append(key)
            rows = "\n".join(f"  {reason}: {', '.join(keys)}" for reason, keys in reasons.items())
            logger.info("Ignored: %d of the file's tensors\n%s", len(file.ignored), rows)
        counts = {
            "loaded": len(loaded),
            "of these resampled": len(file.resampled),
            "left at initialisation": len(absent),
            "ignored": len(file.ignored),
            "not fitting": len(outcome.misfits) + len(outcome.unexpected),
        }
        logger.info("Weights of %s:\n%s", file.source or "a model with these names", tabulate(counts.items()))

    def _refuse_misfits(self, file: "_File", outcome: "_Outcome") -> None:
        """Raises ValueError if the file does not fit the model. If not strict, logs what is left out."""
        complaints = []
        if not outcome.loaded:
            names = list(dict.fromkeys(key.partition(".")[0] for key in file.state))
            complaints.append(
                f"No tensor of the file has a name and shape of the model's. Its names begin with "
                f"{', '.join(names[:8])}." + ("" if file.source else f" Known layouts: {LAYOUTS}.")
            )
        if self.complete and (lacking := [key for key in outcome.absent if key not in file.foreign]):
            complaints.append(f"The file lacks {len(lacking)} tensors of the model:\n{_by_module(lacking)}")
        unfit = []
        if outcome.misfits:
            rows = "\n".join(
                f"  {key}: {shape_in_file} in the file, {shape_in_model} in the model"
                + (f"; {file.refused[key]}" if key in file.refused else "")
                for key, shape_in_file, shape_in_model in outcome.misfits
            )
            unfit.append(f"{len(outcome.misfits)} tensors have another shape than the model's:\n{rows}")
        if outcome.unexpected:
            rows = _by_module(outcome.unexpected)
            unfit.append(f"{len(outcome.unexpected)} tensors have no place in the model:\n{rows}")
            sharing = file.operator_config.get("sharing"), file.our_config.get("sharing")
            if all(sharing) and len(set(sharing)) > 1:
                unfit.append("MODEL.KARAT.SHARING: {} in the file, {} in the model.".format(*sharing))
        if file.different:
            rows = "\n".join(f"  MODEL.KARAT.{row}" for row in file.different)
            unfit.append(f"The file's operators are other functions of the same tensors:\n{rows}")
        if self.strict:
            if not self.complete and (lacking := _lacking_parts(self.model, outcome.loaded, outcome.absent)):
                unfit.append(lacking)
            complaints += unfit
        elif unfit:
            logger.warning("Left out, since MODEL.WEIGHTS_STRICT is False: %s", "\n".join(unfit))
        if complaints:
            remedy = (
                "\nUse the config that the weights were made with, or set MODEL.WEIGHTS_STRICT False to load what fits "
                "and leave out the rest."
                if unfit and outcome.loaded and len(complaints) == len(unfit)
                else "\nUse the config that the weights were made with."
            )
            raise ValueError("The weights do not fit the model. " + "\n".join(complaints) + remedy)


@dataclass
class _File:
    """A file's tensors and operators' settings, and what was done to give the tensors a model's names and shapes."""

    state: dict[str, Any]
    operator_config: dict[str, Any]
    our_config: dict[str, Any]
    source: str = ""
    # By key, the reason or the change.
    ignored: dict[str, str] = field(default_factory=dict)
    foreign: dict[str, str] = field(default_factory=dict)
    resampled: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def different(self) -> list[str]:
        """Settings of the operators that make other functions in the file than in the model."""
        return _different_settings(self.operator_config, self.our_config)


@dataclass(frozen=True)
class _Outcome:
    """Keys of the model's tensors that are loaded and that the file lacks; what does not fit or has no place."""

    loaded: list[str]
    absent: list[str]
    misfits: list[tuple[str, Any, Any]]
    unexpected: list[str]


def load_weights(
    model: nn.Module, path: str, *, strict: bool = True, complete: bool = True, classes: list[str] | None = None
) -> dict[str, Any]:
    """Loads a weights file into a model.

    Args:
        model: the model.
        path: see `karat_det.checkpoint.files.read_weights`.
        strict, complete, classes: as for SafeCheckpointer.

    Returns:
        What else the file holds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or does not fit the model.
    """
    check_weights_file(path)
    return SafeCheckpointer(model, strict=strict, complete=complete, classes=classes).load(path)


def check_weights_file(path: str, key: str = "MODEL.WEIGHTS") -> None:
    """Raises FileNotFoundError, naming `key`, unless `path` is a file; addresses with a scheme are PathManager's.

    Raises ValueError if a look of a moment shows that the file cannot be read.
    """
    if not path:
        raise FileNotFoundError(
            f"{key} names no weights file, and this needs one: for example model_best.pth in the OUTPUT_DIR of a run."
        )
    if kind := not_a_file(path):
        raise FileNotFoundError(f"{key} is {path!r}, which is {kind}, and must be a file ({os.path.abspath(path)}).")
    if "://" not in path and not os.path.isfile(path):
        raise FileNotFoundError(f"{key} is {path!r}, but there is no such file ({os.path.abspath(path)}). Name one.")
    if "://" not in path:
        check_weights(path)


def _drop_foreign_head(
    state: dict[str, Tensor], model: nn.Module, theirs: list[str] | None, ours: list[str] | None
) -> dict[str, str]:
    """Removes a classifier's head for other classes from a state dict. Returns its keys, and why.

    Classes differ if the file and the data name them differently, or have different numbers of them.
    """
    renamed = theirs is not None and ours is not None and theirs != ours
    dropped = {}
    for key, tensor in model.state_dict().items():
        if not HEAD.fullmatch(key) or key not in state or state[key].shape[1:] != tensor.shape[1:]:
            continue
        if len(state[key]) != len(tensor):
            reason = f"the classifier's head, for {len(state[key])} classes where the model has {len(tensor)}"
            dropped |= _drop(state, [key], reason)
        elif renamed:
            dropped |= _drop(state, [key], "the classifier's head, for other classes than those of the data")
    return dropped


def _drop(state: dict[str, Tensor], keys: Iterable[str], reason: str) -> dict[str, str]:
    """Removes keys from a state dict. Returns them, and why."""
    for key in keys:
        del state[key]
    return dict.fromkeys(keys, reason)


def _lacking_parts(model: nn.Module, loaded: Collection[str], absent: Collection[str]) -> str:
    """Lists what parts of the model's transformer lack, if the file has others of its parts; "" if nothing."""
    kind, parts = required_tensors(model.state_dict().keys())
    loaded, absent = set(loaded), set(absent)
    if not any(key in loaded for keys in parts.values() for key in keys.values()):
        return ""
    lacking = defaultdict(list)
    for part, keys in parts.items():
        if names := [name for name, key in keys.items() if key in absent]:
            lacking["all of it" if len(names) == len(keys) else ", ".join(names)].append(part)
    rows = "\n".join(f"  {', '.join(parts)}: {names}" for names, parts in lacking.items())
    return f"The file lacks a part of the model's {kind}:\n{rows}" if rows else ""


def _operator_config(model: nn.Module) -> dict[str, Any]:
    """Fields of the config that all operators of a model have, and their "sharing"; {} if it has none."""
    for name, operator in _operators(model).items():
        owner = model.get_submodule(name.rpartition(".")[0])
        is_own = isinstance(owner, KArAtAttention | KArAtSwinWindowAttention)
        return asdict(operator.config) | {"sharing": "blockwise" if is_own else "universal"}
    return {}


def _different_settings(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """The settings that make the file's operators other functions than the model's."""
    if not theirs:
        return []
    theirs = asdict(KArAtConfig()) | theirs  # a file from before a field was added has its default
    are_splines = theirs["basis"] == ours.get("basis") == "bspline"
    return [
        f"{field.upper()}: {theirs[field]} in the file, {value} in the model"
        for field, value in ours.items()
        if field not in (_HARMLESS if are_splines else _HARMLESS | _SPLINE) and theirs.get(field) != value
    ]


def _operators(model: nn.Module) -> dict[str, KArAtOperator]:
    return {name: module for name, module in model.named_modules() if isinstance(module, KArAtOperator)}


def _by_module(keys: Iterable[str]) -> str:
    """Lists keys a module a line: "  backbone.net.blocks.0.attn.qkv.{weight, bias}"."""
    leaves = defaultdict(list)
    for key in keys:
        module, _, leaf = key.rpartition(".")
        leaves[module].append(leaf)
    return "\n".join(
        f"  {module}.{{{', '.join(names)}}}" if module else f"  {', '.join(names)}" for module, names in leaves.items()
    )
