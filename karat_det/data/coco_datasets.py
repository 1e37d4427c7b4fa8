"""COCO datasets by name: one reading of a JSON gives the records of a loader and the ground truth of an evaluator.

It replaces Detectron2's loader of COCO's JSON, for a user's own datasets and for Detectron2's names.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from .formats.coco import CocoContent, read_coco
from .formats.coco_ids import Id

logger = logging.getLogger(__name__)

Record = dict[str, Any]

# Share of a file's annotations. In COCO one in a hundred is a crowd.
_MANY = 0.1


@dataclass(frozen=True)
class _Loaded:
    content: CocoContent
    masks: bool


# What a run has checked and will ask for again: a file that changes in the meantime changes no result.
_loaded: dict[str, _Loaded] = {}


def is_coco(name: str) -> bool:
    """Whether a registered dataset is a JSON in COCO format and a folder of images."""
    metadata = MetadataCatalog.get(name)
    return metadata.get("evaluator_type") == "coco" and bool(metadata.get("json_file") and metadata.get("image_root"))


def source_of(name: str) -> str:
    """The user's name for the dataset: its JSON, if it has one, and its registered name."""
    json_file = MetadataCatalog.get(name).get("json_file")
    return f"{json_file} (dataset {name!r})" if json_file else f"Dataset {name!r}"


def register_coco(name: str, json_file: str, image_root: str, classes: tuple[list[Id], list[str]]) -> None:
    """Registers a JSON and a folder of images under a name, and forgets what that name meant before.

    Args:
        name: the dataset's name.
        json_file, image_root: its paths.
        classes: ids and names, as `read_categories` returns them.
    """
    for catalog in (DatasetCatalog, MetadataCatalog):
        if name in catalog:
            catalog.remove(name)
    _loaded.pop(name, None)
    DatasetCatalog.register(name, lambda: records_of(name))
    MetadataCatalog.get(name).set(json_file=json_file, image_root=image_root, evaluator_type="coco")
    _set_classes(name, *classes)


def load_coco(name: str, masks: bool, keep: bool) -> list[Record]:
    """Reads a dataset anew and checks it. Its name then gives the same records, whoever registered it.

    Args:
        name: a dataset of which `is_coco` is True.
        masks: whether masks are used. Objects with an empty mask are then left out.
        keep: whether the content is kept for evaluation.

    Returns:
        A record for each image, in the order of their ids.

    Raises:
        FileNotFoundError, ValueError: as `read_coco`; or the categories are not those that belong to the name.
    """
    loaded = _Loaded(_read(name), masks)
    _loaded.pop(name, None)
    if keep:
        _loaded[name] = loaded
    DatasetCatalog.remove(name)
    DatasetCatalog.register(name, lambda: records_of(name))
    return _records(loaded, MetadataCatalog.get(name).image_root)


def records_of(name: str) -> list[Record]:
    """The records of a dataset, as loaded before or read now."""
    return _records(_loaded.get(name) or _Loaded(_read(name), masks=True), MetadataCatalog.get(name).image_root)


def content_of(name: str) -> CocoContent:
    """The content of a dataset's JSON, as loaded before or read now. Its records may come from elsewhere."""
    return _loaded[name].content if name in _loaded else _read(name)


def _read(name: str) -> CocoContent:
    content = read_coco(PathManager.get_local_path(MetadataCatalog.get(name).json_file), source_of(name))
    if is_coco(name):
        _set_classes(name, content.category_ids, content.class_names)
    logger.info("Loaded %d images in COCO format from %s", len(content.images), source_of(name))
    _warn_of_odd_values(name, content)
    return content


def _warn_of_odd_values(name: str, content: CocoContent) -> None:
    """Warns of oddities that are plausible in a few annotations of a file, but not in many."""
    annotations = [each for of_image in content.annotations or () for each in of_image]
    crowds = sum(each["iscrowd"] for each in annotations)
    if crowds > _MANY * len(annotations):
        logger.warning(
            "%s: %d of %d annotations have iscrowd 1, which are neither trained on nor counted as missed. Are they "
            "crowds? Some tools mark every mask so, as CVAT those of its brush: set iscrowd 0 for single objects.",
            *(source_of(name), crowds, len(annotations)),
        )
    odd = [each for each in annotations if not _area_fits(each["area"], *each["bbox"][2:])]
    if len(odd) > _MANY * len(annotations):
        logger.warning(
            "%s: %d of %d areas do not fit their boxes, such as %g for %g × %g pixels. Objects count as small, medium "
            "or large (APs, APm, APl) by them: correct 'area', or take it out, and it is computed.",
            *(source_of(name), len(odd), len(annotations), odd[0]["area"], *odd[0]["bbox"][2:]),
        )


def _area_fits(area: float, width: float, height: float) -> bool:
    # A thin object across a box has little area; masks may leave their box by a pixel.
    return width * height / 1000 <= area <= 2 * (width + 2) * (height + 2)


def _set_classes(name: str, ids: Sequence[Id], names: list[str]) -> None:
    metadata = MetadataCatalog.get(name)
    numbers = {id: number for number, id in enumerate(ids)}
    known = metadata.get("thing_classes", names), metadata.get("thing_dataset_id_to_contiguous_id", numbers)
    if (list(known[0]), known[1]) != (names, numbers):
        raise ValueError(
            f"{source_of(name)} does not have the categories that belong to this name, which are "
            f"{', '.join(known[0][:5])}{', …' if len(known[0]) > 5 else ''}. For other categories, name the data by "
            "the KARAT_DATA keys."
        )
    metadata.set(thing_classes=list(known[0]), thing_dataset_id_to_contiguous_id=numbers)


def _records(loaded: _Loaded, image_root: str) -> list[Record]:
    content = loaded.content
    annotations = content.annotations or [[] for _ in content.images]
    return [
        {
            "file_name": os.path.join(image_root, image.file_name),
            "height": image.height,
            "width": image.width,
            "image_id": image.id,
            "annotations": [each for each in of_image if not (loaded.masks and each.get("empty_mask"))],
        }
        for image, of_image in zip(content.images, annotations, strict=True)
    ]
