"""Checks before reading a weights file that it costs no more than a small multiple of the file's size.

A pickle is a program: nine bytes of it can ask for gigabytes of memory, a few hundred for a hash that takes years, and
an archive can unpack to a thousand times its size. Here a pickle's instructions are walked without execution, and an
archive's directory is read without unpacking. The tensors are checked after reading: one may have millions of elements
with the same place in its storage.
"""

import errno
import os
import pickletools
import stat
import struct
import zipfile
from collections.abc import Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor

# A checkpoint has some thousands of tensors, each of which takes some twenty instructions and an entry of 100 bytes.
_MAX_INSTRUCTIONS = 250_000
_MAX_DIRECTORY = 4 * 2**20
# Largest size of an archive's content over its own. torch.save compresses nothing.
_MAX_EXPANSION = 4
_MAX_HEADER = 16 * 2**20
# A line of a pickle of protocol 0 has a whole array.
_MAX_LINE = 16 * 2**20
# Most elements of a key, counted through its tuples. Each is hashed as often as it occurs.
_MAX_KEY = 1_000
_MAX_DEPTH = 500
_MAX_ARGUMENTS = 100
# Expanded tensors up to this size do no harm.
_SMALL = 2**20

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class UnfitFile(ValueError):
    """A file would cost far more than its size, or has tensors that are not plain; the message gives the reason."""


def not_a_file(path: str | os.PathLike) -> str:
    """The kind of a path that is no file, in words, such as "a named pipe"; "" for a file or for nothing.

    Opening a pipe or a device can wait forever.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        return "a loop of links" if error.errno == errno.ELOOP else ""
    return next((kind for is_kind, kind in _KINDS if is_kind(mode)), "")


def check_before_reading(path: str) -> None:
    """Raises UnfitFile, or another error for a foreign file, if reading a weights file would cost too much.

    Args:
        path: ends in .safetensors or .pkl, or is one of torch.save's.
    """
    if kind := not_a_file(path):
        raise UnfitFile(f"it is {kind}")
    with open(path, "rb") as file:
        if path.endswith(".safetensors"):
            _check_safetensors(file)
        elif path.endswith(".pkl"):
            _check_pickle(file)
        elif file.read(4) == b"PK\x03\x04":
            _check_archive(file)
        else:
            file.seek(0)
            # Before 1.6 torch.save wrote five pickles, then the storages: a magic number, a version, the system's
            # sizes, what is saved, and the names of its storages.
            for _ in range(5):
                _check_pickle(file)


def check_sizes(held: Any) -> None:
    """Raises UnfitFile, with its name, for a tensor that is expanded, sparse or without data.

    Args:
        held: the content of a file: tensors in containers.
    """
    seen: set[int] = set()
    waiting = [("", held)]
    while waiting:
        name, value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            _check_tensor(name or "it", value)
        elif isinstance(value, Mapping):
            waiting += [(str(key)[:100], item) for key, item in value.items()]
        elif isinstance(value, list | tuple):
            waiting += [(name, item) for item in value]


def _check_tensor(name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        kind = "quantised" if tensor.is_quantized else f"{tensor.layout}, on the device {tensor.device}"
        raise UnfitFile(f"{name} is no plain tensor, but {kind}")
    if tensor.is_complex():
        raise UnfitFile(f"{name} holds complex numbers")
    size, stored = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
    if size > max(stored, _SMALL):
        raise UnfitFile(
            f"{name}, of shape {tuple(tensor.shape)}, would take {size:,} bytes, of which the file has {stored:,}: "
            f"its strides are {tensor.stride()}"
        )


def _check_safetensors(file: BinaryIO) -> None:
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    if len(start) == 8 and (header := struct.unpack("<Q", start)[0]) > min(size - 8, _MAX_HEADER):
        raise UnfitFile(f"its header would have {header:,} bytes, the file has {size:,}")


def _check_archive(file: BinaryIO) -> None:
    size = os.fstat(file.fileno()).st_size
    if (directory := _directory_size(file, size)) > _MAX_DIRECTORY:
        raise UnfitFile(f"its archive would have a directory of {directory:,} bytes")
    with zipfile.ZipFile(file) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > _MAX_EXPANSION * size + _SMALL:
            raise UnfitFile(f"its archive of {size:,} bytes would unpack to {unpacked:,}")
        for entry in archive.infolist():
            if entry.filename.endswith(".pkl"):
                with archive.open(entry) as program:
                    _check_pickle(program, entry.file_size)


def _directory_size(file: BinaryIO, size: int) -> int:
    """Bytes of a zip archive's directory by its end record, since zipfile reads it whole. 0 without an end record."""
    file.seek(max(0, size - 2**16 - 42))
    end = file.read()
    place = end.rfind(b"PK\x05\x06")
    if place < 0 or len(end) < place + 22:
        return 0
    (directory,) = struct.unpack_from("<L", end, place + 12)
    locator = place - 20
    if locator >= 0 and end[locator : locator + 4] == b"PK\x06\x07":
        file.seek(min(struct.unpack_from("<Q", end, locator + 8)[0], size))
        record = file.read(56)
        if record[:4] == b"PK\x06\x06" and len(record) == 56:
            (directory,) = struct.unpack_from("<Q", record, 40)
    return directory


class _Bounded:
    """A file that refuses reads beyond its end, since Python allocates memory for the whole request."""

    def __init__(self, file: BinaryIO, left: int):
        self.file, self.left = file, left

    def read(self, count: int) -> bytes:
        if count > self.left:
            raise UnfitFile(f"it asks for {count:,} bytes where {self.left:,} are left")
        return self._count(self.file.read(count))

    def readline(self) -> bytes:
        line = self._count(self.file.readline(_MAX_LINE))
        if len(line) == _MAX_LINE:
            raise UnfitFile(f"a line of it has more than {_MAX_LINE:,} bytes")
        return line

    def _count(self, data: bytes) -> bytes:
        self.left -= len(data)
        return data


class _Value:
    """The properties of a value that count here.

    Attributes:
        count: elements that hashing it visits: for a tuple the sum over its items, repetitions included.
        depth: levels of containers in it.
        items: a tuple's or a list's.
        largest: the largest count of the items.
    """

    __slots__ = ("count", "depth", "items", "largest")

    def __init__(self, count: int = 1):
        self.count, self.depth, self.largest = count, 0, 0
        self.items: list[_Value] | tuple[()] = ()

    @classmethod
    def of(cls, items: list["_Value"]) -> "_Value":
        """A tuple, or whatever else is hashed by its items."""
        return cls(min(1 + sum(each.count for each in items), _MAX_KEY + 1)).hold(items, are_items=True)

    def hold(self, others: list["_Value"], are_items: bool) -> "_Value":
        """Adds values to it, as items or as the keys and values of a dict."""
        if self is _ATOM:
            raise LookupError
        if not others:
            return self
        self.depth = max(self.depth, 1 + max(other.depth for other in others))
        if self.depth > _MAX_DEPTH:
            raise UnfitFile(f"it nests deeper than {_MAX_DEPTH} levels")
        if are_items:
            if not self.items:
                self.items = []
            self.items += others
            self.largest = max(self.largest, max(other.count for other in others))
        return self


class _Walk:
    """One pickle, read without execution: the stack and the memo that its instructions would make."""

    def __init__(self):
        self.stack: list[_Value] = []
        self.marks: list[int] = []
        self.memo: dict[int, _Value] = {}

    def step(self, instruction: pickletools.OpcodeInfo, argument: Any) -> None:
        """Takes one instruction.

        Raises:
            UnfitFile: it makes a key whose hash takes too long, or nests too deep.
            LookupError: it uses a value that does not exist.
        """
        name, stack = instruction.name, self.stack
        if name in _STORE:
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in _LOAD:
            stack.append(self.memo[argument])
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "MARK":
            self.marks.append(len(stack))
        else:
            taken = self._take(instruction.stack_before)
            if instruction.stack_after:  # FRAME and PROTO, for example, make nothing
                stack.append(self._make(name, argument, taken))

    def _take(self, before: list[pickletools.StackObject]) -> list[_Value]:
        above = []
        if pickletools.markobject in before:
            above = self.stack[self.marks[-1] :]
            del self.stack[self.marks.pop() :]
            before = before[: before.index(pickletools.markobject)]
        first = len(self.stack) - len(before)
        if first < (self.marks[-1] if self.marks else 0):
            raise LookupError
        taken = self.stack[first:]
        del self.stack[first:]
        return taken + above

    def _make(self, name: str, argument: Any, taken: list[_Value]) -> _Value:
        if name in ("APPEND", "APPENDS", "LIST", "EMPTY_LIST"):
            container, items = (_Value(), taken) if name.endswith("LIST") else (taken[0], taken[1:])
            # What was kept of it in the memo sees the items too.
            return container.hold(items, are_items=True)
        if name in ("SETITEM", "SETITEMS", "ADDITEMS", "DICT", "EMPTY_DICT", "EMPTY_SET"):
            container, items = (taken[0], taken[1:]) if "ITEM" in name else (_Value(), taken)
            _check_keys(items if name == "ADDITEMS" else items[::2])
            return container.hold(items, are_items=False)
        if name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX", "BUILD"):
            # It may make a set of the items of an argument, or a dict of pairs.
            given = taken[1:]
            if sum(len(each.items) for each in given) > _MAX_ARGUMENTS:
                raise UnfitFile(f"it calls something with more than {_MAX_ARGUMENTS} arguments")
            _check_keys([_Value(each.largest) for values in given for each in (values, *values.items)])
            return taken[0].hold(given, are_items=False) if name == "BUILD" else _Value.of(given)
        if name == "FROZENSET":
            _check_keys(taken)
        if name not in _OF_ITEMS and name not in _NUMBERS:
            return _ATOM
        if name in _NUMBERS and not -(2**60) < argument < 2**60:
            # Integers that differ by multiples of 2⁶¹ − 1 have one hash, and a dict of them takes forever.
            return _Value(_MAX_KEY + 1)
        return _Value.of(taken)


# Every value without items.
_ATOM = _Value()
_OF_ITEMS = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET"}
_LOAD = {"GET", "BINGET", "LONG_BINGET"}
_STORE = {"PUT", "BINPUT", "LONG_BINPUT"}
_NUMBERS = {"LONG", "LONG1", "INT"}
_NEEDLESS = {"LONG4", "NEXT_BUFFER", "READONLY_BUFFER", "EXT1", "EXT2", "EXT4", "INST", "OBJ"}


def _check_keys(keys: list[_Value]) -> None:
    if any(key.count > _MAX_KEY for key in keys):
        raise UnfitFile(f"a key in it is a tuple of more than {_MAX_KEY:,} values, or a huge number")


def _check_pickle(file: BinaryIO, size: int | None = None) -> None:
    """Walks one pickle, up to its end.

    Args:
        file: at the start of the pickle; afterwards at its end.
        size: the file's; None asks the system.

    Raises:
        UnfitFile: its memory or time would be far beyond its size.
        ValueError: it is no pickle.
    """
    size = os.fstat(file.fileno()).st_size if size is None else size
    bounded, walk = _Bounded(file, size - file.tell()), _Walk()
    try:
        for count, (instruction, argument, _) in enumerate(pickletools.genops(bounded)):
            name = instruction.name
            if count > _MAX_INSTRUCTIONS:
                raise UnfitFile(f"it has more than {_MAX_INSTRUCTIONS:,} instructions")
            if name in _NEEDLESS:
                raise UnfitFile(f"it has the instruction {name}, which no weights need")
            if name == "FRAME" and argument > bounded.left:
                raise UnfitFile(f"it asks for {argument:,} bytes where {bounded.left:,} are left")
            if name in _STORE and argument > size:
                # Python allocates memory for all indices below.
                raise UnfitFile(f"it asks for room for {argument:,} values, and has {size:,} bytes")
            walk.step(instruction, argument)
    except LookupError:
        raise UnfitFile("it takes values where there are none") from None
