"""Pictures of a detector's predictions, beside the ground truth if there is one, and its results as COCO JSON.

Masks, boxes, class names and scores are drawn by Detectron2's Visualizer. A class has its colour in every picture, so
that a prediction can be compared with its ground truth at a glance; further instances of a class in an image take
neighbouring colours. Small images are enlarged first.
"""

import colorsys
import errno
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.evaluation import inference_context
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import BoxMode, Instances
from detectron2.utils.visualizer import GenericMask, Visualizer
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from tqdm import tqdm

from ..data.image_check import read_headers
from ..data.images import read_image
from .lettering import Lettering, lettering

logger = logging.getLogger(__name__)

# Shorter side in pixels to which smaller images are enlarged, unless the longer one would then exceed its limit.
MIN_SHORT_SIDE = 448
MAX_LONG_SIDE = 2048
# Side and area in pixels to which larger images are reduced: a JPEG has at most 65,535 pixels a side, for two pictures
# side by side; drawing takes some 30 bytes a pixel.
MAX_SIDE = 32_000
MAX_AREA = 1 << 25
_TITLE_SIZE = 20
_GAP = 8
# Errors that every other image would meet too.
_NO_MORE_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


class FailedImagesError(RuntimeError):
    """Some images could not be predicted or drawn; all others were."""


@dataclass(frozen=True)
class Classes:
    """The meaning of a model's class numbers.

    Attributes:
        names: the name of each class.
        category_ids: the id that each class has in the dataset's JSON.
    """

    names: list[str]
    category_ids: list[int | str]


def dataset_classes(dataset_names: Sequence[str], num_classes: int) -> Classes:
    """The classes of the first of some datasets, or their numbers if it does not name them.

    Args:
        dataset_names: DATASETS.TEST; its datasets need not be there.
        num_classes: of the model.

    Raises:
        ValueError: the dataset has another number of classes.
    """
    name = next(iter(dataset_names), "")
    metadata = MetadataCatalog.get(name) if name in DatasetCatalog.list() else Metadata()
    if name in DatasetCatalog.list() and "thing_dataset_id_to_contiguous_id" not in metadata.as_dict():
        try:
            # Datasets other than Detectron2's own learn their category ids when their JSON is read.
            DatasetCatalog.get(name)
        except OSError as error:
            logger.warning("%s cannot be loaded: %s", name, error)
    names = metadata.get("thing_classes")
    if not names:
        logger.info("DATASETS.TEST names no dataset that has class names: classes go by their numbers, from 0.")
        names = [str(i) for i in range(num_classes)]
    if len(names) != num_classes:
        raise ValueError(
            f"DATASETS.TEST names {name!r}, which has {len(names)} classes, but the model's NUM_CLASSES is "
            f"{num_classes}. Name a dataset with the model's classes there, or none: DATASETS.TEST ()."
        )
    id_of_class = {i: id for id, i in metadata.get("thing_dataset_id_to_contiguous_id", {}).items()}
    return Classes(list(names), [id_of_class.get(i, i) for i in range(num_classes)])


def image_records(paths: Sequence[str]) -> list[dict[str, Any]]:
    """Finds the images among files and folders, in the format of a dataset; their ids count from 1.

    A folder's files that are no images are left out, with a line in the log; its subfolders are not searched. A file
    with an image's name, or one of several named here, stays: `predict` reports why it cannot be read.

    Args:
        paths: images and folders of images.

    Raises:
        OSError: a path does not exist, or no file named here is an image.
        ValueError: a folder holds no image.
    """
    files: dict[str, None] = {}
    errors: list[OSError] = []
    for path in paths:
        if not os.path.lexists(path):
            raise FileNotFoundError(f"There is no image or folder {path} (--input). Name one that is there.")
        if not os.path.isdir(path):
            errors += [error for error in read_headers([path]) if isinstance(error, OSError)]
            files[os.path.realpath(path)] = None
            continue
        entries = sorted(entry.path for entry in os.scandir(path) if not os.path.isdir(entry.path))
        skipped = []
        for entry, header in zip(entries, read_headers(entries), strict=True):
            # A file with an image's name is not left out.
            named_so = os.path.isfile(entry) and os.path.splitext(entry)[1].lower() in Image.registered_extensions()
            if isinstance(header, OSError) and not named_so:
                skipped.append(os.path.basename(entry))
            else:
                files[os.path.realpath(entry)] = None
        if len(skipped) == len(entries):
            raise ValueError(f"The folder {path!r} holds no image among its {len(entries)} files.")
        if skipped:
            logger.warning("Skipped %d files of %s that are no images: %s", len(skipped), path, ", ".join(skipped))
    if errors and len(errors) == len(files):
        raise errors[0]
    return [{"image_id": i, "file_name": file} for i, file in enumerate(files, start=1)]


def picture_paths(records: Sequence[dict[str, Any]], output_dir: str) -> list[Path]:
    """The file for each record's picture, named after its image.

    Where two images have the same name, in two folders for example, every picture also carries its image's id, or its
    number from 1 where ids are text.

    Raises:
        ValueError: a picture would overwrite its image.
    """
    stems = [Path(record["file_name"]).stem for record in records]
    if len({stem.casefold() for stem in stems}) < len(stems):
        ids = [record["image_id"] for record in records]
        # Text may hold slashes.
        marks = ids if all(isinstance(id, int) for id in ids) else range(1, len(ids) + 1)
        stems = [f"{stem}-{mark}" for stem, mark in zip(stems, marks, strict=True)]
    paths = [Path(output_dir, f"{stem}.jpg") for stem in stems]
    images = {os.path.realpath(record["file_name"]) for record in records}
    for path in paths:
        if os.path.realpath(path) in images:
            raise ValueError(f"The picture {path} would overwrite the image that it is made from. Name another folder.")
    return paths


def predict(
    model: nn.Module,
    mapper: Callable[[dict[str, Any]], dict[str, Any]],
    classes: Classes,
    records: Sequence[dict[str, Any]],
    output_dir: str,
    *,
    ground_truth: bool,
    threshold: float = 0.5,
    top_k: int | None = None,
) -> list[dict[str, Any]]:
    """Predicts and draws images one at a time, with a progress bar.

    It writes a picture for each image as `picture_paths` says, and `coco_instances_results.json` with every prediction
    of the model. Without ground truth it also writes `images.json`, the ids, names and sizes of the images. An image
    that fails, in whatever way, is named in the log and costs no other one.

    Args:
        model: a Mask R-CNN or Faster R-CNN of Detectron2.
        mapper: turns a record into the model's input.
        classes: the meaning of the model's class numbers.
        records: images in Detectron2's dataset format.
        output_dir: an existing folder.
        ground_truth: draw the annotations of a record beside the predictions.
        threshold: predictions with a lower score are not drawn.
        top_k: the most predictions to draw an image, the highest scores first; None for no limit.

    Returns:
        All predictions as COCO results, with the dataset's category ids.

    Raises:
        FailedImagesError: in the end, if some images failed.
        OSError: the disk is full or takes no files.
    """
    results: list[dict[str, Any]] = []
    images: list[dict[str, Any]] = []
    failed = []
    with inference_context(model), torch.no_grad():
        # Drawing takes longer than reading, so loader processes would gain nothing.
        for record, path in zip(tqdm(records, unit="image"), picture_paths(records, output_dir), strict=True):
            try:
                image = read_image(record["file_name"], "RGB")
                height, width = image.shape[:2]
                sized = {"height": height, "width": width, **record}
                instances = model([mapper(sized)])[0]["instances"].to("cpu")
                for result in instances_to_coco_json(instances, record["image_id"]):
                    results.append({**result, "category_id": classes.category_ids[result["category_id"]]})
                listed = {key: sized[key] for key in ("file_name", "height", "width")}
                images.append({**listed, "id": record["image_id"]})

                panels = {}
                if ground_truth:
                    panels["ground truth"] = draw_ground_truth(image, record.get("annotations", []), classes.names)
                panels["prediction"] = draw_predictions(image, instances, classes.names, threshold, top_k)
                side_by_side(panels).save(path, quality=95)
            except Exception as error:  # one image's error must not affect another image
                if isinstance(error, OSError) and error.errno in _NO_MORE_WRITING:
                    raise
                failed.append(record["file_name"])
                logger.error("No picture of %s: %s: %s", record["file_name"], type(error).__name__, error)
                # An earlier run's, or written in part.
                path.unlink(missing_ok=True)
    _write_json(Path(output_dir, "coco_instances_results.json"), results)
    if not ground_truth:
        _write_json(Path(output_dir, "images.json"), images)
    if failed:
        raise FailedImagesError(
            f"{len(failed)} of the {len(records)} images failed: {', '.join(failed[:5])}"
            f"{', …' if len(failed) > 5 else ''}. The log says why. The pictures and results of the others are in "
            f"{output_dir}."
        )
    return results


def draw_predictions(
    image: np.ndarray,
    instances: Instances,
    class_names: Sequence[str],
    threshold: float = 0.0,
    top_k: int | None = None,
) -> np.ndarray:
    """Draws a model's predictions, named and with their scores in percent.

    Args:
        image: RGB, of shape (H, W, 3), uint8.
        instances: predictions on the image's own size, on the CPU.
        class_names: the name of each class.
        threshold, top_k: as for `predict`.

    Returns:
        The picture: RGB, uint8, of shape (H, W, 3) times the enlargement.
    """
    instances = instances[instances.scores >= threshold]
    instances = instances[instances.scores.argsort(descending=True)[:top_k]]
    classes = instances.pred_classes.tolist()
    scores = instances.scores.tolist()
    letters = lettering(class_names)
    return _draw(
        image,
        instances.pred_boxes.tensor.numpy(),
        instances.pred_masks.numpy() if instances.has("pred_masks") else None,
        classes,
        [f"{letters.names[i]} {100 * score:.0f}%" for i, score in zip(classes, scores, strict=True)],
        letters,
    )


def draw_ground_truth(
    image: np.ndarray, annotations: Sequence[dict[str, Any]], class_names: Sequence[str]
) -> np.ndarray:
    """Draws annotations in Detectron2's dataset format; crowds are marked as such. Shapes as for `draw_predictions`."""
    boxes = [BoxMode.convert(ann["bbox"], ann["bbox_mode"], BoxMode.XYXY_ABS) for ann in annotations]
    masks = None
    if any(ann.get("segmentation") for ann in annotations):
        nothing = np.zeros(image.shape[:2], dtype=np.uint8)
        segmentations = [ann.get("segmentation") for ann in annotations]
        masks = [GenericMask(each, *image.shape[:2]).mask if each else nothing for each in segmentations]
    classes = [ann["category_id"] for ann in annotations]
    letters = lettering(class_names)
    labels = [letters.names[ann["category_id"]] + (" (crowd)" if ann.get("iscrowd") else "") for ann in annotations]
    return _draw(image, np.array(boxes, dtype=np.float64).reshape(-1, 4), masks, classes, labels, letters)


def side_by_side(panels: dict[str, np.ndarray]) -> Image.Image:
    """Puts RGB pictures of shape (H, W, 3) next to each other, each below its title."""
    font = ImageFont.load_default(_TITLE_SIZE)
    top = _TITLE_SIZE + _GAP
    columns = [max(panel.shape[1], math.ceil(font.getlength(title))) for title, panel in panels.items()]
    width = sum(columns) + _GAP * (len(panels) - 1)
    height = top + max(panel.shape[0] for panel in panels.values())
    sheet = Image.new("RGB", (width, height), "white")
    left = 0
    for (title, panel), column in zip(panels.items(), columns, strict=True):
        sheet.paste(Image.fromarray(panel), (left + (column - panel.shape[1]) // 2, top))
        ImageDraw.Draw(sheet).text((left + column / 2, top / 2), title, fill="black", font=font, anchor="mm")
        left += column + _GAP
    return sheet


def _draw(
    image: np.ndarray,
    boxes: np.ndarray,
    masks: Sequence[np.ndarray] | None,
    classes: Sequence[int],
    labels: Sequence[str],
    letters: Lettering,
) -> np.ndarray:
    """Draws instances: boxes (n, 4) in XYXY, masks (n, H, W) or None, n class numbers, n labels in these letters."""
    height, width = image.shape[:2]
    factor = max(1.0, min(MIN_SHORT_SIDE / min(height, width), MAX_LONG_SIDE / max(height, width)))
    factor = min(factor, MAX_SIDE / max(height, width), math.sqrt(MAX_AREA / (height * width)))
    size = max(1, round(width * factor)), max(1, round(height * factor))
    picture = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
    visualizer = Visualizer(picture, Metadata(), font_size_scale=1.2)
    colors = _colors(classes, boxes)
    if masks is not None:
        # The smallest last, on top.
        for i in sorted(range(len(masks)), key=lambda i: -np.count_nonzero(masks[i])):
            pixels = Image.fromarray(masks[i].astype(np.uint8) * 255)
            # draw_binary_mask, unlike overlay_instances, leaves the holes of a mask open.
            visualizer.draw_binary_mask(np.asarray(pixels.resize(size, Image.Resampling.BILINEAR)) > 127, colors[i])
    visualizer.overlay_instances(boxes=boxes * factor, labels=labels, assigned_colors=colors)
    letters.apply(visualizer.output.ax.texts)
    _pull_labels_inside(visualizer)
    return visualizer.output.get_image()


def _pull_labels_inside(visualizer: Visualizer) -> None:
    """Moves the labels that the right or lower edge of the picture would cut off."""
    output = visualizer.output
    for text in output.ax.texts:
        extent = text.get_window_extent(output.canvas.get_renderer())
        x, y = text.get_position()
        # The extent counts rows from the bottom, the position from the top.
        text.set_position((x - max(0, extent.x1 + 2 - output.width), y - max(0, 2 - extent.y0)))


def _colors(classes: Sequence[int], boxes: np.ndarray) -> list[tuple[float, float, float]]:
    """Bright RGB colours for instances: the class's for its leftmost instance, neighbouring hues to the right."""
    seen: Counter[int] = Counter()
    colors = [(0.0, 0.0, 0.0)] * len(classes)
    for i in np.argsort(boxes[:, 0], kind="stable"):
        # Steps of the golden ratio keep the hues of any number of classes apart.
        hue = 0.618 * classes[i] + 0.13 * seen[classes[i]]
        colors[i] = colorsys.hsv_to_rgb(hue % 1, 0.9, 1.0)
        seen[classes[i]] += 1
    return colors


def _write_json(path: Path, content: Any) -> None:
    with open(path, "w") as file:
        json.dump(content, file)
