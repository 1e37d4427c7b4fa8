"""Weights files, read without running code from them: torch.save's, safetensors and Detectron2's .pkl.

torch reads its own files with its weights-only loader. A .pkl goes through an unpickler that builds arrays and plain
containers itself, and refuses by name everything else that a pickle may ask for. torch's loader uses its functions for
numpy scalars and paths, which training checkpoints have beside the weights.
"""

import argparse
import json
import os
import pickle
import re
import reprlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .inspection import UnfitFile, check_before_reading, check_sizes
from .run_folder import write_whole

# Names of a state dict in a file. timm's and DeiT's classifiers are evaluated with averaged weights, which are DINO's
# teacher too.
AVERAGED = ("model_ema", "state_dict_ema", "ema", "teacher")
CONTAINERS = ("model", "state_dict", "model_state", "module", "student")
WRITTEN = (".pth", ".pt", ".bin", ".safetensors")


def read_weights(path: str, *, averaged: bool = True) -> dict[str, Any]:
    """Reads a weights file; its kind follows from its suffix: .safetensors, .pkl, or else torch.save's.

    The state dict may be the whole file, or be under one or two of the names of AVERAGED and CONTAINERS; or both
    weights are in one, with such a name before each key.

    Args:
        path: the file.
        averaged: whether to prefer averaged weights if the file has both.

    Returns:
        The state dict under "model", and the rest of the file, such as the state of an optimiser, under its names.

    Raises:
        ValueError: it is truncated or of another format, asks for code to be run or for memory far beyond its size, or
            has no state dict.
    """
    try:
        check_before_reading(path)
        if path.endswith(".safetensors"):
            loaded = _read_safetensors(path)
        elif path.endswith(".pkl"):
            with open(path, "rb") as file:
                # Arrays that Python 2 has written are text in Python 3, unless it is latin1.
                loaded = _ArrayUnpickler(file, encoding="latin1").load()
        else:
            # Training checkpoints of timm and DeiT hold their arguments in a namespace, which is plain values too.
            admitted = [(builder, ".".join(name)) for name, builder in _ADMITTED.items()]
            with torch.serialization.safe_globals([argparse.Namespace, *admitted]):
                loaded = torch.load(path, map_location="cpu", weights_only=True)
        loaded = _as_tensors(loaded, {})
        check_sizes(loaded)
        _check_beside(loaded)
    except OSError:
        raise
    except Exception as error:  # what a foreign file raises depends on its bytes
        # None, since torch's message advises to run the file's code.
        raise _unreadable(path, error) from None
    containers = AVERAGED + CONTAINERS if averaged else CONTAINERS + AVERAGED
    place, state = _find_state(loaded, containers)
    if state is None:
        held = type(loaded).__name__
        if isinstance(loaded, dict):
            held = f"a dict of {', '.join(map(str, list(loaded)[:5]))}" if loaded else "an empty dict"
        raise ValueError(f"{path} holds no state dict, neither bare nor under {', '.join(containers)}, but {held}.")
    beside = {key: value for key, value in loaded.items() if key != place} if place else {}
    return beside | {"model": _without_count(_of_one_model(state, containers))}


def check_weights(path: str) -> None:
    """Raises ValueError, as `read_weights` does, if a look at a file shows that it cannot be read."""
    try:
        check_before_reading(path)
    except OSError:
        raise
    except Exception as error:  # what a foreign file raises depends on its bytes
        raise _unreadable(path, error) from None


def _unreadable(path: str, error: Exception) -> ValueError:
    return ValueError(
        f"{path} is no weights file that can be read without running code from it: it is truncated, of another format, "
        f"or holds more than tensors and plain values. Save a state dict with torch.save or safetensors. "
        f"({_reason(error)})"
    )


def _reason(error: Exception) -> str:
    """The reason why a file was refused, in one line, without torch's advice."""
    if isinstance(error, pickle.UnpicklingError) and isinstance(error.__context__, pickle.UnpicklingError):
        error = error.__context__  # torch's loader has put its advice around this
    message = str(error)
    if match := re.search(r"GLOBAL (\S+)", message):
        return f"it asks for {match[1]}, which is refused"
    if match := re.search(r"you tried to allocate (\d+) bytes", message):
        return f"it asks for {int(match[1]):,} bytes of memory"
    first = message.strip().partition("\n")[0].partition(". ")[0]
    first = first.replace(" allowlisted via `add_safe_globals`", "")
    if first and isinstance(error, UnfitFile | pickle.UnpicklingError | RuntimeError | SafetensorError):
        return first
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _find_state(held: Any, containers: Sequence[str], levels: int = 2) -> tuple[str, dict[str, Tensor] | None]:
    """The first of the containers that has a state dict, "" if `held` is one, and that state dict; None if none has."""
    if not isinstance(held, dict):
        return "", None
    # Beside tensors a state dict may have numbers, such as a count of batches, and words on its author.
    if any(isinstance(value, Tensor) for value in held.values()) and all(
        isinstance(key, str) and (value is None or isinstance(value, Tensor | float | str) or _is_int64(value))
        for key, value in held.items()
    ):
        return "", {key: torch.as_tensor(x) for key, x in held.items() if not (x is None or isinstance(x, str))}
    for key in containers if levels else ():
        _, state = _find_state(held.get(key), containers, levels - 1)
        if state is not None:
            return key, state
    return "", None


def _is_int64(value: Any) -> bool:
    return isinstance(value, int) and -(2**63) <= value < 2**63


def _of_one_model(state: dict[str, Tensor], containers: Sequence[str]) -> dict[str, Tensor]:
    """The first container's of the weights in a state dict that has averaged ones too, as names before the keys say."""
    there = [name for name in containers if any(key.startswith(f"{name}.") for key in state)]
    if not set(there) & set(AVERAGED):
        return state
    others = tuple(f"{name}." for name in there[1:])
    return {key.removeprefix(f"{there[0]}."): value for key, value in state.items() if not key.startswith(others)}


def _without_count(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leaves out the count of torch's AveragedModel."""
    rest = {key: value for key, value in state.items() if key != "n_averaged"}
    return rest if rest and all(key.startswith("module.") for key in rest) else state


def write_weights(
    path: str,
    state: Mapping[str, Tensor],
    token_grids: Mapping[str, Sequence[int]],
    operator_config: Mapping[str, Any] | None = None,
) -> None:
    """Writes a weights file of the suffix's kind. An old file of that name stays until the new one is whole.

    Args:
        path: ends in one of WRITTEN.
        state: a state dict.
        token_grids: see `karat_det.checkpoint.resampling.token_grids`.
        operator_config: the fields of its operators' KArAtConfig, if they are known.

    Raises:
        ValueError: the suffix is another one.
        FileNotFoundError: there is no such folder.
        OSError: it cannot be written, for example on a full disk.
    """
    if not path.endswith(WRITTEN):
        raise ValueError(f"{path} must end in one of {', '.join(WRITTEN)}.")
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise FileNotFoundError(f"{path}: there is no folder {os.path.dirname(path)}. Make it first.")

    def write_safetensors(partial: str) -> None:
        # It refuses tensors that share memory.
        tensors = {key: tensor.clone().contiguous() for key, tensor in state.items()}
        grids = json.dumps({name: list(grid) for name, grid in token_grids.items()})
        metadata = {"format": "pt", "token_grids": grids}
        if operator_config:
            metadata["operator_config"] = json.dumps(dict(operator_config))
        # Made here, since safetensors makes files that their owner alone may read.
        Path(partial).touch()
        mode = os.stat(partial).st_mode
        safetensors.torch.save_file(tensors, partial, metadata=metadata)
        os.chmod(partial, mode)

    def write_pth(partial: str) -> None:
        known = {"operator_config": dict(operator_config)} if operator_config else {}
        torch.save({"model": dict(state), "token_grids": dict(token_grids), **known}, partial)

    try:
        write_whole(path, write_safetensors if path.endswith(".safetensors") else write_pth)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own for a full disk
        raise OSError(f"Cannot write {path}: {error}. Is the disk full? A file of that name is as it was.") from error


def _read_safetensors(path: str) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  it is no dict
    known = {key: json.loads(metadata[key]) for key in ("token_grids", "operator_config") if key in metadata}
    return {"model": state, "token_grids": {}, **known}


class _Dtype:
    """A pickle's numpy dtype, of plain numbers only. numpy's own function would trust the file's sizes."""

    def __init__(self, name: str, align: bool = False, copy: bool = False):
        self.value = np.dtype(name) if isinstance(name, str) else None
        if self.value is None or self.value.kind not in "biufc":
            raise pickle.UnpicklingError(f"it holds an array of {name!r}, not of numbers")

    def __setstate__(self, state: tuple) -> None:
        if state[1] in ("<", ">"):
            self.value = self.value.newbyteorder(state[1])


class _Array:
    """A pickle's numpy array."""

    def __init__(self, *of_an_empty_one: Any):
        self.tensor = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, is_fortran, data = state
        self._fill(data.encode("latin1") if isinstance(data, str) else data, dtype, shape, "F" if is_fortran else "C")

    def _fill(self, data: bytes, dtype: _Dtype, shape: Sequence[int], order: str) -> None:
        values = np.frombuffer(data, dtype.value).reshape(shape, order=order)
        # A copy, since torch needs a writable array, in this machine's byte order.
        self.tensor = torch.from_numpy(np.array(values, dtype=dtype.value.newbyteorder("="), order="C"))


# A pickle may set attributes on every object that it asks for. These replacements of functions have none, so that no
# file can leave anything behind in them.


class _FromBuffer:
    """A byte array of pickle protocol 5."""

    __slots__ = ()

    def __call__(self, data: bytes, dtype: _Dtype, shape: Sequence[int], order: str) -> _Array:
        array = _Array()
        array._fill(data, dtype, shape, order)
        return array


class _Scalar:
    """A numpy scalar as a Python number."""

    __slots__ = ()

    def __call__(self, dtype: _Dtype, data: bytes | str) -> Any:
        return np.frombuffer(data.encode("latin1") if isinstance(data, str) else data, dtype.value)[0].item()


class _Bytes:
    """Bytes as Python 3 pickles them for Python 2: as text. A number would be a size, of any amount of memory."""

    __slots__ = ()

    def __call__(self, data: bytes | str = b"", encoding: str = "latin1") -> bytes:
        if encoding not in ("latin1", "latin-1"):
            raise pickle.UnpicklingError(f"it asks for the codec {encoding!r}")
        if not isinstance(data, bytes | str):
            raise pickle.UnpicklingError(f"it asks for the bytes of {data!r}")
        return data.encode("latin1") if isinstance(data, str) else data


class _Bytearray(_Bytes):
    __slots__ = ()

    def __call__(self, data: bytes | str = b"", encoding: str = "latin1") -> bytearray:
        return bytearray(super().__call__(data, encoding))


class _Path:
    """A path as text: its class cannot be made on another system than the file's."""

    __slots__ = ()

    def __call__(self, *parts: str) -> str:
        return str(PurePosixPath(*parts))


# Replaces numpy's class when a pickle names it as the type of an array; it is never called.
_NDARRAY = "numpy.ndarray"
_ADMITTED: dict[tuple[str, str], Callable | str] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _Bytes(),
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _Dtype,
    **{
        (f"numpy.{core}.{module}", name): builder
        for core in ("core", "_core")
        for module, name, builder in (
            ("multiarray", "_reconstruct", _Array),
            ("multiarray", "scalar", _Scalar()),
            ("numeric", "_frombuffer", _FromBuffer()),
        )
    },
    # Python 2's name of the module, which pickles of its protocols have, and Python 3's.
    **{
        (module, name): builder
        for module in ("__builtin__", "builtins")
        for name, builder in (
            ("set", set),
            ("frozenset", frozenset),
            ("bytes", _Bytes()),
            ("bytearray", _Bytearray()),
        )
    },
    # Python 3.13 has them in a module of the package's.
    **{(module, "PosixPath"): _Path() for module in ("pathlib", "pathlib._local")},
}


class _ArrayUnpickler(pickle.Unpickler):
    """Admits arrays of numbers, plain containers and paths."""

    def find_class(self, module: str, name: str) -> Callable | str:
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is refused")
        return _ADMITTED[module, name]


def _as_tensors(value: Any, done: dict[int, tuple[Any, Any]]) -> Any:
    """Replaces the arrays in plain containers by tensors.

    Args:
        value: the content of a file.
        done: containers by their id, and their results: one may be in many places, and even in itself.
    """
    if isinstance(value, _Array):
        return value.tensor
    if id(value) in done:
        return done[id(value)][1]
    if isinstance(value, dict):
        done[id(value)] = value, value
        for key, item in value.items():
            value[key] = _as_tensors(item, done)
    elif type(value) is list:
        done[id(value)] = value, value
        value[:] = [_as_tensors(item, done) for item in value]
    elif type(value) is tuple:
        made = tuple(_as_tensors(item, done) for item in value)
        done[id(value)] = value, made
        return made
    return value


def _check_beside(loaded: Any) -> None:
    """Raises ValueError if the content that write_weights puts beside weights is of another form."""
    if not isinstance(loaded, dict):
        return
    grids, config = loaded.get("token_grids", {}), loaded.get("operator_config", {})
    are_grids = isinstance(grids, dict) and all(
        isinstance(name, str)
        and isinstance(grid, list | tuple)
        and len(grid) in (2, 3)
        and all(isinstance(size, int) and size >= (index < 2) for index, size in enumerate(grid))
        for name, grid in grids.items()
    )
    if not are_grids:
        raise ValueError(f"token_grids is {reprlib.repr(grids)}")
    if not isinstance(config, dict) or not all(
        isinstance(name, str) and (value is None or isinstance(value, str | int | float))
        for name, value in config.items()
    ):
        raise ValueError(f"operator_config is {reprlib.repr(config)}")
