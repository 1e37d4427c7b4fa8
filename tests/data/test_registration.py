"""Your own data by config, and the errors of KARAT_DATA's keys."""

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from karat_det.data.dataset_check import load_checked_dicts
from karat_det.data.registration import register_from_config

pytestmark = pytest.mark.usefixtures("catalogs")


def test_own_data_is_registered_with_the_class_names_of_its_json(own_cfg):
    register_from_config(own_cfg)
    metadata = MetadataCatalog.get("my_train")
    assert metadata.thing_classes == ["cat", "dog"]
    assert metadata.evaluator_type == "coco"
    records = DatasetCatalog.get("my_train")
    assert [[a["category_id"] for a in record["annotations"]] for record in records] == [[0], [1], []]


def test_registering_the_same_again_is_harmless_and_other_files_replace_it(own_cfg, make_own, name_data):
    register_from_config(own_cfg)
    load_checked_dicts(own_cfg)
    register_from_config(own_cfg)
    assert MetadataCatalog.get("my_train").thing_dataset_id_to_contiguous_id == {7: 0, 14: 1}

    other = make_own("other", ["bird", "fish", "frog"])
    name_data(own_cfg, my_train=other)
    register_from_config(own_cfg)
    assert MetadataCatalog.get("my_train").thing_classes == ["bird", "fish", "frog"]
    assert DatasetCatalog.get("my_train")[0]["file_name"].startswith(str(other.image_dir))


@pytest.mark.parametrize("key", ["NAMES", "JSONS", "IMAGE_DIRS"])
def test_lists_of_unequal_length_are_an_error(own_cfg, key):
    own_cfg.KARAT_DATA[key] = []
    with pytest.raises(ValueError, match=r"KARAT_DATA\.NAMES, .* one entry for each dataset"):
        register_from_config(own_cfg)


def test_name_given_twice_is_an_error(own_cfg):
    for key in ("NAMES", "JSONS", "IMAGE_DIRS"):
        own_cfg.KARAT_DATA[key] = own_cfg.KARAT_DATA[key] * 2
    with pytest.raises(ValueError, match=r"KARAT_DATA\.NAMES holds 'my_train' twice"):
        register_from_config(own_cfg)


@pytest.mark.parametrize("name", ["coco_2017_train", "digits_val"])
def test_name_of_a_built_in_dataset_is_an_error(own_cfg, name):
    own_cfg.KARAT_DATA.NAMES = [name]
    with pytest.raises(ValueError, match=rf"KARAT_DATA\.NAMES\[0\] is '{name}'.*built-in"):
        register_from_config(own_cfg)


def test_empty_name_is_an_error(own_cfg):
    own_cfg.KARAT_DATA.NAMES = [""]
    with pytest.raises(ValueError, match=r"KARAT_DATA\.NAMES\[0\] is ''"):
        register_from_config(own_cfg)


@pytest.mark.parametrize("key, kind", [("JSONS", "file"), ("IMAGE_DIRS", "folder")])
def test_missing_path_is_named_with_its_key(own_cfg, key, kind):
    own_cfg.KARAT_DATA[key] = ["nowhere/at_all"]
    with pytest.raises(FileNotFoundError, match=rf"KARAT_DATA\.{key}\[0\] is 'nowhere/at_all'.*no such {kind}"):
        register_from_config(own_cfg)


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"images": [', "is not a JSON file"),
        ("[]", "not in COCO format"),
        ("{}", "not in COCO format"),
        ('{"categories": [{"name": "cat"}]}', "not in COCO format"),
        ('{"categories": []}', "has no categories"),
    ],
)
def test_json_without_readable_categories_is_named(own_cfg, own, text, message):
    own.json_file.write_text(text)
    with pytest.raises(ValueError, match=rf"(?s)KARAT_DATA\.JSONS\[0\], .*annotations\.json, .*{message}"):
        register_from_config(own_cfg)
