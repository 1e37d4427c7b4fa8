"""The mapper: sizes, flips and crops; empty images down to their losses; unreadable images named."""

import copy
import importlib.util
import math

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper, detection_utils
from detectron2.data.datasets import load_coco_json
from detectron2.modeling import build_model
from detectron2.structures import BoxMode
from detectron2.utils.events import EventStorage
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from karat_det.data.mapper import MappedImages, build_augmentation, build_mapper
from karat_det.data.registration import register_from_config

needs_shapely = pytest.mark.skipif(
    importlib.util.find_spec("shapely") is None, reason="Detectron2 crops polygons with Shapely, which is not installed"
)


@pytest.fixture
def records(catalogs, cfg, own, name_data):
    """Three records of 40 × 30; the first two hold a polygon each, the third is empty."""
    name_data(cfg, my_train=own)
    register_from_config(cfg)
    return DatasetCatalog.get("my_train")


@pytest.mark.parametrize("is_train", [True, False])
def test_fixed_resizes_to_the_square_of_the_model(cfg, records, is_train):
    example = build_mapper(cfg, is_train)(records[0])
    assert example["image"].shape == (3, 64, 64) and example["image"].dtype == torch.uint8
    # The detector maps its results back to this size.
    assert (example["height"], example["width"]) == (30, 40)


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_instances_are_resized_with_the_image(cfg, records, mask_format):
    cfg.INPUT.MASK_FORMAT = mask_format
    cfg.INPUT.RANDOM_FLIP = "none"
    instances = build_mapper(cfg, True)(records[0])["instances"]
    # The annotation's whole numbers do not fall on whole pixels.
    expected = torch.tensor([[5 * 64 / 40, 6 * 64 / 30, 25 * 64 / 40, 16 * 64 / 30]])
    torch.testing.assert_close(instances.gt_boxes.tensor, expected)
    assert (instances.gt_masks.get_bounding_boxes().tensor - expected).abs().max() <= 1
    assert instances.gt_classes.tolist() == [0]


@pytest.mark.parametrize("is_train", [True, False])
def test_fixed_resizes_to_a_height_and_a_width(cfg, records, is_train):
    cfg.MODEL.VIT.IMG_WIDTH = 160
    cfg.INPUT.RANDOM_FLIP = "none"
    example = build_mapper(cfg, is_train)(records[0])
    assert example["image"].shape == (3, 64, 160)
    assert (example["height"], example["width"]) == (30, 40)
    if is_train:
        expected = torch.tensor([[5 * 160 / 40, 6 * 64 / 30, 25 * 160 / 40, 16 * 64 / 30]])
        torch.testing.assert_close(example["instances"].gt_boxes.tensor, expected)


def test_swin_has_a_size_of_its_own(cfg, records):
    cfg.MODEL.BACKBONE.NAME = "build_swin_karat_fpn_backbone"
    cfg.MODEL.SWIN.IMG_SIZE, cfg.MODEL.SWIN.IMG_WIDTH = 96, 128
    assert build_mapper(cfg, True)(records[0])["image"].shape == (3, 96, 128)


@pytest.mark.parametrize("flip, axis", [("horizontal", 1), ("vertical", 0)])
def test_flips_occur_in_training_half_of_the_time(cfg, records, flip, axis):
    np.random.seed(0)
    plain = build_mapper(cfg, False)(records[0])["image"].permute(1, 2, 0).numpy()
    cfg.INPUT.RANDOM_FLIP = flip
    mapper = build_mapper(cfg, True)
    # Resizing and flipping commute up to rounding.
    distances = [
        [np.abs(image - other).mean() for other in (plain.astype(float), np.flip(plain, axis).astype(float))]
        for image in (mapper(records[0])["image"].permute(1, 2, 0).numpy().astype(float) for _ in range(40))
    ]
    assert all(min(pair) < 2 for pair in distances)
    assert 10 <= sum(flipped < same for same, flipped in distances) <= 30


def test_no_flip_when_configured_none(cfg, records):
    cfg.INPUT.RANDOM_FLIP = "none"
    assert len(build_augmentation(cfg, True)) == 1


def test_test_images_keep_their_shape_with_lsj(cfg, records):
    cfg.INPUT.RESIZE = "lsj"
    assert build_mapper(cfg, False)(records[0])["image"].shape == (3, 48, 64)


@pytest.mark.parametrize("size, expected", [((64, 160), (64, 85)), ((64, 32), (24, 32))])
def test_test_images_with_lsj_become_as_large_as_fits(cfg, records, size, expected):
    cfg.INPUT.RESIZE = "lsj"
    cfg.MODEL.VIT.IMG_SIZE, cfg.MODEL.VIT.IMG_WIDTH = size
    assert build_mapper(cfg, False)(records[0])["image"].shape == (3, *expected)


@needs_shapely
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    mask_format=st.sampled_from(["polygon", "bitmask"]),
    width=st.sampled_from([0, 32, 160]),
)
def test_lsj_stays_within_the_models_size_and_boxes_are_those_of_the_masks(cfg, records, seed, mask_format, width):
    cfg.MODEL.VIT.IMG_WIDTH = width
    cfg.INPUT.RESIZE = "lsj"
    cfg.INPUT.MASK_FORMAT = mask_format
    np.random.seed(seed)
    example = build_mapper(cfg, True)(records[1])
    assert example["image"].shape[1] <= 64 and example["image"].shape[2] <= (width or 64)
    instances = example["instances"]
    assert instances.image_size == tuple(example["image"].shape[1:])
    torch.testing.assert_close(instances.gt_boxes.tensor, instances.gt_masks.get_bounding_boxes().tensor)


@needs_shapely
def test_lsj_scales_within_its_range(cfg, records):
    cfg.INPUT.RESIZE = "lsj"
    cfg.INPUT.LSJ_SCALE = (0.25, 0.5)
    np.random.seed(0)
    mapper = build_mapper(cfg, True)
    widths = [mapper(records[0])["image"].shape[2] for _ in range(40)]
    assert min(widths) >= 16 and max(widths) <= 32 and max(widths) - min(widths) > 8


def test_lsj_without_shapely_is_an_error_with_the_remedy(cfg, monkeypatch):
    cfg.INPUT.RESIZE = "lsj"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"INPUT\.RESIZE 'lsj'.*pip install shapely"):
        build_mapper(cfg, True)
    build_mapper(cfg, False)


@pytest.mark.parametrize(
    "key, value, allowed",
    [
        ("RESIZE", "stretch", "'fixed' or 'lsj'"),
        ("RANDOM_FLIP", "diagonal", "'none', 'horizontal' or 'vertical'"),
        ("LSJ_SCALE", (2.0, 0.1), r"\(smallest, largest\)"),
        ("LSJ_SCALE", (0.0, 1.0), "above 0"),
    ],
)
def test_value_that_a_key_cannot_have_is_named_with_the_allowed_ones(cfg, key, value, allowed):
    cfg.INPUT.RESIZE = "lsj"
    cfg.INPUT[key] = value
    with pytest.raises(ValueError, match=rf"INPUT\.{key} is .*{allowed}"):
        build_augmentation(cfg, True)


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
@pytest.mark.parametrize("resize", ["fixed", pytest.param("lsj", marks=needs_shapely)])
@pytest.mark.parametrize("crowd", [False, True])
def test_image_without_instances_gets_empty_ones(cfg, records, mask_format, resize, crowd):
    cfg.INPUT.MASK_FORMAT = mask_format
    cfg.INPUT.RESIZE = resize
    record = copy.deepcopy(records[0 if crowd else 2])
    for annotation in record["annotations"]:
        annotation["iscrowd"] = 1
    instances = build_mapper(cfg, True)(record)["instances"]
    assert len(instances) == 0
    assert set(instances.get_fields()) == {"gt_boxes", "gt_classes", "gt_masks"}
    assert instances.gt_boxes.tensor.shape == (0, 4)


def test_image_without_instances_has_no_masks_where_there_are_none(cfg, records):
    cfg.MODEL.MASK_ON = False
    assert set(build_mapper(cfg, True)(records[2])["instances"].get_fields()) == {"gt_boxes", "gt_classes"}


def test_crowds_are_left_out_of_the_instances(cfg, records):
    record = copy.deepcopy(records[0])
    crowd = {**record["annotations"][0], "iscrowd": 1, "bbox": [0, 0, 8, 8], "bbox_mode": BoxMode.XYWH_ABS}
    record["annotations"].append(crowd)
    assert len(build_mapper(cfg, True)(record)["instances"]) == 1


@pytest.fixture
def tiny_mask_rcnn(cfg):
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[8], [16], [32], [48], [64]]
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 50
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 16
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 16
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = 1
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 16
    torch.manual_seed(0)
    return build_model(cfg).train()


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
@pytest.mark.parametrize("resize", ["fixed", pytest.param("lsj", marks=needs_shapely)])
@pytest.mark.parametrize("indices", [(0, 2), (2, 2)], ids=["mixed", "all_empty"])
def test_mask_rcnn_trains_on_images_without_annotations(cfg, records, tiny_mask_rcnn, mask_format, resize, indices):
    cfg.INPUT.MASK_FORMAT = mask_format
    cfg.INPUT.RESIZE = resize
    cfg.INPUT.LSJ_SCALE = (1.0, 1.0)
    mapper = build_mapper(cfg, True)
    with EventStorage():
        losses = tiny_mask_rcnn([mapper(records[i]) for i in indices])
    assert set(losses) == {"loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls", "loss_rpn_loc"}
    assert (losses["loss_mask"] > 0) == (0 in indices)
    assert all(math.isfinite(loss.item()) for loss in losses.values())
    sum(losses.values()).backward()
    # Every parameter takes part, so that DistributedDataParallel does not wait for one that does not.
    assert all(p.grad is not None for p in tiny_mask_rcnn.parameters() if p.requires_grad)


@pytest.mark.parametrize("is_train", [True, False])
def test_digits_arrive_as_they_lie_in_the_file(cfg, digits, catalogs, is_train):
    cfg.MODEL.VIT.IMG_SIZE = 112
    cfg.INPUT.MASK_FORMAT = "bitmask"
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.INPUT.FORMAT = "RGB"
    record = load_coco_json(digits / "annotations/instances_train.json", digits / "train", "some_digits")[1]
    example = build_mapper(cfg, is_train)(record)
    with Image.open(record["file_name"]) as file:
        np.testing.assert_array_equal(example["image"].permute(1, 2, 0), np.asarray(file))
    if is_train:
        boxes = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in record["annotations"])]
        assert example["instances"].gt_boxes.tensor.tolist() == boxes
        assert example["instances"].gt_masks.get_bounding_boxes().tensor.tolist() == boxes
    else:
        assert "instances" not in example and "annotations" not in example


def truncate(path):
    path.write_bytes(path.read_bytes()[:-500])


def corrupt(path):
    content = bytearray(path.read_bytes())
    content[20:60] = bytes(40)
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("is_train", [True, False])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.unlink(),
        truncate,
        corrupt,
        lambda path: path.write_text("not an image"),
        lambda path: path.write_bytes(b""),
    ],
    ids=["missing", "truncated", "corrupt", "text", "empty"],
)
def test_unreadable_image_is_named(cfg, records, own, spoil, is_train):
    spoil(own.image_dir / "1.png")
    with pytest.raises(OSError, match=r"Cannot read the image .*images/1\.png"):
        build_mapper(cfg, is_train)(records[0])


@pytest.mark.parametrize("is_train", [True, False])
def test_images_of_16_bits_are_scaled(cfg, records, own, is_train):
    cfg.INPUT.RANDOM_FLIP = "none"
    grey = np.random.default_rng(0).integers(256, size=(30, 40), dtype=np.uint8)
    Image.fromarray(grey).save(own.image_dir / "1.png")
    mapper = build_mapper(cfg, is_train)
    of_8_bits = mapper(records[0])["image"]
    Image.fromarray(grey * np.uint16(257)).save(own.image_dir / "1.png")
    torch.testing.assert_close(mapper(records[0])["image"], of_8_bits)


def test_segmentations_and_proposals_come_as_from_detectron2(cfg, records, own):
    Image.fromarray(np.arange(1200, dtype=np.uint8).reshape(30, 40)).save(own.image_dir / "segmentation.png")
    proposals = {
        "proposal_boxes": np.array([[1.0, 2, 30, 20], [5, 6, 9, 9]]),
        "proposal_objectness_logits": np.array([2.0, 1.0]),
        "proposal_bbox_mode": BoxMode.XYXY_ABS,
    }
    record = {**records[0], **proposals, "sem_seg_file_name": str(own.image_dir / "segmentation.png")}
    arguments = DatasetMapper.from_config(cfg, True)
    arguments.update(augmentations=build_augmentation(cfg, False), precomputed_proposal_topk=1)
    expected, example = (each(**arguments)(record) for each in (DatasetMapper, type(build_mapper(cfg, True))))
    assert set(example) == set(expected)
    for key in ("image", "sem_seg"):
        torch.testing.assert_close(example[key], expected[key])
    torch.testing.assert_close(example["proposals"].proposal_boxes.tensor, expected["proposals"].proposal_boxes.tensor)


def test_the_next_image_stands_for_a_broken_one_and_one_in_1000_may_be(cfg, records, own, caplog):
    cfg.INPUT.RANDOM_FLIP = "none"
    mapper = build_mapper(cfg, True)
    images = MappedImages([*records] * 400, mapper, "my_train")
    corrupt(own.image_dir / "1.png")
    for _ in range(2):
        torch.testing.assert_close(images[0]["image"], mapper(records[1])["image"])
    assert len(caplog.records) == 1
    assert "Skipped, 1 of at most 1: Cannot read the image" in caplog.text and "images/1.png" in caplog.text
    assert len(images) == 1200
    with pytest.raises(ValueError, match=r"images/1\.png.* broken image 2 of the 1200 of my_train, and no more than 1"):
        images[3]


def test_image_of_another_size_than_its_record_says_is_named(cfg, records, own):
    Image.new("RGB", (10, 10)).save(own.image_dir / "1.png")
    with pytest.raises(detection_utils.SizeMismatchError, match=r"images/1\.png"):
        build_mapper(cfg, True)(records[0])


def test_crop_comes_before_the_resize(cfg, records):
    cfg.INPUT.CROP.ENABLED = True
    cfg.INPUT.RANDOM_FLIP = "none"
    assert [type(each).__name__ for each in build_augmentation(cfg, True)] == ["RandomCrop", "Resize"]
    assert [type(each).__name__ for each in build_augmentation(cfg, False)] == ["Resize"]


def test_mapper_is_detectron2s(cfg):
    assert isinstance(build_mapper(cfg, True), DatasetMapper)
