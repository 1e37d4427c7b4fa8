"""From a record to the model's input: image and instances, resized as INPUT.RESIZE says.

INPUT.RESIZE "fixed", in training and in testing, resizes each image to the model's height and width, which are
IMG_SIZE and IMG_WIDTH of MODEL.VIT or MODEL.SWIN; the detector maps its results back to the original size. "lsj" is the
large-scale jitter of Detectron2's ViTDet recipe: in training, the image is scaled by a random factor of INPUT.LSJ_SCALE
and cropped to height × width at most; in testing, it becomes as large as fits in height × width. The model pads
smaller images.
"""

import copy
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import detectron2.data.transforms as T
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, detection_utils
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks

from ..config import image_size
from .broken_images import BrokenImages
from .images import read_image

# Pillow returns resized masks as read-only arrays, of which torch warns. Detectron2 only reads their tensors.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable", module="detectron2")


def build_augmentation(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    """Builds the transforms that INPUT.RESIZE, INPUT.RANDOM_FLIP and, in training, INPUT.CROP ask for.

    Args:
        cfg: config with the keys of `add_karat_config`.
        is_train: whether to include the random transforms of training.

    Returns:
        Detectron2's augmentations, in the order in which they apply.

    Raises:
        ValueError: INPUT.RESIZE, INPUT.RANDOM_FLIP or INPUT.LSJ_SCALE has a value that is not allowed.
    """
    height, width = image_size(cfg)
    resize, flip = cfg.INPUT.RESIZE, cfg.INPUT.RANDOM_FLIP
    if resize not in ("fixed", "lsj"):
        raise ValueError(f"INPUT.RESIZE is {resize!r}; it must be 'fixed' or 'lsj'.")
    if flip not in ("none", "horizontal", "vertical"):
        raise ValueError(f"INPUT.RANDOM_FLIP is {flip!r}; it must be 'none', 'horizontal' or 'vertical'.")
    if not is_train:
        return [T.Resize((height, width)) if resize == "fixed" else T.ResizeScale(1.0, 1.0, height, width)]

    augmentations: list[T.Augmentation] = []
    if cfg.INPUT.CROP.ENABLED:
        augmentations.append(T.RandomCrop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE))
    if flip != "none":
        augmentations.append(T.RandomFlip(horizontal=flip == "horizontal", vertical=flip == "vertical"))
    if resize == "fixed":
        augmentations.append(T.Resize((height, width)))
    else:
        scale = tuple(cfg.INPUT.LSJ_SCALE)
        if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
            raise ValueError(f"INPUT.LSJ_SCALE is {scale}; it must be (smallest, largest), both above 0.")
        augmentations.append(T.ResizeScale(*scale, target_height=height, target_width=width))
        augmentations.append(T.FixedSizeCrop((height, width), pad=False))
    return augmentations


def build_mapper(cfg: CfgNode, is_train: bool) -> DatasetMapper:
    """Builds Detectron2's DatasetMapper with the transforms of `build_augmentation`.

    Called with a record, the mapper returns a dict with `image`, a uint8 tensor (3, H, W), and in training `instances`,
    the boxes, classes and masks of objects that are no crowds, possibly none. It raises an OSError that names the file
    for an image that cannot be read, and a ValueError for an image whose size is not that of its record.

    Args:
        cfg: config with the keys of `add_karat_config`.
        is_train: for training or for inference.

    Returns:
        A mapper for Detectron2's data loaders.

    Raises:
        ValueError: as `build_augmentation`.
        ImportError: the crops of training need Shapely, and it is not installed.
    """
    arguments = _Mapper.from_config(cfg, is_train)
    arguments["augmentations"] = build_augmentation(cfg, is_train)
    crops = is_train and (cfg.INPUT.CROP.ENABLED or cfg.INPUT.RESIZE == "lsj")
    arguments["recompute_boxes"] = crops and cfg.MODEL.MASK_ON
    if arguments["recompute_boxes"] and importlib.util.find_spec("shapely") is None:
        raise ImportError(
            "INPUT.RESIZE 'lsj' and INPUT.CROP.ENABLED crop masks, for which Detectron2 uses Shapely, and it is not "
            "installed. Run `pip install shapely`, or set INPUT.RESIZE fixed and INPUT.CROP.ENABLED False."
        )
    return _Mapper(**arguments)


class MappedImages(Sequence):
    """Images to train on. The next image replaces one that cannot be read, as long as these are few.

    Args:
        records: Detectron2's dataset dicts.
        mapper: makes the model's input from a record.
        place: the user's name for the data.
    """

    def __init__(self, records: Sequence[dict[str, Any]], mapper: Callable[[dict[str, Any]], Any], place: str):
        self.records = records
        self.mapper = mapper
        self._broken = BrokenImages(len(records), place)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Any:
        """The mapper's result for a record.

        Raises:
            ValueError: too many images cannot be read.
        """
        while True:
            if not self._broken.seen[index]:
                try:
                    return self.mapper(self.records[index])
                except OSError as error:
                    self._broken.add(index, error)
            index = (index + 1) % len(self)


class _Mapper(DatasetMapper):
    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """As Detectron2's, but with this package's reader of images, for which Detectron2 has no hook."""
        example = copy.deepcopy(dataset_dict)
        image = read_image(example["file_name"], self.image_format)
        detection_utils.check_image_size(example, image)
        segmentation = None
        if "sem_seg_file_name" in example:
            segmentation = detection_utils.read_image(example["sem_seg_file_name"], "L").squeeze(2)
        augmented = T.AugInput(image, sem_seg=segmentation)
        transforms = self.augmentations(augmented)
        image_shape = augmented.image.shape[:2]  # (H, W)
        example["image"] = torch.as_tensor(np.ascontiguousarray(augmented.image.transpose(2, 0, 1)))
        if segmentation is not None:
            example["sem_seg"] = torch.as_tensor(augmented.sem_seg.astype("long"))
        if self.proposal_topk is not None:
            detection_utils.transform_proposals(example, image_shape, transforms, proposal_topk=self.proposal_topk)
        if not self.is_train:
            example.pop("annotations", None)
        elif "annotations" in example:
            self._transform_annotations(example, transforms, image_shape)
        example.pop("sem_seg_file_name", None)
        return example

    def _transform_annotations(
        self, dataset_dict: dict[str, Any], transforms: T.TransformList, image_shape: tuple[int, int]
    ) -> None:
        annotations = [each for each in dataset_dict["annotations"] if each.get("iscrowd", 0) == 0]
        for annotation in annotations:
            # Detectron2 transforms coordinates in place: integers, as many tools write them, would stay integers.
            annotation["bbox"] = [float(x) for x in annotation["bbox"]]
            if isinstance(annotation.get("segmentation"), list):
                annotation["segmentation"] = [np.asarray(p, dtype=np.float64) for p in annotation["segmentation"]]
        if annotations:
            super()._transform_annotations(dataset_dict, transforms, image_shape)
            return
        # Detectron2 gives such an image no gt_masks at all, and then fails to recompute its boxes from them.
        del dataset_dict["annotations"]
        instances = Instances(image_shape)
        instances.gt_boxes = Boxes(torch.zeros(0, 4))
        instances.gt_classes = torch.zeros(0, dtype=torch.int64)
        if self.use_instance_mask:
            bitmask = self.instance_mask_format == "bitmask"
            instances.gt_masks = BitMasks(torch.zeros(0, *image_shape)) if bitmask else PolygonMasks([])
        dataset_dict["instances"] = instances
