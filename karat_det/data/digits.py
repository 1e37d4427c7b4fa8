"""The embedded dataset: scenes of real handwritten digits on real photographs, in COCO format.

A scene is a 112 × 112 crop of one of scikit-learn's two sample photographs, with one to four of its 1,797 handwritten
digits (8 × 8 pixels) drawn on it, enlarged to 28 to 55 pixels, in colours unlike the pixels beneath. Digits overlap: a
later one hides an earlier one, whose mask is its visible part. There are ten classes, "0" to "9", with category ids 1
to 10. No digit is in both splits.

The data lies in `digits/` below the root of Detectron2's built-in datasets, the environment variable
DETECTRON2_DATASETS, or `datasets/` without it:

    digits/annotations/instances_train.json   digits/train/000001.png …   2,000 scenes, `digits_train`
    digits/annotations/instances_val.json     digits/val/000001.png …       250 scenes, `digits_val`

Nothing is generated at import: the first `DatasetCatalog.get` of either name does it, in about 20 seconds.

For pretraining there are crops of 48 × 48 too, in a folder a class: one digit each, of 28 to 44 pixels, near the
middle, on the same photographs. Three of four digits are lighter than the pixels beneath, in scenes only half. With one
half, no average of the pixels would show the class, and a classifier would need many more images to start learning. The
digits are split in the same way: the crops to train on have none of the digits of either validation set:

    digit_crops/train/3/000001.png …  12,000 crops              digit_crops/val/3/000001.png …   1,000 crops
"""

import json
import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from .coco_datasets import records_of

logger = logging.getLogger(__name__)

CLASS_NAMES = [str(digit) for digit in range(10)]
NUM_SCENES = {"train": 2000, "val": 250}
NUM_CROPS = {"train": 12000, "val": 1000}
SCENE_SIZE = 112
CROP_SIZE = 48
MAX_DIGITS = 4
# Side in pixels to which a digit's 8 × 8 grid is enlarged, both ends included.
MIN_SIDE, MAX_SIDE = 28, 55
# The largest side in a crop, the largest distance from its middle, and the share that may also be darker.
MAX_CROP_SIDE = 44
MAX_SHIFT = 4
EITHER_WAY = 0.5
# An instance keeps at least this fraction of its ink; a digit that would hide more of an earlier one is drawn again.
MIN_VISIBLE = 0.6
# Difference in luma (0 to 255) between a digit and the pixels beneath, kept on nine tenths of its ink.
MIN_CONTRAST = 60.0
# Distance in RGB (0 to 255 each) between the colours of two digits of a scene.
MIN_COLOR_DISTANCE = 90.0
_SEED = 2024
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


DIGITS_NAMES = tuple(f"digits_{split}" for split in NUM_SCENES)


def register_digits() -> None:
    """Registers `digits_train` and `digits_val` with Detectron2; a second call changes nothing."""
    root = Path(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))
    for split, name in zip(NUM_SCENES, DIGITS_NAMES, strict=True):
        if name in DatasetCatalog:
            continue
        json_file, image_root = _split_paths(root / "digits", split)
        DatasetCatalog.register(name, _Loader(name, root))
        MetadataCatalog.get(name).set(
            json_file=str(json_file),
            image_root=str(image_root),
            evaluator_type="coco",
            thing_classes=CLASS_NAMES,
            thing_dataset_id_to_contiguous_id={digit + 1: digit for digit in range(10)},
        )


class _Loader:
    def __init__(self, name: str, root: Path):
        self.name = name
        self.root = root

    def __call__(self) -> list[dict[str, Any]]:
        generate_digits(self.root)
        return records_of(self.name)


def generate_digits(root: str | os.PathLike, num_scenes: dict[str, int] | None = None) -> Path:
    """Writes the dataset to `root/digits`, unless it is already there.

    The same call gives the same data, and scene i does not depend on how many there are. The folder appears whole or
    not at all: it is written elsewhere in `root` and renamed, and of two processes the first to finish wins.

    Args:
        root: folder that holds datasets. Made if missing.
        num_scenes: scenes to draw for "train" and for "val". Default: `NUM_SCENES`.

    Returns:
        The dataset's folder, `root/digits`.

    Raises:
        OSError: `root` cannot be written to.
        FileNotFoundError: `root/digits` exists but holds something else.
    """
    root = Path(root)
    target = root / "digits"
    if not target.exists():
        _generate_whole_or_not_at_all(target, lambda folder: _write_dataset(folder, num_scenes or NUM_SCENES))
    for split in NUM_SCENES:
        for path in _split_paths(target, split):
            if not path.exists():
                raise FileNotFoundError(
                    f"{target.absolute()} is not a whole digits dataset: it has no {path.relative_to(target)}. "
                    "Remove or rename that folder and the dataset is generated again."
                )
    return target


def generate_crops(root: str | os.PathLike, num_crops: dict[str, int] | None = None) -> Path:
    """Writes the crops to `root/digit_crops`, unless they are already there; always the same, whole or not at all.

    Args:
        root: folder that holds datasets. Made if missing.
        num_crops: crops to draw for "train" and for "val". Default: `NUM_CROPS`.

    Returns:
        The folder, `root/digit_crops`.

    Raises:
        OSError: `root` cannot be written to.
    """
    target = Path(root) / "digit_crops"
    if not target.exists():
        _generate_whole_or_not_at_all(target, lambda folder: _write_crops(folder, num_crops or NUM_CROPS))
    return target


def _split_paths(folder: Path, split: str) -> tuple[Path, Path]:
    return folder / "annotations" / f"instances_{split}.json", folder / split


def _generate_whole_or_not_at_all(target: Path, write: Callable[[Path], None]) -> None:
    started = time.perf_counter()
    logger.info("Generating digits in %s: once, in under a minute", target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".digits-", dir=target.parent) as temporary:
            # A folder within the temporary one, because that one can be read by its owner alone.
            draft = Path(temporary) / target.name
            write(draft)
            try:
                draft.rename(target)
            except OSError:
                # Another process that finished first has put the same data there.
                if not target.exists():
                    raise
    except OSError as error:
        raise OSError(
            f"Cannot write the digits dataset to {target.absolute()}: {error}. Make that folder writable, "
            "or set the environment variable DETECTRON2_DATASETS to the folder that shall hold your datasets."
        ) from error
    logger.info("Generated digits in %s in %.1f s", target, time.perf_counter() - started)


def _load_sources() -> tuple[np.ndarray, np.ndarray, list[Image.Image]]:
    """The digits with a rim, (number of digits, 10, 10) from 0 to 1, the class of each, and the photographs."""
    # scikit-learn takes a second to import and is needed only here.
    from sklearn.datasets import load_digits, load_sample_images

    digits = load_digits()
    # The rim lets the strokes that touch the border end as smoothly as the others.
    padded = np.pad(digits.images.astype(np.float32) / 16, ((0, 0), (1, 1), (1, 1)))
    return padded, digits.target, [Image.fromarray(image) for image in load_sample_images().images]


def _write_crops(folder: Path, num_crops: dict[str, int]) -> None:
    padded, labels, photographs = _load_sources()
    members = split_digits(labels)
    for split_index, split in enumerate(NUM_CROPS):
        for name in CLASS_NAMES:
            (folder / split / name).mkdir(parents=True)
        for number in range(1, num_crops[split] + 1):
            # Scenes are drawn from seeds of three numbers, crops from four.
            rng = np.random.default_rng([_SEED, split_index, number, CROP_SIZE])
            index = int(rng.choice(members[split]))
            crop = Image.fromarray(_draw_crop(rng, padded[index], photographs))
            crop.save(folder / split / str(labels[index]) / f"{number:06d}.png", compress_level=1)


def _draw_crop(rng: np.random.Generator, digit: np.ndarray, photographs: list[Image.Image]) -> np.ndarray:
    """One digit on a background, (48, 48, 3) uint8."""
    must_be_lighter = rng.random() >= EITHER_WAY
    while True:
        canvas = _draw_background(rng, photographs)[:CROP_SIZE, :CROP_SIZE]
        alpha = _render_digit(digit, rng.integers(MIN_SIDE, MAX_CROP_SIDE + 1))
        free = CROP_SIZE - np.array(alpha.shape)
        top, left = np.clip(free // 2 + rng.integers(-MAX_SHIFT, MAX_SHIFT + 1, size=2), 0, free)
        window = slice(top, top + alpha.shape[0]), slice(left, left + alpha.shape[1])
        beneath = canvas[window][alpha >= 0.5]
        color = _pick_color(rng, beneath, [])
        # Where no such colour is found, another place is tried.
        if color is None or (must_be_lighter and color @ _LUMA < (beneath @ _LUMA).mean()):
            continue
        canvas[window] += alpha[..., None] * (color - canvas[window])
        return canvas.round().astype(np.uint8)


def _write_dataset(folder: Path, num_scenes: dict[str, int]) -> None:
    padded, labels, photographs = _load_sources()
    members = split_digits(labels)
    for split_index, split in enumerate(NUM_SCENES):
        json_file, image_root = _split_paths(folder, split)
        json_file.parent.mkdir(parents=True, exist_ok=True)
        image_root.mkdir()
        images, annotations = [], []
        for image_id in range(1, num_scenes[split] + 1):
            rng = np.random.default_rng([_SEED, split_index, image_id])
            image, instances = _draw_scene(rng, padded, members[split], photographs)
            file_name = f"{image_id:06d}.png"
            Image.fromarray(image).save(image_root / file_name, compress_level=1)
            images.append({"id": image_id, "file_name": file_name, "width": SCENE_SIZE, "height": SCENE_SIZE})
            for index, mask in instances:
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image_id,
                        "category_id": int(labels[index]) + 1,
                        **_encode_mask(mask),
                        "iscrowd": 0,
                        # Index among scikit-learn's digits: shows that the splits share none.
                        "digit_index": int(index),
                    }
                )
        dataset = {
            "info": {
                "description": f"Scenes of handwritten digits on photographs, {split} split",
                "version": "1",
                "contributor": "digits and photographs as scikit-learn ships them (load_digits, load_sample_images)",
            },
            "licenses": [
                {"id": 1, "name": "CC BY 4.0 (digits)", "url": "https://creativecommons.org/licenses/by/4.0/"},
                {"id": 2, "name": "CC BY 2.0 (photographs)", "url": "https://creativecommons.org/licenses/by/2.0/"},
            ],
            "categories": [
                {"id": digit + 1, "name": name, "supercategory": "digit"} for digit, name in enumerate(CLASS_NAMES)
            ],
            "images": images,
            "annotations": annotations,
        }
        json_file.write_text(json.dumps(dataset))


def split_digits(labels: np.ndarray) -> dict[str, np.ndarray]:
    """Splits the digits four to one, class by class, always the same.

    Args:
        labels: class of each digit, shape (number of digits,).

    Returns:
        Indices into `labels` for "train" and for "val".
    """
    rng = np.random.default_rng(_SEED)
    train, val = [], []
    for label in range(10):
        members = rng.permutation(np.flatnonzero(labels == label))
        num_val = len(members) // 5
        val.append(members[:num_val])
        train.append(members[num_val:])
    return {"train": np.concatenate(train), "val": np.concatenate(val)}


def _draw_scene(
    rng: np.random.Generator, digits: np.ndarray, members: np.ndarray, photographs: list[Image.Image]
) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """Returns the image, (112, 112, 3) uint8, and each digit's index and visible mask, (112, 112) bool."""
    canvas = _draw_background(rng, photographs)
    num_digits = rng.integers(1, MAX_DIGITS + 1)
    indices: list[int] = []
    colors: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    ink: list[int] = []
    # Few scenes need more than ten attempts; one that cannot hold all its digits ends up with fewer.
    for _ in range(100):
        if len(masks) == num_digits:
            break
        index = int(rng.choice(members))
        alpha = _render_digit(digits[index], rng.integers(MIN_SIDE, MAX_SIDE + 1))
        top, left = rng.integers(SCENE_SIZE + 1 - np.array(alpha.shape))
        window = slice(top, top + alpha.shape[0]), slice(left, left + alpha.shape[1])
        hides = alpha >= 0.5
        remaining = [mask.copy() for mask in masks]
        for mask in remaining:
            mask[window] &= ~hides
        if any(mask.sum() < MIN_VISIBLE * whole for mask, whole in zip(remaining, ink, strict=True)):
            continue
        color = _pick_color(rng, canvas[window][hides], colors)
        if color is None:
            continue
        canvas[window] += alpha[..., None] * (color - canvas[window])
        mask = np.zeros((SCENE_SIZE, SCENE_SIZE), dtype=bool)
        mask[window] = hides
        masks = [*remaining, mask]
        indices.append(index)
        colors.append(color)
        ink.append(int(mask.sum()))
    return canvas.round().astype(np.uint8), list(zip(indices, masks, strict=True))


def _draw_background(rng: np.random.Generator, photographs: list[Image.Image]) -> np.ndarray:
    photograph = photographs[rng.integers(len(photographs))]
    side = rng.integers(SCENE_SIZE, 3 * SCENE_SIZE)
    left = rng.integers(photograph.width - side + 1)
    top = rng.integers(photograph.height - side + 1)
    crop = photograph.resize(
        (SCENE_SIZE, SCENE_SIZE), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side)
    )
    pixels = np.asarray(crop, dtype=np.float32)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    return pixels.copy()


def _render_digit(padded: np.ndarray, side: int) -> np.ndarray:
    """Enlarges a digit with its rim, (10, 10) from 0 to 1, to opacities from 0 to 1, cropped to the ink."""
    scale = side / 8
    smooth = Image.fromarray(padded).resize((round(10 * scale),) * 2, Image.Resampling.BICUBIC)
    # Ink begins at half of full ink; the slope leaves a ramp of about one pixel and a half at the edge.
    alpha = np.clip((np.asarray(smooth) - 0.5) * scale / 1.5 + 0.5, 0, 1)
    rows, columns = np.flatnonzero(alpha.any(1)), np.flatnonzero(alpha.any(0))
    return alpha[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _pick_color(rng: np.random.Generator, beneath: np.ndarray, taken: list[np.ndarray]) -> np.ndarray | None:
    """Draws a colour unlike the pixels `beneath`, (n, 3), and the colours `taken`; None if 16 attempts find none."""
    colors = rng.uniform(0, 255, size=(16, 3)).astype(np.float32)
    contrast = np.abs((colors @ _LUMA)[:, None] - beneath @ _LUMA)
    good = (contrast < MIN_CONTRAST).mean(1) <= 0.1
    for other in taken:
        good &= np.linalg.norm(colors - other, axis=1) >= MIN_COLOR_DISTANCE
    return colors[good.argmax()] if good.any() else None


def _encode_mask(mask: np.ndarray) -> dict[str, Any]:
    rle = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {
        "bbox": [float(x) for x in mask_util.toBbox(rle)],
        "area": int(mask_util.area(rle)),
        "segmentation": {"size": [int(x) for x in rle["size"]], "counts": rle["counts"].decode("ascii")},
    }
