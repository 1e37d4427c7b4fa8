"""The masks of COCO's JSON: polygons and run-length encoding, checked and brought into one form."""

import math
from collections.abc import Callable
from operator import mul
from typing import Any

import numpy as np
import pycocotools.mask as mask_util

from .coco_schema import FAR
from .report import short

NUMBERS = frozenset((int, float))
# Notes a finding by its rule's key and what was found.
Note = Callable[[str, str | Callable[[], str]], None]
# (left, top, right, bottom) in pixels.
Extent = tuple[float, float, float, float]


def read_mask(value: Any, width: int, height: int, note: Note) -> tuple[list | dict | None, Extent | None]:
    """Checks the segmentation of an annotation, which is not null.

    Args:
        value: polygons or a run-length encoded mask, as in the JSON.
        width, height: the image's, in pixels.
        note: takes the findings; rules that refuse make the result meaningless.

    Returns:
        Polygons [[x, y, x, y, …], …], or a compressed run-length encoded mask, or None where there is no
        mask; and the extent of the mask, None where it has no pixel or there is none.
    """
    if isinstance(value, dict):
        return _read_rle(value, width, height, note)
    if not isinstance(value, list):
        note("mask", f"segmentation is {short(value)}; it must be polygons or a run-length encoded mask.")
        return None, None
    return _read_polygons(value, width, height, note)


def area_of(mask: list | dict, width: int, height: int) -> int:
    """The pixels of a mask of `read_mask`."""
    rle = mask_util.merge(mask_util.frPyObjects(mask, height, width)) if isinstance(mask, list) else mask
    return int(mask_util.area(rle))


def _read_polygons(value: list, width: int, height: int, note: Note) -> tuple[list | None, Extent | None]:
    polygons = [polygon for polygon in value if polygon != []]
    if not polygons:
        return None, None
    if type(polygons[0]) in NUMBERS:
        note("polygon-pairs", lambda: f"segmentation is {short(value)}")
        polygons = [polygons]
    elif len(polygons) > 2 and all(_is_point(point) for point in polygons):
        # Points, not polygons: no polygon has two elements.
        polygons = [polygons]
    far = FAR * max(width, height)
    read = []
    least = short_ones = 0
    left = top = math.inf
    right = bottom = -math.inf
    for polygon in polygons:
        if type(polygon) is not list:
            note("mask", f"segmentation holds {short(polygon)}; a polygon is a list [x, y, x, y, …].")
            return None, None
        if polygon and type(polygon[0]) is list and all(map(_is_point, polygon)):
            note("polygon-pairs", lambda: f"segmentation is {short(value)}")
            polygon = [coordinate for point in polygon for coordinate in point]
        if not NUMBERS.issuperset(map(type, polygon)):
            found = next(x for x in polygon if type(x) not in NUMBERS)
            note("mask", f"segmentation has a polygon that holds {short(found)}; its coordinates must be numbers.")
            return None, None
        if len(polygon) % 2:
            note(
                "polygon-length",
                f"segmentation has a polygon of {len(polygon)} numbers, {short(polygon)}; x and y come in pairs.",
            )
            return None, None
        # Comparisons with NaN are False, so the question is whether all lie inside, not whether one lies outside.
        xs, ys = polygon[::2], polygon[1::2]
        x1, x2, y1, y2 = min(xs), max(xs), min(ys), max(ys)
        if not (x1 >= -far and y1 >= -far and x2 <= width + far and y2 <= height + far) or math.isnan(sum(polygon)):
            finite = all(map(_is_finite, polygon))
            note(*_polygon_out_of_range(polygon, width, height, finite))
            return None, None
        if len(polygon) < 6:
            short_ones += 1
            continue
        # Twice the area inside, by the shoelace formula; where it is little, the pixels must be counted.
        twice = sum(map(mul, xs, ys[1:] + ys[:1])) - sum(map(mul, ys, xs[1:] + xs[:1]))
        least = max(least, abs(twice) - 4 * max(x2 - x1, y2 - y1))
        left, right, top, bottom = min(left, x1), max(right, x2), min(top, y1), max(bottom, y2)
        read.append(polygon)
    if not read:
        note("polygon-length", f"segmentation is {short(value)}; a polygon must have three points at least.")
        return None, None
    for _ in range(short_ones):
        note("polygon-short", lambda: f"segmentation is {short(value)}")
    inside = left >= -1 and top >= -1 and right <= width + 1 and bottom <= height + 1
    if not (inside and least > 8) and not area_of(read, width, height):
        return read, None
    return read, (left, top, right, bottom)


def _polygon_out_of_range(polygon: list, width: int, height: int, finite: bool) -> tuple[str, str]:
    if finite:
        furthest = max(polygon, key=abs)
        return "polygon-far", (
            f"segmentation has a point at {short(furthest)}, far outside the image of {width} × {height}."
        )
    found = next(x for x in polygon if not _is_finite(x))
    return "polygon-not-finite", f"segmentation holds {short(found)}; coordinates must be finite."


def _is_point(value: Any) -> bool:
    return type(value) is list and len(value) == 2 and type(value[0]) in NUMBERS and type(value[1]) in NUMBERS


def _is_finite(value: float) -> bool:
    # An int of any size is finite, though it may be too large for a float.
    return type(value) is int or math.isfinite(value)


def _read_rle(value: dict, width: int, height: int, note: Note) -> tuple[dict | None, Extent | None]:
    size, counts = value.get("size"), value.get("counts")
    if type(size) is not list or [type(x) for x in size].count(bool) or size != [height, width]:
        swapped = ": they are swapped" if size == [width, height] else ""
        note(
            "rle-size",
            f"segmentation has the size {short(size)}; the image's [height, width] is {[height, width]}{swapped}.",
        )
        return None, None
    if any(type(x) is float for x in size):
        note("rle-float", lambda: f"size is {size}")
    if type(counts) is list:
        if not all(type(x) is int or (type(x) is float and x.is_integer()) for x in counts):
            found = next(x for x in counts if not (type(x) is int or (type(x) is float and x.is_integer())))
            note("rle-counts", f"segmentation has {short(found)} among its counts; runs are whole numbers.")
            return None, None
        if any(type(x) is float for x in counts):
            note("rle-float", lambda: f"counts is {short(counts)}")
        runs = [int(x) for x in counts]
        compressed = None
    elif type(counts) is str:
        runs, compressed = _decoded(counts), counts
        if runs is None:
            note("rle-counts", f"segmentation has counts that are no compressed runs: {short(counts)}")
            return None, None
    else:
        note(
            "rle-counts",
            f"segmentation has the counts {short(counts)}; they must be a list of runs, or compressed text.",
        )
        return None, None
    if any(run < 0 for run in runs):
        note(
            "rle-counts",
            f"segmentation has the run {next(run for run in runs if run < 0)} among its counts; runs "
            "are 0 or more pixels.",
        )
        return None, None
    if sum(runs) != width * height:
        note("rle-counts", f"segmentation has counts of {sum(runs)} pixels; height × width is {width * height}.")
        return None, None
    if compressed is not None:
        rle = {"size": [height, width], "counts": compressed}
    else:
        rle = mask_util.frPyObjects({"size": [height, width], "counts": runs}, height, width)
    if not any(runs[1::2]):
        return rle, None
    x, y, w, h = mask_util.toBbox(rle).tolist()
    return rle, (x, y, x + w, y + h)


def _decoded(text: str) -> list[int] | None:
    """The runs of COCO's compressed text, None if it is none: pycocotools' rleFrString, which checks nothing.

    A number is written in digits of 5 bits, the lowest first, each as a character from "0" on; bit 5 says that another
    digit follows, and the highest bit of the last one is the sign. From the fourth on, numbers are differences to the
    run before the last.
    """
    try:
        digits = np.frombuffer(text.encode("ascii"), dtype=np.uint8).astype(np.int64) - 48
    except UnicodeEncodeError:
        return None
    if not digits.size:
        return []
    if digits.min() < 0 or digits.max() > 63 or digits[-1] & 32:
        return None
    ends = np.flatnonzero(digits < 32)
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    if lengths.max() > 7:
        return None
    shifts = 5 * (np.arange(digits.size) - np.repeat(starts, lengths))
    numbers = np.add.reduceat((digits & 31) << shifts, starts)
    numbers -= np.where(digits[ends] & 16, np.int64(1) << (5 * lengths), 0)
    numbers[2::2] = np.cumsum(numbers[2::2])
    numbers[1::2] = np.cumsum(numbers[1::2])
    return numbers.tolist()
