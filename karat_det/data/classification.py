"""Images with labels, for pretraining: folders, torchvision's datasets, Hugging Face's, and the embedded digits.

A split is a sequence of pairs (image, label) and the names of its classes. Labels are indices into the classes of the
training split. Nothing is downloaded.

timm.data.create_dataset does less: it numbers the classes of each split on its own, takes the innermost folder for the
class, knows five of the datasets below, and downloads from Hugging Face.
"""

import difflib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fvcore.common.config import CfgNode
from PIL import Image
from torchvision import datasets as torchvision_datasets

from .broken_images import BROKEN_IN, BrokenImages, TooManyBroken
from .class_folders import find_labelled_images
from .digits import generate_crops
from .image_check import NUM_SAMPLED, Header, read_headers, spread
from .images import read_upright, unreadable_image_named, upright_8_bit

logger = logging.getLogger(__name__)

# Splits of up to so many images have every header read before the run: some 0.06 ms each.
MAX_IMAGES_OPENED = 100_000
# Label of an image that cannot be read, where no other one may replace it.
NO_LABEL = -1
# torchvision's datasets of labelled images: number of classes, name of the training split, name of the validation
# split. The names are booleans for datasets with an argument `train`, and texts for those with `split`.
_TORCHVISION: dict[str, tuple[int, Any, Any]] = {
    **dict.fromkeys(("CIFAR10", "FashionMNIST", "KMNIST", "MNIST", "USPS"), (10, True, False)),
    "CIFAR100": (100, True, False),
    "Country211": (211, "train", "valid"),
    "DTD": (47, "train", "val"),
    "FGVCAircraft": (100, "train", "val"),
    "Flowers102": (102, "train", "test"),
    "Food101": (101, "train", "test"),
    "GTSRB": (43, "train", "test"),
    "Imagenette": (10, "train", "val"),
    "OxfordIIITPet": (37, "trainval", "test"),
    "STL10": (10, "train", "test"),
    "StanfordCars": (196, "train", "test"),
    "SVHN": (10, "train", "test"),
}
# What the validation split may be called.
_VAL_NAMES = ("val", "validation", "valid", "test")


class Split(NamedTuple):
    """One split of a dataset.

    Attributes:
        place: what a user knows it by.
        classes: names of the classes; a label is an index into them.
        samples: pairs of an image, or the path of one, and its label.
        files: the paths of all images, where they are files.
    """

    place: str
    classes: list[str]
    samples: Sequence[tuple[Any, int]]
    files: Sequence[str] = ()


class LabelledImages(torch.utils.data.Dataset):
    """A split as torch and timm take it: pairs of an RGB image and its label.

    An image that cannot be read is named in the log, counted once, and skipped; more than one in BROKEN_IN end the run.
    In training the next image replaces it. In testing it is black and has NO_LABEL, so that no image counts twice.

    Args:
        split: what to read.
        is_train: whether the next image replaces a broken one.
        indices: which of the split's images; default all.

    Attributes:
        transform: applied to the image; timm's loader sets it.
        broken: (number of images of the split,) bool, which were found broken.
    """

    def __init__(self, split: Split, is_train: bool, indices: Sequence[int] | None = None):
        self.split = split
        self.is_train = is_train
        self.indices = range(len(split.samples)) if indices is None else indices
        self.transform: Callable | None = None
        self._broken_images = BrokenImages(len(split.samples), split.place)
        self.broken = self._broken_images.seen

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[Any, int]:
        """The image at a place, transformed, and its label.

        Raises:
            ValueError: too many images cannot be read.
        """
        image, label = self._read(self.indices[place])
        while image is None and self.is_train:
            place = (place + 1) % len(self)
            image, label = self._read(self.indices[place])
        if image is None:
            image, label = Image.new("RGB", (32, 32)), NO_LABEL
        return (self.transform(image) if self.transform else image), label

    def open_all(self) -> None:
        """Reads the header of each image that is a file, so that broken ones are found before a run.

        Splits of more than MAX_IMAGES_OPENED files have only their first image read. The pixels of some greys of more
        than 8 bits are read too, so that their range is named in the log, or refused.

        Raises:
            ValueError: too many images cannot be read.
        """
        first = [self.indices[0]] if len(self.indices) else []
        if len(self.split.files) > MAX_IMAGES_OPENED:
            to_read = first
        else:
            headers = list(enumerate(read_headers(self.split.files)))
            for index, header in headers:
                if isinstance(header, OSError):
                    self._broken_images.add(index, header)
            deep = [index for index, header in headers if isinstance(header, Header) and header.deep]
            to_read = spread(deep, NUM_SAMPLED) if headers else first
        for index in to_read:
            self._read(index)

    def merge_broken(self, of_processes: Sequence[torch.Tensor]) -> None:
        """Takes over which images were broken in any process.

        Args:
            of_processes: `broken` of each.

        Raises:
            ValueError: together they are too many.
        """
        self.broken |= torch.stack(list(of_processes)).any(dim=0)
        count, total = int(self.broken.sum()), len(self.broken)
        if count * BROKEN_IN > total:
            broken = self.broken.nonzero().flatten().tolist()[:3]
            names = [self.split.files[index] if self.split.files else f"number {index}" for index in broken]
            raise TooManyBroken(
                f"{count} of the {total} images of {self.split.place} are broken, and no more than 1 in {BROKEN_IN} "
                f"may be skipped: {', '.join(names)}{', …' if count > len(names) else ''}. Replace or remove them."
            )

    def _read(self, index: int) -> tuple[Image.Image | None, int]:
        if self.broken[index]:
            return None, NO_LABEL
        try:
            name = f"number {index} of {self.split.place}"
            with unreadable_image_named(name):
                image, label = self.split.samples[index]
            if image is None:
                raise OSError(f"Number {index} of {self.split.place} has no image.")
            if isinstance(image, str):
                return read_upright(image).convert("RGB"), label
            with unreadable_image_named(name):
                return upright_8_bit(image, name).convert("RGB"), label
        except OSError as error:
            self._broken_images.add(index, error)
            return None, NO_LABEL


def load_splits(cfg: CfgNode) -> tuple[Split, Split]:
    """Finds the training and the validation split that DATA names, and checks them.

    Args:
        cfg: a config with the keys of `pretrain_config`.

    Raises:
        ValueError: the name is unknown, the classes are not as many as DATA.NUM_CLASSES, validation has a class that
            training has not, or a folder holds no image.
        FileNotFoundError: the data is not there.
        ImportError: it needs a package that is not installed.
    """
    name, root = cfg.DATA.NAME, cfg.DATA.ROOT
    if name == "digits":
        root = root or os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
        train, val = _load_folder(str(generate_crops(root)))
    elif name not in ("folder", "huggingface", *_TORCHVISION):
        known = ["folder", "huggingface", "digits", *_TORCHVISION]
        near = difflib.get_close_matches(name, known)
        raise ValueError(
            f"DATA.NAME is {name!r}, which is unknown."
            + (f" Did you mean {' or '.join(near)}?" if near else "")
            + f" Known: {', '.join(known)}. A tree of images of your own is DATA.NAME folder."
        )
    elif not os.path.isdir(root):
        what = f"is {root!r}, but there is no such folder ({os.path.abspath(root)})" if root else "is not given"
        raise FileNotFoundError(f"--data {what}. Name the folder that holds the data (DATA.NAME {name}).")
    elif name == "folder":
        train, val = _load_folder(root)
    elif name == "huggingface":
        train, val = _load_huggingface(cfg)
    else:
        train, val = _load_torchvision(name, root)
    if cfg.DATA.NUM_CLASSES not in (0, len(train.classes)):
        raise ValueError(
            f"{train.place} has {len(train.classes)} classes, but DATA.NUM_CLASSES is {cfg.DATA.NUM_CLASSES}. Name the "
            f"data that belongs to it, or set DATA.NUM_CLASSES to {len(train.classes)}, or to 0 for any number."
        )
    return train, _with_classes_of(train, val)


def build_datasets(cfg: CfgNode, rank: int = 0, world_size: int = 1) -> tuple[LabelledImages, LabelledImages]:
    """The images to train on, all of them, and this process's share of those to validate on.

    Args:
        cfg: a config with the keys of `pretrain_config`.
        rank, world_size: the process's.

    Raises:
        ValueError, FileNotFoundError, ImportError: as `load_splits`; or too many images are broken, which is looked for
            in splits of up to MAX_IMAGES_OPENED files.
    """
    splits = load_splits(cfg)
    train = LabelledImages(splits[0], is_train=True)
    val = LabelledImages(splits[1], is_train=False, indices=range(rank, len(splits[1].samples), world_size))
    for images in (train, val):
        images.open_all()
    return train, val


def _with_classes_of(train: Split, val: Split) -> Split:
    """The validation split, its labels those of the training split."""
    if val.classes == train.classes:
        return val
    _refuse_unknown(train, val, [name for name in val.classes if name not in train.classes])
    labels = [train.classes.index(name) for name in val.classes]
    return val._replace(classes=train.classes, samples=_Relabelled(val.samples, labels))


def _refuse_unknown(train: Split, val: Split, unknown: list[str]) -> None:
    if unknown:
        raise ValueError(
            f"{val.place} has classes that {train.place} has not: {', '.join(unknown[:5])}"
            f"{', …' if len(unknown) > 5 else ''}. Remove or rename them, or add images of them to train on."
        )


class _Relabelled(Sequence):
    def __init__(self, samples: Sequence[tuple[Any, int]], labels: list[int]):
        self.samples = samples
        self.labels = labels

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.samples[index]
        return image, self.labels[label]


def _load_folder(root: str) -> tuple[Split, Split]:
    return _load_folder_split(root, ("train",)), _load_folder_split(root, _VAL_NAMES)


def _load_folder_split(root: str, names: Sequence[str]) -> Split:
    folder = next((path for path in (Path(root, name) for name in names) if path.is_dir()), None)
    if folder is None:
        raise FileNotFoundError(
            f"{os.path.abspath(root)} (--data) has no folder {' or '.join(names)}. It must hold train/<class>/ and "
            "val/<class>/ with images in them."
        )
    classes, samples = find_labelled_images(folder)
    if not classes:
        raise ValueError(f"{folder} has no folders. It must hold one for each class, with images in it.")
    held = {label for _, label in samples}
    empty = [name for label, name in enumerate(classes) if label not in held]
    if empty:
        raise ValueError(
            f"{len(empty)} of the {len(classes)} class folders of {folder} hold no image: "
            f"{', '.join(empty[:5])}{', …' if len(empty) > 5 else ''}. Put images there, or remove the folders."
        )
    return Split(str(folder), classes, samples, [path for path, _ in samples])


def _load_torchvision(name: str, root: str) -> tuple[Split, Split]:
    num_classes, *names = _TORCHVISION[name]
    splits = [{"train" if isinstance(split, bool) else "split": split} for split in names]
    try:
        train, val = (getattr(torchvision_datasets, name)(root, **arguments) for arguments in splits)
    except (RuntimeError, OSError) as error:
        calls = " and ".join(
            f"torchvision.datasets.{name}({root!r}, {key}={value!r}, download=True)"
            for arguments in splits
            for key, value in arguments.items()
        )
        raise FileNotFoundError(
            f"torchvision does not find {name} in {os.path.abspath(root)} (--data): {error} This command downloads "
            f"nothing; {calls} do."
        ) from error
    classes = list(getattr(train, "classes", map(str, range(num_classes))))
    return Split(f"{name}'s training split", classes, train), Split(f"{name}'s test split", classes, val)


def _load_huggingface(cfg: CfgNode) -> tuple[Split, Split]:
    root = cfg.DATA.ROOT
    try:
        from datasets import load_from_disk
    except ImportError as error:
        raise ImportError(
            f"DATA.NAME huggingface needs the package datasets, which is not installed ({error}). pip install datasets"
        ) from error
    try:
        held = load_from_disk(root)
    except Exception as error:  # the kind of error depends on the files
        raise ValueError(
            f"{os.path.abspath(root)} (--data) is not what datasets.DatasetDict.save_to_disk writes: {error}"
        ) from error
    val_name = next((name for name in _VAL_NAMES if isinstance(held, dict) and name in held), None)
    if val_name is None or "train" not in held:
        found = f"has {', '.join(held)}" if isinstance(held, dict) else "is a single split"
        raise ValueError(f"{root} (--data) must have the splits train and {' or '.join(_VAL_NAMES)}, but it {found}.")
    train, val = (_huggingface_split(cfg, name, held[name]) for name in ("train", val_name))
    # Unlike folders, a split names classes of which it may have no image.
    seen, to_see = (
        {split.classes[label] for label in held[name][cfg.DATA.LABEL_COLUMN][:]}
        for split, name in ((train, "train"), (val, val_name))
    )
    _refuse_unknown(train, val, sorted(to_see - seen))
    return train, val


def _huggingface_split(cfg: CfgNode, name: str, split: Any) -> Split:
    place = f"the split {name} of {cfg.DATA.ROOT}"
    for key in ("IMAGE_COLUMN", "LABEL_COLUMN"):
        if cfg.DATA[key] not in split.features:
            raise ValueError(
                f"DATA.{key} is {cfg.DATA[key]!r}, which {place} does not have. Its columns: "
                f"{', '.join(split.features)}."
            )
    images = split.features[cfg.DATA.IMAGE_COLUMN]
    if type(images).__name__ != "Image" or not images.decode:
        raise ValueError(
            f"DATA.IMAGE_COLUMN is {cfg.DATA.IMAGE_COLUMN!r}, whose values in {place} are no images but {images}. Make "
            f"them so: cast_column({cfg.DATA.IMAGE_COLUMN!r}, datasets.Image())."
        )
    names = getattr(split.features[cfg.DATA.LABEL_COLUMN], "names", None)
    if names is None:
        raise ValueError(
            f"DATA.LABEL_COLUMN is {cfg.DATA.LABEL_COLUMN!r}, whose values in {place} are no class labels. Make them "
            f"so: class_encode_column({cfg.DATA.LABEL_COLUMN!r})."
        )
    if not len(split):
        raise ValueError(f"{place} holds no image.")
    hidden = sum(label is None or label < 0 for label in split[cfg.DATA.LABEL_COLUMN][:])
    if hidden:
        raise ValueError(
            f"{hidden} of the {len(split)} images of {place} have no label (-1 or None in DATA.LABEL_COLUMN "
            f"{cfg.DATA.LABEL_COLUMN!r}), as in the test split of a benchmark. Remove them, or the split."
        )
    return Split(place, list(names), _Rows(split, cfg.DATA.IMAGE_COLUMN, cfg.DATA.LABEL_COLUMN))


class _Rows(Sequence):
    def __init__(self, table: Any, image_column: str, label_column: str):
        self.table = table
        self.image_column = image_column
        self.label_column = label_column

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        row = self.table[index]
        return row[self.image_column], row[self.label_column]
