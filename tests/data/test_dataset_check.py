"""The datasets of a run, and the errors that bad data meets before a model is built."""

import json
import os
from pathlib import Path

import pycocotools.mask as mask_util
import pytest
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from forked_command import run_command
from PIL import ExifTags, Image

from karat_det.data import coco_datasets
from karat_det.data.dataset_check import check_datasets, load_checked_dicts, load_checked_test_dicts
from karat_det.data.registration import register_from_config

pytestmark = pytest.mark.usefixtures("catalogs")


def load(cfg):
    register_from_config(cfg)
    check_datasets(cfg, training=True)
    return load_checked_dicts(cfg)


def test_images_without_annotations_are_kept_or_filtered_as_configured(own_cfg, own):
    register_from_config(own_cfg)
    own_cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = True
    assert [record["image_id"] for record in load_checked_dicts(own_cfg)] == [1, 2]
    own_cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    assert [record["image_id"] for record in load_checked_dicts(own_cfg)] == [1, 2, 3]


def test_records_of_several_training_datasets_follow_one_another(own_cfg, own, make_own, name_data):
    name_data(own_cfg, my_train=own, more=make_own("more", ["cat", "dog"]))
    own_cfg.DATASETS.TRAIN = ("my_train", "more")
    folders = [Path(record["file_name"]).parents[1].name for record in load(own_cfg)]
    assert folders == ["own", "own", "more", "more"]


def test_images_with_crowds_only_count_as_empty(own_cfg, own):
    own.content["annotations"][0]["iscrowd"] = 1
    own.write()
    assert [record["image_id"] for record in load(own_cfg)] == [2]


@pytest.mark.parametrize("area, fits", [(1, True), (500, True), (0.19, False), (600, False), (200 / 1200, False)])
def test_areas_of_another_scale_are_warned_of_and_kept(own_cfg, own, caplog, area, fits):
    for annotation in own.content["annotations"]:
        annotation["area"] = area
    own.write()
    assert load(own_cfg)[0]["annotations"][0]["area"] == area
    assert ("2 of 2 areas do not fit their boxes" in caplog.text) == (not fits)


def test_masks_that_a_tool_has_marked_as_crowds_are_warned_of(own_cfg, own, caplog):
    # As CVAT marks the masks of its brush, beside polygons.
    own.content["annotations"] = [{**own.content["annotations"][0], "id": i, "iscrowd": int(i < 1)} for i in range(10)]
    own.write()
    assert len(load(own_cfg)[0]["annotations"]) == 10
    assert "iscrowd" not in caplog.text
    own.content["annotations"][1]["iscrowd"] = 1
    own.write()
    load(own_cfg)
    assert "(dataset 'my_train'): 2 of 10 annotations have iscrowd 1, which are neither trained on" in caplog.text


@pytest.mark.parametrize("crowds", [False, True])
def test_nothing_left_to_train_on_is_an_error(own_cfg, own, crowds):
    if crowds:
        for annotation in own.content["annotations"]:
            annotation["iscrowd"] = 1
    else:
        own.content["annotations"] = []
    own.write()
    with pytest.raises(ValueError, match=r"None of the 3 images.*FILTER_EMPTY_ANNOTATIONS.*annotations\.json"):
        load(own_cfg)
    own_cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    assert len(load_checked_dicts(own_cfg)) == 3


def test_no_training_dataset_is_an_error(own_cfg):
    own_cfg.DATASETS.TRAIN = ()
    with pytest.raises(ValueError, match=r"DATASETS\.TRAIN is empty"):
        load(own_cfg)


def test_json_without_images_is_an_error(own_cfg, own):
    own.content["images"] = own.content["annotations"] = []
    own.write()
    with pytest.raises(ValueError, match=r"annotations\.json.*lists no images"):
        load(own_cfg)


@pytest.mark.parametrize("key", ["TRAIN", "TEST"])
def test_unknown_dataset_is_named_with_the_known_ones(own_cfg, key, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", "/some/where")
    own_cfg.DATASETS[key] = ("my_trian",)
    with pytest.raises(ValueError, match=rf"DATASETS\.{key} names 'my_trian'.*mean my_train.*coco_2017.*/some/where"):
        load(own_cfg)


def test_missing_built_in_dataset_is_named_with_its_root(cfg, monkeypatch):
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    register_coco_instances("built_in", {}, "nowhere/instances.json", "nowhere")
    cfg.DATASETS.TRAIN = ("built_in",)
    with pytest.raises(FileNotFoundError, match=r"'built_in'.*nowhere/instances\.json.*DETECTRON2_DATASETS.*not set"):
        load(cfg)


@pytest.mark.parametrize("key", ["TRAIN", "TEST"])
def test_number_of_categories_must_be_num_classes(own_cfg, own, make_own, name_data, key):
    name_data(own_cfg, my_train=own, other=make_own("other", ["a", "b", "c"]))
    own_cfg.DATASETS[key] = ("other",)
    with pytest.raises(ValueError, match=r"other/annotations\.json.*3 categories \(a, b, c\).*NUM_CLASSES is 2.*to 3"):
        load(own_cfg)


def test_train_and_test_must_have_the_same_classes(own_cfg, own, make_own, name_data):
    name_data(own_cfg, my_train=own, my_val=make_own("other", ["cat", "cow"]))
    own_cfg.DATASETS.TEST = ("my_val",)
    with pytest.raises(ValueError, match=r"'my_val'.*'my_train'.*place 1 is 'cow' here and 'dog' there"):
        load(own_cfg)


def test_built_in_name_with_other_categories_is_an_error(own_cfg, own):
    register_coco_instances("built_in", {"thing_classes": ["x", "y"]}, str(own.json_file), str(own.image_dir))
    own_cfg.DATASETS.TRAIN = ("built_in",)
    with pytest.raises(ValueError, match=r"annotations\.json.*categories that belong to this name.*x, y.*KARAT_DATA"):
        load(own_cfg)


def test_missing_images_are_counted_and_named(own_cfg, own):
    (own.image_dir / "2.png").unlink()
    (own.image_dir / "3.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"2 of the 3 images.*images/2\.png.*images/3\.png"):
        load(own_cfg)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n"], ids=["empty", "text", "cut short"])
def test_file_that_is_no_image_is_named_before_the_run(own_cfg, own, content):
    (own.image_dir / "2.png").write_bytes(content)
    with pytest.raises(OSError, match=r"Cannot read the image .*images/2\.png"):
        load(own_cfg)


def test_size_of_an_image_must_be_that_of_the_json_upright(own_cfg, own):
    # A phone's photograph: 30 × 40 pixels that are to be turned by a quarter.
    with Image.open(own.image_dir / "1.png") as image:
        turned = image.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    turned.save(own.image_dir / "1.png", exif=exif)
    assert len(load(own_cfg)) == 2
    turned.save(own.image_dir / "1.png")
    with pytest.raises(ValueError, match=r"images/1\.png has 30 × 40 pixels, .* its annotations are for 40 × 30"):
        load(own_cfg)


def test_missing_subfolder_of_images_is_named(own_cfg, own):
    own.content["images"][0]["file_name"] = "deeper/1.png"
    own.write()
    with pytest.raises(FileNotFoundError, match=r"images/deeper"):
        load(own_cfg)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda content: content["images"][0].pop("height"), "not in COCO format.*height"),
        (lambda content: content["annotations"][0].update(category_id=99), "not in COCO format.*99"),
        (lambda content: content["annotations"][0].update(bbox=[]), "not in COCO format.*bbox"),
        (lambda content: content["annotations"][0].pop("bbox"), r"annotations\[0\] \(id 1.*bbox is missing"),
        (lambda content: content["annotations"][1].update(id=1), r"annotations\[1\] \(id 1.*that of annotations\[0\]"),
        (lambda content: content.update(annotations=[3]), "not in COCO format"),
        (lambda content: content.update(images=3), "not in COCO format"),
    ],
)
def test_json_that_is_not_in_coco_format_is_named(own_cfg, own, spoil, message):
    spoil(own.content)
    own.write()
    with pytest.raises(ValueError, match=rf"(?s)annotations\.json.*{message}"):
        load(own_cfg)


def test_json_that_breaks_later_is_named(own_cfg, own):
    register_from_config(own_cfg)
    own.json_file.write_text("{")
    with pytest.raises(ValueError, match=r"annotations\.json.*is not a JSON file"):
        load_checked_dicts(own_cfg)


def run_length_encoded():
    rle = mask_util.frPyObjects([[5, 6, 25, 6, 25, 16, 5, 16]], 30, 40)[0]
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def test_run_length_encoded_masks_need_the_bitmask_format(own_cfg, own):
    own.content["annotations"][1]["segmentation"] = run_length_encoded()
    own.write()
    with pytest.raises(ValueError, match=r"1 annotations.*run-length.*2\.png.*INPUT\.MASK_FORMAT bitmask"):
        load(own_cfg)
    own_cfg.INPUT.MASK_FORMAT = "bitmask"
    assert len(load_checked_dicts(own_cfg)) == 2


def test_run_length_encoded_crowds_are_no_obstacle(own_cfg, own):
    own.content["annotations"][1].update(segmentation=run_length_encoded(), iscrowd=1)
    own.write()
    assert len(load(own_cfg)) == 1


def test_annotation_without_mask_needs_mask_on_false(own_cfg, own):
    del own.content["annotations"][0]["segmentation"]
    own.write()
    with pytest.raises(ValueError, match=r"1 annotations have no 'segmentation'.*1\.png.*MODEL\.MASK_ON False"):
        load(own_cfg)
    own_cfg.MODEL.MASK_ON = False
    assert len(load_checked_dicts(own_cfg)) == 2


def test_run_that_only_evaluates_needs_no_training_data(own_cfg):
    own_cfg.DATASETS.TRAIN = ("coco_2017_train",)
    register_from_config(own_cfg)
    assert [record["image_id"] for record in load_checked_test_dicts(own_cfg)] == [1, 2, 3]


def test_test_set_without_annotations_is_allowed(own_cfg, own, make_own, name_data):
    unlabelled = make_own("unlabelled", ["cat", "dog"])
    unlabelled.content["annotations"] = []
    unlabelled.write()
    name_data(own_cfg, my_train=own, my_test=unlabelled)
    own_cfg.DATASETS.TEST = ("my_test",)
    assert len(load(own_cfg)) == 2


def test_each_training_json_is_loaded_once(own_cfg, make_own, name_data, own, monkeypatch):
    name_data(own_cfg, my_train=own, my_val=make_own("val", ["cat", "dog"]))
    own_cfg.DATASETS.TEST = ("my_val",)
    register_from_config(own_cfg)
    loads = []
    read = coco_datasets.read_coco
    monkeypatch.setattr(coco_datasets, "read_coco", lambda *arguments: loads.append(arguments[0]) or read(*arguments))
    load_checked_dicts(own_cfg)
    # What is evaluated is what was checked, though the file is gone.
    Path(own_cfg.KARAT_DATA.JSONS[1]).unlink()
    assert len(DatasetCatalog.get("my_val")) == 3
    assert len(coco_datasets.content_of("my_val").annotations[0]) == 1
    assert loads == own_cfg.KARAT_DATA.JSONS


def test_coco_tiny_loads_by_coco_names_where_it_is_given(tmp_path):
    root = os.environ.get("KARAT_COCO_TINY")
    if not root:
        pytest.skip("KARAT_COCO_TINY does not name the folder that holds coco/, a small subset of COCO")
    (tmp_path / "load.py").write_text(
        "import json, karat_det\n"
        "from detectron2.config import get_cfg\n"
        "from karat_det.data.dataset_check import load_checked_dicts\n"
        "cfg = get_cfg(); karat_det.add_karat_config(cfg)\n"
        "cfg.DATASETS.TRAIN = ('coco_2017_train',); cfg.DATASETS.TEST = ('coco_2017_val',)\n"
        "cfg.MODEL.MASK_ON = True\n"
        "records = load_checked_dicts(cfg)\n"
        "print(json.dumps([len(records), sum(len(r['annotations']) for r in records)]))\n"
    )
    result = run_command(tmp_path / "load", folder=tmp_path, environment={"DETECTRON2_DATASETS": root})
    assert not result.returncode, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == [80, 705]


def test_masks_without_a_pixel_are_left_out_where_masks_are_used(own_cfg, own):
    own.content["annotations"][0]["segmentation"] = [[5, 6, 5, 6, 5, 6]]
    own.write()
    assert [record["image_id"] for record in load(own_cfg)] == [2]
    own_cfg.MODEL.MASK_ON = False
    assert [record["image_id"] for record in load_checked_dicts(own_cfg)] == [1, 2]


@pytest.mark.parametrize("segmentation", [None, [], [[]]])
def test_boxes_without_masks_are_trained_on_where_masks_are_off(own_cfg, own, segmentation):
    for annotation in own.content["annotations"]:
        annotation["segmentation"] = segmentation
    own.write()
    own_cfg.MODEL.MASK_ON = False
    assert [record["image_id"] for record in load(own_cfg)] == [1, 2]
    own_cfg.MODEL.MASK_ON = True
    with pytest.raises(ValueError, match=r"2 annotations have no 'segmentation', the first of them, id 1, in image"):
        load_checked_test_dicts(own_cfg)


def test_errors_of_a_test_set_stop_the_run_too(own_cfg, own, make_own, name_data):
    broken = make_own("broken", ["cat", "dog"])
    broken.content["annotations"][1]["bbox"] = [1, 2, float("nan"), 4]
    broken.write()
    name_data(own_cfg, my_train=own, my_val=broken)
    own_cfg.DATASETS.TEST = ("my_val",)
    with pytest.raises(ValueError, match=r"broken/annotations\.json \(dataset 'my_val'\).*annotations\[1\] \(id 2"):
        load(own_cfg)


def test_built_in_names_are_read_by_the_same_reader(cfg, own):
    own.content["annotations"][0]["iscrowd"] = None
    own.write()
    register_coco_instances("built_in", {}, str(own.json_file), str(own.image_dir))
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("built_in",)
    assert [record["image_id"] for record in load(cfg)] == [1, 2]
    assert DatasetCatalog.get("built_in")[0]["annotations"][0]["iscrowd"] == 0
    assert MetadataCatalog.get("built_in").thing_dataset_id_to_contiguous_id == {7: 0, 14: 1}


@pytest.mark.parametrize("architecture", ["RetinaNet", "ProposalNetwork"])
def test_masks_need_an_architecture_that_finds_them(own_cfg, architecture):
    own_cfg.MODEL.META_ARCHITECTURE = architecture
    with pytest.raises(ValueError, match=rf"MASK_ON is True, but .* {architecture} finds no masks"):
        load(own_cfg)


@pytest.mark.parametrize("architecture, section", [("RetinaNet", "RETINANET"), ("MyDetector", "MYDETECTOR")])
def test_the_number_of_classes_is_that_of_the_architecture(own_cfg, architecture, section):
    own_cfg.MODEL.META_ARCHITECTURE = architecture
    own_cfg.MODEL.MASK_ON = False
    own_cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
    own_cfg.MODEL.setdefault(section, CfgNode({"NUM_CLASSES": 0})).NUM_CLASSES = 3
    with pytest.raises(ValueError, match=rf"2 categories.*MODEL\.{section}\.NUM_CLASSES is 3\. Set .* to 2"):
        load(own_cfg)
    own_cfg.MODEL[section].NUM_CLASSES = 2
    assert len(load_checked_dicts(own_cfg)) == 2
