"""Loads the datasets of a run and checks them before it starts: names, files, classes, boxes, masks and images.

`formats.coco` checks the content of a JSON, and `image_check` the images. A record is Detectron2's dataset dict: one
image's file, size, id and annotations. Loading COCO's training set takes half a minute, so load it once:

    check_datasets(cfg, training=True)
    build_detection_train_loader(cfg, mapper=build_mapper(cfg, is_train=True), dataset=load_checked_dicts(cfg))
"""

import difflib
import os
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.build import filter_images_with_only_crowd_annotations, print_instances_class_histogram

from .coco_datasets import Record, is_coco, load_coco, source_of
from .digits import DIGITS_NAMES, generate_digits
from .image_check import check_images

# Detectron2's architectures that ignore MODEL.MASK_ON.
_WITHOUT_MASKS = ("RetinaNet", "ProposalNetwork")


def check_datasets(cfg: CfgNode, training: bool) -> None:
    """Checks the datasets of a run as far as possible without reading them, which takes half a minute for COCO.

    Args:
        cfg: config whose KARAT_DATA datasets are registered already.
        training: whether DATASETS.TRAIN is used.

    Raises:
        ValueError: DATASETS.TRAIN is empty; a name is unknown; a dataset's classes are not as many as the model's; the
            architecture has no masks, but MODEL.MASK_ON is True.
        FileNotFoundError: a JSON or an image folder does not exist.
    """
    if training and not cfg.DATASETS.TRAIN:
        raise ValueError("DATASETS.TRAIN is empty; name at least one dataset to train on.")
    if cfg.MODEL.MASK_ON and cfg.MODEL.META_ARCHITECTURE in _WITHOUT_MASKS:
        raise ValueError(
            f"MODEL.MASK_ON is True, but MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE} finds no masks. Set "
            "MODEL.MASK_ON False."
        )
    for key, names in (
        ("DATASETS.TRAIN", cfg.DATASETS.TRAIN if training else ()),
        ("DATASETS.TEST", cfg.DATASETS.TEST),
    ):
        for name in names:
            if name not in DatasetCatalog:
                raise ValueError(_unknown(cfg, key, name))
            metadata = MetadataCatalog.get(name)
            # The embedded dataset has no files until it is first asked for, and Detectron2's own may be remote.
            paths = () if name in DIGITS_NAMES else (metadata.get("json_file"), metadata.get("image_root"))
            for path in filter(None, paths):
                if "://" not in path and not os.path.exists(path):
                    raise FileNotFoundError(_not_there(cfg, key, name, path))
            if metadata.get("thing_classes") is not None:
                _check_number_of_classes(cfg, key, name)


def load_checked_dicts(cfg: CfgNode) -> list[Record]:
    """Loads and checks the datasets of DATASETS.TRAIN, and checks those of DATASETS.TEST, after `check_datasets`.

    DATALOADER.FILTER_EMPTY_ANNOTATIONS True leaves images without annotations, or with crowds only, out of the training
    records.

    Args:
        cfg: config whose KARAT_DATA datasets are registered already.

    Returns:
        The records of all training datasets, one after another.

    Raises:
        ValueError: a JSON is broken, not in COCO format, or its
            categories are not as many as the model's or not those of the other datasets; no image is left to train on;
            masks are missing, or not in the format that INPUT.MASK_FORMAT needs.
        FileNotFoundError: a JSON, an image folder or an image does not exist.
        OSError: a file is no image or damaged (see `check_images`), or the embedded dataset cannot be written.
    """
    names = cfg.DATASETS.TRAIN
    records: list[Record] = []
    for name in names:
        loaded = _load(cfg, "DATASETS.TRAIN", name)
        _check_annotations(cfg, name, loaded, training=True)
        records += loaded
    load_checked_test_dicts(cfg)
    _check_same_classes([*names, *cfg.DATASETS.TEST])
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        num_images = len(records)
        records = filter_images_with_only_crowd_annotations(records)
        if not records:
            raise ValueError(
                f"None of the {num_images} images of DATASETS.TRAIN = {tuple(names)} has annotations (crowds aside), "
                "and DATALOADER.FILTER_EMPTY_ANNOTATIONS True leaves such images out, so nothing is left to train on. "
                f"Check the 'annotations' of {', '.join(source_of(name) for name in names)}."
            )
    print_instances_class_histogram(records, MetadataCatalog.get(names[0]).thing_classes)
    return records


def load_checked_test_dicts(cfg: CfgNode, all_images: bool = True) -> list[Record]:
    """Loads and checks the datasets of DATASETS.TEST, after `check_datasets`.

    Args:
        cfg: config whose KARAT_DATA datasets are registered already.
        all_images: whether one image that cannot be used is an error; else only a dataset without any other is.

    Returns:
        The records of all test datasets, one after another, those without annotations too.

    Raises:
        ValueError, FileNotFoundError, OSError: as `load_checked_dicts`.
    """
    records: list[Record] = []
    for name in cfg.DATASETS.TEST:
        loaded = _load(cfg, "DATASETS.TEST", name, all_images)
        _check_annotations(cfg, name, loaded, training=False)
        records += loaded
    _check_same_classes(cfg.DATASETS.TEST)
    return records


def _load(cfg: CfgNode, key: str, name: str, all_images: bool = True) -> list[Record]:
    metadata = MetadataCatalog.get(name)
    if name in DIGITS_NAMES:
        generate_digits(Path(metadata.json_file).parents[2])
    try:
        if is_coco(name):
            records = load_coco(name, cfg.MODEL.MASK_ON, keep=name in cfg.DATASETS.TEST)
        else:
            records = DatasetCatalog.get(name)
    except FileNotFoundError as error:
        if error.filename is None:
            raise
        raise FileNotFoundError(_not_there(cfg, key, name, error.filename)) from error

    if not records:
        raise ValueError(f"{source_of(name)} lists no images; {key} needs datasets that hold some.")
    if metadata.get("thing_classes") is None:
        raise ValueError(f"{key} names {name!r}, which has no object classes; choose a detection dataset.")
    _check_number_of_classes(cfg, key, name)
    check_images(records, source_of(name), metadata.get("json_file"), _root_hint(cfg, name), all_images)
    return records


def num_classes_key(cfg: CfgNode) -> str:
    """The key of the number of classes: in the architecture's own section, such as MODEL.RETINANET, else in
    MODEL.ROI_HEADS."""
    own = cfg.MODEL.META_ARCHITECTURE.upper()
    return f"MODEL.{own if 'NUM_CLASSES' in cfg.MODEL.get(own, ()) else 'ROI_HEADS'}.NUM_CLASSES"


def num_classes(cfg: CfgNode) -> int:
    """How many classes the model has."""
    return cfg.MODEL[num_classes_key(cfg).split(".")[1]].NUM_CLASSES


def _check_number_of_classes(cfg: CfgNode, key: str, name: str) -> None:
    classes = MetadataCatalog.get(name).thing_classes
    if len(classes) != num_classes(cfg):
        raise ValueError(
            f"{source_of(name)} has {len(classes)} categories ({_shortened(classes)}), but "
            f"{num_classes_key(cfg)} is {num_classes(cfg)}. Set {num_classes_key(cfg)} to {len(classes)}, "
            f"or choose another dataset in {key}."
        )


def _not_there(cfg: CfgNode, key: str, name: str, path: str) -> str:
    return f"{key} names the dataset {name!r}, but {os.path.abspath(path)} does not exist. {_root_hint(cfg, name)}"


def _unknown(cfg: CfgNode, key: str, name: str) -> str:
    own = ", ".join(cfg.KARAT_DATA.NAMES) or "none"
    similar = difflib.get_close_matches(name, DatasetCatalog.list())
    return (
        f"{key} names {name!r}, but there is no such dataset."
        + (f" Did you mean {' or '.join(similar)}?" if similar else "")
        + f" Known are the datasets of KARAT_DATA.NAMES (now: {own}), digits_train and digits_val, and Detectron2's "
        f"built-in ones, such as coco_2017_train and coco_2017_val. {_root_hint(cfg, name)}"
    )


def _root_hint(cfg: CfgNode, name: str) -> str:
    if name in cfg.KARAT_DATA.NAMES:
        return "Correct the KARAT_DATA keys."
    root = os.environ.get("DETECTRON2_DATASETS")
    now = f"it is {root!r} now" if root else "it is not set now, which means the folder 'datasets'"
    return (
        "Built-in datasets are looked for in the folder that the environment variable DETECTRON2_DATASETS names when "
        f"the program starts; {now}. datasets/README.md shows the layout."
    )


def _shortened(items: Sequence[str], at_most: int = 5) -> str:
    return ", ".join(items[:at_most]) + (", …" if len(items) > at_most else "")


def _check_annotations(cfg: CfgNode, name: str, records: list[Record], training: bool) -> None:
    """Checks whether all objects have the boxes and masks that the model needs."""
    without_box, without_mask, with_rle = [], [], []
    for record in records:
        for annotation in record.get("annotations", ()):
            if training and annotation.get("iscrowd", 0):
                continue
            if "bbox" not in annotation:
                without_box.append(record["file_name"])
            if "segmentation" not in annotation:
                without_mask.append((annotation.get("id"), record["file_name"]))
            elif isinstance(annotation["segmentation"], dict):
                with_rle.append((annotation.get("id"), record["file_name"]))
    if without_box:
        raise ValueError(
            f"{source_of(name)}: {len(without_box)} annotations have no 'bbox', the first of them in image "
            f"{without_box[0]}."
        )
    if not cfg.MODEL.MASK_ON:
        return
    if without_mask:
        raise ValueError(
            f"{source_of(name)}: {len(without_mask)} annotations have no 'segmentation', the first of them, id "
            f"{without_mask[0][0]!r}, in image {without_mask[0][1]}, but MODEL.MASK_ON is True. "
            "Set MODEL.MASK_ON False to find boxes only, or add the masks."
        )
    if training and with_rle and cfg.INPUT.MASK_FORMAT == "polygon":
        raise ValueError(
            f"{source_of(name)}: {len(with_rle)} annotations have run-length encoded masks, the first of them, id "
            f"{with_rle[0][0]!r}, in image {with_rle[0][1]}, but INPUT.MASK_FORMAT is 'polygon'. "
            "Set INPUT.MASK_FORMAT bitmask."
        )


def _check_same_classes(names: Sequence[str]) -> None:
    for name in names[1:]:
        first, classes = (list(MetadataCatalog.get(each).thing_classes) for each in (names[0], name))
        if classes != first:
            index = next(i for i, (one, other) in enumerate(zip(first, classes, strict=True)) if one != other)
            raise ValueError(
                f"The classes of {source_of(name)} are not those of {source_of(names[0])}: the one at place {index} is "
                f"{classes[index]!r} here and {first[index]!r} there. All datasets of DATASETS.TRAIN and DATASETS.TEST "
                "must have the same categories, in the same order of ids."
            )
