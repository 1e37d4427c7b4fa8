"""A few scenes of the embedded dataset, made once a session, and configs and data in COCO format to try things on."""

import json
from pathlib import Path

import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from karat_det import add_karat_config
from karat_det.data import coco_datasets, registration
from karat_det.data.digits import generate_digits

NUM_SCENES = {"train": 24, "val": 12}


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """The folder of a small digits dataset."""
    return generate_digits(tmp_path_factory.mktemp("datasets"), NUM_SCENES)


@pytest.fixture
def catalogs(monkeypatch):
    """Detectron2's catalogs, put back afterwards as they were."""
    monkeypatch.setattr(DatasetCatalog, "data", dict(DatasetCatalog.data))
    monkeypatch.setattr(MetadataCatalog, "data", dict(MetadataCatalog.data))
    monkeypatch.setattr(registration, "_registered", {})
    monkeypatch.setattr(coco_datasets, "_loaded", {})


@pytest.fixture
def cfg():
    cfg = get_cfg()
    add_karat_config(cfg)
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.VIT.IMG_SIZE = 64
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    cfg.INPUT.MASK_FORMAT = "polygon"
    return cfg


class OwnData:
    """A dataset in COCO format in a folder: three images of 40 × 30; the third has no annotations."""

    def __init__(self, folder: Path, class_names=("cat", "dog")):
        self.json_file = folder / "annotations.json"
        self.image_dir = folder / "images"
        self.image_dir.mkdir(parents=True)
        rng = np.random.default_rng(0)
        images, annotations = [], []
        for i in range(1, 4):
            images.append({"id": i, "file_name": f"{i}.png", "width": 40, "height": 30})
            Image.fromarray(rng.integers(256, size=(30, 40, 3), dtype=np.uint8)).save(self.image_dir / f"{i}.png")
        for i in range(1, 3):
            annotations.append(
                {
                    "id": i,
                    "image_id": i,
                    "category_id": 7 * i,
                    "bbox": [5, 6, 20, 10],
                    "area": 200,
                    "segmentation": [[5, 6, 25, 6, 25, 16, 5, 16]],
                    "iscrowd": 0,
                }
            )
        # Ids with gaps and out of order, as they are in the wild.
        categories = [{"id": 7 * (i + 1), "name": name} for i, name in reversed(list(enumerate(class_names)))]
        self.content = {"images": images, "annotations": annotations, "categories": categories}
        self.write()

    def write(self) -> None:
        self.json_file.write_text(json.dumps(self.content))


@pytest.fixture
def own(tmp_path):
    return OwnData(tmp_path / "own")


@pytest.fixture
def make_own(tmp_path):
    return lambda name, class_names: OwnData(tmp_path / name, class_names)


@pytest.fixture
def name_data():
    """Names datasets in a config's KARAT_DATA keys."""

    def name(cfg, **data):
        cfg.KARAT_DATA.NAMES = list(data)
        cfg.KARAT_DATA.JSONS = [str(each.json_file) for each in data.values()]
        cfg.KARAT_DATA.IMAGE_DIRS = [str(each.image_dir) for each in data.values()]

    return name


@pytest.fixture
def own_cfg(cfg, own, name_data):
    """A config that trains and tests on the own data, which is registered when the dataset is loaded."""
    name_data(cfg, my_train=own)
    cfg.DATASETS.TRAIN = ("my_train",)
    cfg.DATASETS.TEST = ("my_train",)
    return cfg
