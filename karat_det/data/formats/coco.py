"""Reads COCO's JSON, checks it by the rules of `coco_schema`, and brings it into one form.

Training and evaluation get every COCO dataset from here. Images and classes are numbered in the order of their ids; the
ids themselves, numbers or text, are kept for results alone.
"""

import gc
import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from detectron2.structures import BoxMode

from .coco_boxes import BoxHabits
from .coco_ids import MAX_EXACT, Id, found_in, key_of, place_in_order, read_id
from .coco_masks import NUMBERS, Note, area_of, read_mask
from .coco_schema import DOCUMENTATION, FAR, LEAST_SIDE, MAX_PIXELS, MAX_SIDE, RULES
from .report import Report, short

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Image:
    """One image: its own id, its file below the image folder, and its size in pixels."""

    id: Id
    file_name: str
    width: int
    height: int


@dataclass(frozen=True)
class CocoContent:
    """The content of a JSON.

    Attributes:
        images: in the order of their ids.
        category_ids: the id of each class, in the order of the ids.
        class_names: the name of each class, no two alike.
        annotations: for each image its annotations, in the order of the file; None where the JSON, such as a test
            set's, has none. Each is a dict of Detectron2's dataset format: "bbox" as four floats, "bbox_mode" XYWH_ABS,
            "category_id" the number of its class, "iscrowd" 0 or 1, and "segmentation", polygons or compressed
            run-length encoding, where it has a mask; with "id", its own or None, and "area" in pixels. Where it has a
            mask without a pixel, "empty_mask" is True and there is no "segmentation".
    """

    images: list[Image]
    category_ids: list[Id]
    class_names: list[str]
    annotations: list[list[dict[str, Any]]] | None


def read_coco(json_file: str, source: str | None = None) -> CocoContent:
    """Reads and checks a file.

    Each rule by which something was put right or left out is logged in a line, with its count.

    Args:
        json_file: its path.
        source: its name in errors; its path by default.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON, or breaks a refusing rule of `coco_schema.RULES`; all errors are in one report.
    """
    with _without_collector():
        return _read(json_file, Report(source or json_file, RULES, DOCUMENTATION))


def read_categories(json_file: str, source: str | None = None) -> tuple[list[Id], list[str]]:
    """Reads only the ids and names of a file's classes, in the order of the ids, and logs nothing.

    Arguments and errors are those of `read_coco`.
    """
    report = Report(source or json_file, RULES, DOCUMENTATION)
    with _without_collector():
        try:
            categories = _read_categories(_parse(json_file, report, only="categories"), report)
            report.raise_refused()
        except ValueError:
            # Other errors may be reported with it.
            read_coco(json_file, source)
            raise
    return categories


def _read(json_file: str, report: Report) -> CocoContent:
    content = _parse(json_file, report)
    category_ids, class_names = _read_categories(content, report)
    images, numbers = _read_images(content, report)
    # Removed from the content entry by entry, so that nothing is in memory twice.
    raw = content.pop("annotations", None)
    annotations = None
    if isinstance(raw, list):
        annotations = _read_annotations(raw, images, numbers, {key_of(each): each for each in category_ids}, report)
        _compare_same_files(images, annotations, report)
    report.raise_refused()
    report.log()
    order = sorted(range(len(images)), key=lambda i: place_in_order(images[i].id))
    return CocoContent(
        [images[i] for i in order],
        category_ids,
        class_names,
        None if annotations is None else [annotations[i] for i in order],
    )


@contextmanager
def _without_collector() -> Iterator[None]:
    """Python's garbage collector would look through all of millions of new objects, again and again."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _parse(json_file: str, report: Report, only: str | None = None) -> dict[str, Any]:
    # Objects that hold a key twice, and the key.
    twice: list[tuple[dict[str, Any], str]] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entry = dict(pairs)
        if len(entry) < len(pairs):
            keys = [key for key, _ in pairs]
            twice.append((entry, next(key for key in keys if keys.count(key) > 1)))
        return entry

    if os.path.exists(json_file) and not os.path.isfile(json_file):
        raise ValueError(f"{report.source} is a folder or a pipe, where a JSON file is needed.")
    try:
        with open(json_file, "rb") as file:
            encoding = json.detect_encoding(file.read(4))
        with open(json_file, encoding=encoding) as file:
            content = json.load(file, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{report.source} is not a JSON file: {error}. Write or download it anew.") from error
    except MemoryError as error:
        raise ValueError(
            f"{report.source} has {os.path.getsize(json_file):,} bytes, more than there is memory for."
        ) from error
    if not isinstance(content, dict):
        report.add("structure", detail=f"the file holds {short(content)}; it must be an object.")
        report.raise_refused()
    _report_twice(content, twice, report)
    lists = ("images", "categories") if only is None else (only,)
    for name in (*lists, "annotations") if "annotations" in content and only is None else lists:
        if not isinstance(content.get(name), list):
            found = f"is {short(content[name])}" if name in content else "is missing"
            report.add("structure", detail=f"{name!r} {found}; it must be a list of objects.")
    if content.get("categories") == []:
        report.add("no-categories", detail="it has no categories; list the classes under 'categories'.")
    return content


def _report_twice(content: dict[str, Any], twice: list[tuple[dict[str, Any], str]], report: Report) -> None:
    """Names the place of each object that has a key twice: an entry of a list, a part of one, or elsewhere."""
    places = {}
    for list_name in ("images", "categories", "annotations") if twice else ():
        for index, entry in enumerate(content[list_name] if isinstance(content.get(list_name), list) else ()):
            inside = entry.values() if isinstance(entry, dict) else ()
            places.update({id(each): (list_name, index, entry) for each in (entry, *inside) if isinstance(each, dict)})
    for entry, key in twice:
        place = places.get(id(entry), ())
        where = "there" if place else "in an object"
        report.add("key-twice", *place, detail=f"the key {short(key)} stands twice {where}.")


def _read_categories(content: dict[str, Any], report: Report) -> tuple[list[Id], list[str]]:
    names: dict[Id, str] = {}
    ids: dict[Id, Id] = {}
    first: dict[Id, int] = {}
    for index, category in _objects(content, "categories", report):
        name = category.get("name")
        if type(name) in NUMBERS:
            report.add("name-number", "categories", index, category)
            name = str(name)
        elif type(name) is not str or not name:
            report.add("name", "categories", index, category, f"name is {found_in(category, 'name')}; it must be text.")
            name = "?"
        id = read_id(category, "id", "categories", index, category, report)
        if id is None:
            continue
        key = key_of(id)
        if key in first:
            other = first[key]
            report.add(
                "id-twice",
                "categories",
                index,
                category,
                f"the id is that of categories[{other}] ({short(names[key])}), too.",
            )
            continue
        first[key], names[key], ids[key] = index, name, id
    order = sorted(ids, key=place_in_order)
    class_names = [names[key] for key in order]
    while len(set(class_names)) < len(class_names):
        twice = {name for name in class_names if class_names.count(name) > 1}
        for i, name in enumerate(class_names):
            if name in twice:
                report.add("name-twice", detail=f"{name!r} of the category with id {short(ids[order[i]])}")
                class_names[i] = f"{name} (id {ids[order[i]]})"
    return [ids[key] for key in order], class_names


def _read_images(content: dict[str, Any], report: Report) -> tuple[list[Image], dict[Id, int]]:
    """The images in the order of the file, and the place of each id; images of a wrong size have size 0."""
    images: list[Image] = []
    places: dict[Id, int] = {}
    first: dict[Id, int] = {}
    for index, image in _objects(content, "images", report):
        file_name = image.get("file_name")
        if type(file_name) is not str or not file_name:
            report.add(
                "file-name",
                "images",
                index,
                image,
                f"file_name is {found_in(image, 'file_name')}; it must be the path of a file.",
            )
        elif "://" in file_name:
            report.add(
                "file-name", "images", index, image, "file_name is a URL. Download the images, and name their files."
            )
        width, height = (_read_side(image, key, index, report) for key in ("width", "height"))
        if width * height > MAX_PIXELS:
            report.add("size", "images", index, image, f"{width} × {height} are more than {MAX_PIXELS} pixels.")
            width = height = 0
        id = read_id(image, "id", "images", index, image, report)
        if id is None:
            continue
        key = key_of(id)
        if key in places:
            other = images[places[key]].file_name
            report.add(
                "id-twice", "images", index, image, f"the id is that of images[{first[key]}] ({short(other)}), too."
            )
            continue
        places[key], first[key] = len(images), index
        images.append(Image(id, file_name, width if height else 0, height if width else 0))
    return images, places


def _read_side(image: dict[str, Any], key: str, index: int, report: Report) -> int:
    value = image.get(key)
    if type(value) is float and value.is_integer():
        report.add("size-float", "images", index, image, f"{key} is {value}")
        value = int(value)
    if type(value) is not int or not 1 <= value <= MAX_SIDE:
        report.add(
            "size",
            "images",
            index,
            image,
            f"{key} is {found_in(image, key)}; it must be a whole number of pixels from 1 to {MAX_SIDE}.",
        )
        return 0
    return value


def _read_annotations(
    raw: list, images: list[Image], places: dict[Id, int], categories: dict[Id, Id], report: Report
) -> list[list[dict[str, Any]]]:
    """Reads the annotations, and empties their list.

    Args:
        raw: the JSON's list.
        images: in the order of the file.
        places: the place of each image's id.
        categories: the ids of the classes in their order, by `key_of`.
        report: takes the findings.

    Returns:
        For each image its annotations.
    """
    grouped: list[list[dict[str, Any]]] = [[] for _ in images]
    classes = {key: (number, id) for number, (key, id) in enumerate(categories.items())}
    image_of = {key: (place, images[place].id) for key, place in places.items()}
    habits = BoxHabits()
    seen: dict[Id, int] = {}
    # The popular "minival" files of COCO 2014 have ids twice; nothing here depends on the ids of annotations.
    unique = "minival" not in report.source
    for index in range(len(raw)):
        annotation, raw[index] = raw[index], None
        if type(annotation) is not dict:
            report.add("structure", "annotations", index, None, f"{short(annotation)} is no object.")
            continue

        def note(rule: str, detail: str | Callable[[], str], index: int = index, annotation: dict = annotation) -> None:
            report.add(rule, "annotations", index, annotation, detail)

        id = annotation.get("id")
        if id is None:
            note("id-missing", "")
        else:
            id = read_id(annotation, "id", "annotations", index, annotation, report)
            if id is not None:
                before = seen.setdefault(key_of(id), index)
                if before != index and unique:
                    note("id-twice", f"the id is that of annotations[{before}], too.")
        place = _referred(annotation, "image_id", image_of, index, report)
        number = _referred(annotation, "category_id", classes, index, report)
        iscrowd = _read_iscrowd(annotation, note)
        if annotation.get("ignore") and not iscrowd:
            note(
                "ignore",
                f"ignore is {short(annotation['ignore'])}, iscrowd 0. Set iscrowd 1 for what is neither trained on nor "
                "counted, or remove ignore.",
            )
        if place is None:
            continue
        width, height = images[place].width, images[place].height
        if not width:
            continue
        box = _read_box(annotation, width, height, note)
        mask, extent = None, None
        if annotation.get("segmentation") not in (None, {}):
            mask, extent = read_mask(annotation["segmentation"], width, height, note)
        if box is None or number is None:
            continue
        x, y, w, h = box
        # The part of the box that is in the image.
        inner = min(x + w, width) - max(x, 0), min(y + h, height) - max(y, 0)
        is_empty = min(inner) < LEAST_SIDE
        if is_empty:
            note("bbox-empty", f"bbox is {short(annotation['bbox'])}, in an image of {width} × {height}")
            continue
        habits.add(box, extent, width, height, index, annotation)
        read = {
            "id": id,
            "bbox": box,
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": number,
            "iscrowd": iscrowd,
            "area": _read_area(annotation, box, mask, width, height, note),
        }
        if mask is not None and extent is not None:
            read["segmentation"] = mask
        elif mask is not None:
            habits.masks_as_fractions += isinstance(mask, list) and max(map(max, mask)) <= 1
            note("mask-empty", f"segmentation is {short(annotation['segmentation'])}")
            read["empty_mask"] = True
        grouped[place].append(read)
    habits.judge(report)
    return grouped


def _compare_same_files(images: list[Image], annotations: list[list[dict[str, Any]]], report: Report) -> None:
    """Notes entries of the same file that have other objects. Entries that repeat an image are allowed."""

    def objects(place: int) -> list[tuple[int, list[float]]]:
        return sorted((each["category_id"], each["bbox"]) for each in annotations[place])

    first: dict[str, int] = {}
    for place, image in enumerate(images):
        # No text if it was refused.
        before = first.setdefault(os.path.normpath(str(image.file_name)), place)
        if before != place and objects(place) != objects(before):
            report.add(
                "file-twice",
                detail=f"the images with the ids {short(images[before].id)} and {short(image.id)} are both "
                f"{short(image.file_name)}, and have other objects. Give an image one entry, and each its own file.",
            )


def _referred(
    annotation: dict[str, Any], key: str, known: dict[Id, tuple[int, Id]], index: int, report: Report
) -> int | None:
    """The number of the image or category whose id an annotation gives; None if there is none."""
    id = read_id(annotation, key, "annotations", index, annotation, report)
    if id is None:
        return None
    number, own = known.get(key_of(id), (None, id))
    if not known and (report.counts.get("structure") or report.counts.get("no-categories")):
        # A missing or unreadable list is noted already.
        return None
    if number is None:
        list_name = "images" if key == "image_id" else "categories"
        report.add(
            "reference", "annotations", index, annotation, f"{key} is {short(id)}, which is no id of {list_name!r}."
        )
    elif type(own) is not type(id):
        report.add("id-other-type", "annotations", index, annotation, f"{key} is {short(id)} for {short(own)}")
    return number


def _read_iscrowd(annotation: dict[str, Any], note: Note) -> int:
    value = annotation.get("iscrowd", 0)
    if type(value) is int and value in (0, 1):
        return value
    if value is None or value is True or value is False or value in ("0", "1") or value in (0.0, 1.0):
        note("iscrowd-null", f"iscrowd is {short(value)}")
        return int(value or 0)
    note("iscrowd", f"iscrowd is {short(value)}; it must be 0 or 1.")
    return 0


def _read_box(annotation: dict[str, Any], width: int, height: int, note: Note) -> list[float] | None:
    """[x, y, width, height] with sides of 0 or more, near the image; None if it was refused."""
    value = annotation.get("bbox")
    if type(value) is not list or len(value) != 4 or not NUMBERS.issuperset(map(type, value)):
        note("bbox", f"bbox is {found_in(annotation, 'bbox')}; it must be [x, y, width, height].")
        return None
    far = FAR * max(width, height)
    # An int may be too large for a float; compared, it need not become one.
    if not all(-far <= x <= 2 * far for x in value):
        if any(type(x) is float and not math.isfinite(x) for x in value):
            note("bbox-not-finite", f"bbox is {short(value)}; its numbers must be finite.")
        else:
            note("bbox-far", f"bbox is {short(value)}, far outside the image of {width} × {height}.")
        return None
    x, y, w, h = map(float, value)
    if w < 0 or h < 0:
        note("bbox-negative", lambda: f"bbox is {short(value)}")
        x, y, w, h = min(x, x + w), min(y, y + h), abs(w), abs(h)
    if x < -far or y < -far or x + w > width + far or y + h > height + far:
        note("bbox-far", f"bbox is {short(value)}, far outside the image of {width} × {height}.")
        return None
    return [x, y, w, h]


def _read_area(
    annotation: dict[str, Any],
    box: list[float],
    mask: list | dict | None,
    width: int,
    height: int,
    note: Note,
) -> float:
    value = annotation.get("area")
    if type(value) in NUMBERS and 0 < value < MAX_EXACT:
        return float(value)
    if value is None or (type(value) in NUMBERS and value == 0):
        note("area-missing", f"area is {found_in(annotation, 'area')}")
        return float((mask and area_of(mask, width, height)) or box[2] * box[3])
    note("area", f"area is {short(value)}; it must be a number of pixels.")
    return 0.0


def _objects(content: dict[str, Any], list_name: str, report: Report):
    """The entries of a list that are objects, with their indices; notes the others."""
    entries = content.get(list_name)
    for index, entry in enumerate(entries if isinstance(entries, list) else ()):
        if type(entry) is dict:
            yield index, entry
        else:
            report.add("structure", list_name, index, None, f"{short(entry)} is no object.")
