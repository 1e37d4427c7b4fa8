"""Keys and values into a config: every value is of its default's type, or it is refused by its key.

Detectron2 takes None for any key and a list of anything for a list, so that a mistake shows hours later, or never.
"""

import ast
import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from detectron2.config import CfgNode

# Characters of a value on the command line or in a file.
_MAX_LENGTH = 100_000
# Example values of keys whose default, None or empty, does not show their type.
_LIKE: dict[str, Any] = {
    "MODEL.KARAT.NUM_KARAT_HEADS": 1,
    "MODEL.KARAT.BLOCKS": [0],
    "MODEL.FPN.IN_FEATURES": ["p2"],
    "DATASETS.TRAIN": ("name",),
    "DATASETS.TEST": ("name",),
    "DATASETS.PROPOSAL_FILES_TRAIN": ("path",),
    "DATASETS.PROPOSAL_FILES_TEST": ("path",),
    "KARAT_DATA.NAMES": ["name"],
    "KARAT_DATA.JSONS": ["path"],
    "KARAT_DATA.IMAGE_DIRS": ["path"],
    "SOLVER.WEIGHT_DECAY_BIAS": 0.0,
    "TEST.KEYPOINT_OKS_SIGMAS": [0.1],
    # Integers in Detectron2's defaults, but floats are allowed too.
    "MODEL.ANCHOR_GENERATOR.SIZES": [[32.0]],
    "MODEL.ANCHOR_GENERATOR.ANGLES": [[0.0]],
    # Pretraining.
    **{f"MODEL.{key}": 1 for key in ("IMG_SIZE", "PATCH_SIZE", "EMBED_DIM", "DEPTH", "NUM_HEADS")},
    "MODEL.DROP_PATH_RATE": 0.1,
}
# Lists of mixed types, which have separate checks.
_OF_ANYTHING = {"TEST.EXPECTED_RESULTS"}
# Besides keys whose default is None.
_MAY_BE_NONE = {"MODEL.KARAT.RANK"}
_WORDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}
_PLURALS = {bool: "True or False", int: "whole numbers", float: "numbers", str: "texts"}


def merge_values(cfg: CfgNode, content: Mapping[str, Any], opts: list[str]) -> None:
    """Merges a file's content, and then a command line's overrides, into a config.

    Args:
        cfg: the defaults; changed in place.
        content: sections and keys, as `karat_det.yaml_file.read_config` returns them.
        opts: keys and values in turn. Values are Python's, or plain text.

    Raises:
        ValueError: a key is unknown, or its value is of another type than its default.
    """
    defaults = dict(leaves(cfg))
    for key, given in _of_file(content, cfg, list(defaults)):
        _set(cfg, key, given, defaults)
    for key, given in zip(opts[::2], opts[1::2], strict=True):
        _set(cfg, key, given, defaults, "An override does not fit its key: ")


def _set(cfg: CfgNode, key: str, given: Any, defaults: Mapping[str, Any], complaint: str = "") -> None:
    if key not in defaults:
        raise ValueError(_unknown(key, list(defaults)))
    *sections, name = key.split(".")
    for section in sections:
        cfg = cfg[section]
    try:
        cfg[name] = value_like(key, given, defaults[key])
    except ValueError as error:
        raise ValueError(f"{complaint}{error}") from None


def leaves(cfg: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a config that is no section, with its value."""
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def value_like(key: str, given: Any, default: Any) -> Any:
    """A value as a file or a command line gives it, in the type of the key's default.

    Args:
        key: its name.
        given: text, or a value from YAML. Text is parsed as a Python literal, unless the key's type is text.
        default: the key's default.

    Raises:
        ValueError: it is of another type.
    """
    example = _LIKE.get(key, default)
    may_be_none = default is None or key in _MAY_BE_NONE
    try:
        value = _literal(given, isinstance(example, str)) if isinstance(given, str) else given
        if value is None and may_be_none:
            return None
        if example is None:
            return value
        return _converted(value, list(default) if key in _OF_ANYTHING else example)
    except (TypeError, ValueError, OverflowError):
        words = _words(example) + " or None" * may_be_none
        raise ValueError(f"{key} is {shown(given)}. It must be {words}.") from None


def shown(value: Any) -> str:
    """A value for a message: as in Python, but at most a line."""
    text = value if isinstance(value, str) and value.strip() == value and value else repr(value)
    return text if len(text) <= 100 else f"{text[:80]}… ({len(text):,} characters)"


def _literal(text: str, is_text: bool) -> Any:
    if len(text) > _MAX_LENGTH:
        raise ValueError
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
    # A folder may be called 2024.
    return text if is_text and isinstance(value, int | float) and not isinstance(value, bool) else value


def _converted(value: Any, example: Any, is_item: bool = False) -> Any:
    kind = type(example)
    if kind in (list, tuple):
        if type(value) not in (list, tuple):
            raise TypeError
        return kind(_converted(item, example[0], is_item=True) if example else item for item in value)
    if kind is float and type(value) is int:
        # Within lists they stay as written, since messages show them.
        return value if is_item else float(value)
    if type(value) is not kind or (kind is float and math.isnan(value)) or (kind is str and "\0" in value):
        raise TypeError
    return value


def _words(example: Any) -> str:
    if type(example) in (list, tuple):
        return f"a list of {_plural(example[0])}" if len(example) else "a list"
    return _WORDS[type(example)]


def _plural(example: Any) -> str:
    return f"lists of {_plural(example[0])}" if type(example) in (list, tuple) else _PLURALS[type(example)]


def _of_file(content: Mapping[str, Any], cfg: CfgNode, known: list[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        key = prefix + name
        section = cfg.get(name) if isinstance(cfg, CfgNode) else None
        if isinstance(section, CfgNode):
            if not isinstance(value, dict):
                raise ValueError(
                    f"{key} is {shown(value)}. It must be a section, with keys such as {next(iter(section))}."
                )
            yield from _of_file(value, section, known, f"{key}.")
        elif isinstance(value, dict) and key not in known:
            raise ValueError(_unknown(_first_leaf(key, value), known))
        else:
            yield key, value


def _first_leaf(key: str, value: Any) -> str:
    while isinstance(value, dict) and value:
        name, value = next(iter(value.items()))
        key = f"{key}.{name}"
    return key


def _unknown(key: str, known: Iterable[str]) -> str:
    name, sign, value = key.partition("=")
    if sign and name in known:
        return f"There is no key {shown(key)}. Key and value are two words here: {name} {shown(value)}."
    near = difflib.get_close_matches(key[:200], known, n=1, cutoff=0.8)
    return f"There is no key {shown(key)}." + (f" Did you mean {near[0]}?" if near else "")
