"""The folder of a run on the disk: its files are written whole or not at all, so that a run goes on after a crash.

A file that must be whole is written beside its name as NAME.partial, synced, and renamed. Only then may another file
name it: after a power cut there is either the old file or the new one.
"""

import contextlib
import json
import logging
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

LAST = "last_checkpoint"
_NUMBERED = re.compile(r"model_\d+\.pth")
_PARTIAL = ".partial"


def write_whole(path: str | Path, write: Callable[[str], Any]) -> None:
    """Writes a file whole and synced, or leaves the old one.

    Args:
        path: the file.
        write: writes the content to the path that it is given.

    Raises:
        OSError, RuntimeError: `write`'s, for example on a full disk.
    """
    partial = f"{path}{_PARTIAL}"
    try:
        write(partial)
        _sync(partial)
        os.replace(partial, path)
        _sync(os.path.dirname(os.path.abspath(path)))
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(partial)


def write_checkpoint(content: dict[str, Any], folder: str, name: str) -> str:
    """Saves a checkpoint in the folder of a run, and then names it the last one. Returns its path.

    Raises:
        OSError: it cannot be written; the message gives the room that it needs and the free room.
    """
    path = os.path.join(folder, name)
    os.makedirs(folder, exist_ok=True)
    last = last_named(folder)
    # Beside its tensors a checkpoint has names and numbers.
    needed = max(size_of(content), os.path.getsize(last) if os.path.isfile(last) else 0)
    free = shutil.disk_usage(folder).free
    try:
        write_whole(path, lambda partial: torch.save(content, partial))
        write_whole(os.path.join(folder, LAST), lambda partial: Path(partial).write_text(name, encoding="utf-8"))
    except (OSError, RuntimeError) as error:
        # torch's message names offsets in its files only.
        full = "it cannot be written to its end, as where a disk is full"
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else full
        raise OSError(
            f"Cannot save {path}: {reason}. It needs {_size(needed)}, and the disk has {_size(free)} free. "
            f"{say_last_good(folder)} Make room, and go on with --resume."
        ) from error
    return path


def check_finite(content: dict[str, Any], folder: str) -> None:
    """Raises FloatingPointError, naming a run's last checkpoint, unless all tensors of what is to be saved are finite.

    Args:
        content: nested dicts, lists and tuples.
        folder: the run's.
    """
    if name := first_not_finite(content):
        raise FloatingPointError(f"Training diverged: {name} is not finite, and was not saved. {say_last_good(folder)}")


def first_not_finite(content: Any) -> str:
    """Name of the first tensor in nested dicts, lists and tuples that holds NaN or an infinity; "" if none does."""
    groups = defaultdict(dict)
    for name, tensor in tensors_of(content):
        if tensor.is_floating_point() and tensor.numel():
            groups[tensor.device, tensor.dtype][name] = tensor.detach()
    for group in groups.values():
        # One fast pass. A sum of squares overflows sooner than a value, so only a sum that is not finite needs a second
        # one.
        finite = torch.stack(torch._foreach_norm(list(group.values()))).isfinite()
        if not finite.all():
            for (name, tensor), is_finite in zip(group.items(), finite.tolist(), strict=True):
                if not is_finite and not tensor.isfinite().all():
                    return name
    return ""


def say_last_good(folder: str) -> str:
    """Says which checkpoint of a run is the last good one, or that there is none."""
    named = last_named(folder)
    return f"The last good checkpoint is {named}." if named else "No checkpoint was saved before: there is none."


def say_room(folder: str) -> str:
    """Says how much room the disk of a run's folder has, and how much a checkpoint of the run needs."""
    existing = folder
    while existing and not os.path.isdir(existing):
        existing = os.path.dirname(existing)
    free = _size(shutil.disk_usage(existing or ".").free)
    last = last_named(folder)
    needs = f"; a checkpoint needs {_size(os.path.getsize(last))}" if os.path.isfile(last) else ""
    return f"The disk has {free} free{needs}: make room."


def last_named(folder: str) -> str:
    """Path of the checkpoint that last_checkpoint names; "" if it names none."""
    try:
        name = Path(folder, LAST).read_text(encoding="utf-8", errors="replace").strip().strip("\0")
    except OSError:
        return ""
    return os.path.join(folder, name) if name else ""


def checkpoints(folder: str) -> list[str]:
    """Paths of a run's checkpoints: the one that last_checkpoint names, then the others, the newest first."""
    named = last_named(folder)
    try:
        files = [entry for entry in os.scandir(folder) if entry.name.startswith("model_") and entry.is_file()]
    except OSError:
        files = []
    files = [entry for entry in files if entry.name.endswith(".pth") and entry.path != named]
    newest = sorted(files, key=lambda entry: (entry.stat().st_mtime_ns, entry.name), reverse=True)
    return ([named] if named else []) + [entry.path for entry in newest]


def keep_last(folder: str, count: int) -> None:
    """Removes the numbered checkpoints (model_0000999.pth) but the last `count`, 0 for all, and the named one."""
    numbered = [path for path in checkpoints(folder) if _NUMBERED.fullmatch(os.path.basename(path))]
    named = last_named(folder)
    for path in numbered[count:] if count > 0 else ():
        if path != named:
            logger.info("Removing %s: SOLVER.KEEP_CHECKPOINTS is %d", path, count)
            os.remove(path)


def clear_partial(folder: str) -> None:
    """Removes partial checkpoints of a run that was killed while it saved them."""
    for path in sorted(Path(folder).glob(f"*.pth{_PARTIAL}")) + [Path(folder, f"{LAST}{_PARTIAL}")]:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
            logger.info("Removed %s, which a run that was killed left", path)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.json, without torn ones of a run that was killed."""
    records = []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            if isinstance(record, dict):
                records.append(record)
    return records


def end_metrics(path: str | Path) -> None:
    """Cuts off a torn last line of metrics.json, so that a resumed run does not continue it."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            logger.warning("Cut off the last line of %s, which a run that was killed left torn", path)
            file.truncate(whole)


def size_of(content: Any) -> int:
    """Bytes of the tensors in nested dicts, lists and tuples, each storage counted once."""
    storages = {}
    for _, tensor in tensors_of(content):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr(), storage.device] = storage.nbytes()
    return sum(storages.values())


def tensors_of(content: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested dicts, lists and tuples, and their names, "a.0.b" for content["a"][0]["b"]."""
    if isinstance(content, Tensor):
        yield name, content
    elif isinstance(content, dict | list | tuple):
        items = content.items() if isinstance(content, dict) else enumerate(content)
        for key, value in items:
            yield from tensors_of(value, f"{name}.{key}" if name else str(key))


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def _sync(path: str) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
