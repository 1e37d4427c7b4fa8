"""Reads YAML files of configs and studies: one mapping of words to plain values, each key once, no code.

Two things that YAML allows are refused here: references that expand to billions of values in ten lines, and a second
value of a key, which silently replaces the first.
"""

import os
from pathlib import Path
from typing import Any

import yaml

from .checkpoint.inspection import not_a_file

_MAX_BYTES = 1_000_000
# Most values of a file, with references expanded.
_MAX_VALUES = 10_000
_MAX_DEPTH = 30
# Most files that a config may combine by _BASE_.
_MAX_FILES = 50
_BASE = "_BASE_"
_MERGE = "tag:yaml.org,2002:merge"


def read_yaml(path: str | os.PathLike, what: str) -> dict[str, Any]:
    """Reads a YAML file.

    Args:
        path: the file.
        what: its kind, for messages, such as "study".

    Returns:
        The file's mapping, of mappings, lists and plain values.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no file, is no YAML in UTF-8, holds more than plain values, is empty or no mapping, has a key
            twice or one that is no word, or expands to too many values. The message names the file and the line.
    """
    if kind := not_a_file(path):
        raise ValueError(f"{path} is {kind}. A {what} is a YAML file.")
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: there is no such {what}.")
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise _Refused(f"it has more than {_MAX_BYTES:,} bytes")
        loaded = yaml.load(content.decode("utf-8-sig"), _Loader)
        if not isinstance(loaded, dict):
            raise _Refused("it is empty" if loaded is None else f"it holds a {type(loaded).__name__}, no keys")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no {what} that can be read: it is not in UTF-8 ({error.reason}).") from None
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise ValueError(f"{path} is no {what} that can be read: {_in_one_line(error)}.") from None
    return loaded


def read_config(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a YAML file and those that its `_BASE_` names, whose keys it overrides.

    Args:
        path: the file. A base, or a list of them, is relative to the file that names it; "~" is the home folder.

    Returns:
        All their keys in one mapping.

    Raises:
        FileNotFoundError, ValueError: as `read_yaml`; or a file is its own base.
    """
    return _read_with_bases(Path(path), [], [])


def _read_with_bases(path: Path, chain: list[Path], read: list[Path]) -> dict[str, Any]:
    """
    Args:
        path: the file.
        chain: the files that led to it.
        read: all files read so far; this one is added.
    """
    if any(_same(path, other) for other in chain):
        way = " → ".join(map(str, [*chain, path]))
        raise ValueError(f"{path} is its own {_BASE}: {way}. Take one of these out.")
    read.append(path)
    if len(read) > _MAX_FILES:
        raise ValueError(f"{read[0]} is made of more than {_MAX_FILES} files by {_BASE}.")
    try:
        own = read_yaml(path, "config")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} {chain[-1]} names it as {_BASE}." if chain else str(error)) from None
    bases = own.pop(_BASE, [])
    bases = bases if isinstance(bases, list) else [bases]
    if not all(isinstance(base, str) and base for base in bases):
        raise ValueError(f"{path}: {_BASE} is {bases!r:.100}. It must be the path of a YAML file, or a list of them.")
    merged: dict[str, Any] = {}
    for base in bases:
        if "://" in base:
            raise ValueError(f"{path}: {_BASE} is {base!r:.200}. It must be a file on this machine: download it first.")
        place = path.parent / os.path.expanduser(base)
        _merge(_read_with_bases(place, [*chain, path], read), merged)
    _merge(own, merged)
    return merged


def _same(path: Path, other: Path) -> bool:
    return os.path.realpath(path) == os.path.realpath(other)


def _merge(above: dict[str, Any], below: dict[str, Any]) -> None:
    """Puts the keys of a mapping over those of another, in place, section by section."""
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(key), dict):
            _merge(value, below[key])
        else:
            below[key] = value


class _Refused(yaml.YAMLError):
    """The file is YAML, but has what is refused here."""


class _Loader(yaml.SafeLoader):
    """PyYAML's loader of plain values, with limits. It counts the values of references before it makes any."""

    def __init__(self, stream: str):
        super().__init__(stream)
        self.depth = self.count = 0
        self.sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        event, before = self.peek_event(), self.count
        line = event.start_mark.line + 1
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise _Refused(f"line {line} is more than {_MAX_DEPTH} levels deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self.sizes:
                raise _Refused(f"line {line} refers to what it is in itself, *{event.anchor}")
            self.count += self.sizes[id(node)]
        else:
            self.count += 1
            self.sizes[id(node)] = self.count - before
        if self.count > _MAX_VALUES:
            raise _Refused(f"with what it refers to it stands for more than {_MAX_VALUES:,} values")
        return node

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.tag == _MERGE:
                continue
            if key.tag != "tag:yaml.org,2002:str":
                raise _Refused(f"the key {str(key.value)!r:.100} in line {line} is no word. Put it in quotes")
            if key.value in lines:
                raise _Refused(f"the key {key.value!r:.100} is there twice, in lines {lines[key.value]} and {line}")
            lines[key.value] = line
        return node


def _in_one_line(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem:
        mark = error.problem_mark
        return error.problem.rstrip(".") + (f", in line {mark.line + 1}" if mark else "")
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
