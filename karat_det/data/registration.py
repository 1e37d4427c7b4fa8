"""Registers your own datasets, in COCO format, under the names that the KARAT_DATA keys give them."""

import os

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from ..checkpoint.inspection import not_a_file
from .coco_datasets import register_coco
from .formats.coco import read_categories

# What this module registered: name -> (JSON file, image folder, the file's time in nanoseconds and its size).
_registered: dict[str, tuple[str, str, int, int]] = {}


def register_from_config(cfg: CfgNode) -> None:
    """Registers dataset NAMES[i] with the annotations JSONS[i] and the images below IMAGE_DIRS[i] of KARAT_DATA.

    The class names are those of the JSON's `categories`, in the order of their ids. A name that an earlier call
    registered is registered anew, and its JSON read, if its files are others or have changed.

    Args:
        cfg: config with the keys of `add_karat_config`. Paths are relative to the current folder.

    Raises:
        ValueError: the three lists differ in length; a name is empty, occurs twice or belongs to another dataset;
            a JSON cannot be parsed or is not in COCO format.
        FileNotFoundError: a JSON or an image folder does not exist.
    """
    names, jsons, image_dirs = (list(cfg.KARAT_DATA[key]) for key in ("NAMES", "JSONS", "IMAGE_DIRS"))
    if not len(names) == len(jsons) == len(image_dirs):
        raise ValueError(
            "KARAT_DATA.NAMES, KARAT_DATA.JSONS and KARAT_DATA.IMAGE_DIRS must have one entry for each dataset, but "
            f"they have {len(names)}, {len(jsons)} and {len(image_dirs)}: {names}, {jsons}, {image_dirs}."
        )
    for index, name in enumerate(names):
        if not name or not isinstance(name, str):
            raise ValueError(f"KARAT_DATA.NAMES[{index}] is {name!r}; it must be a name such as 'my_train'.")
        if name in names[:index]:
            raise ValueError(f"KARAT_DATA.NAMES holds {name!r} twice; give each dataset a name of its own.")
        if name in DatasetCatalog and name not in _registered:
            raise ValueError(
                f"KARAT_DATA.NAMES[{index}] is {name!r}, which is the name of a built-in dataset; choose another."
            )
    for index, (name, json_file, image_dir) in enumerate(zip(names, jsons, image_dirs, strict=True)):
        if not os.path.isfile(json_file):
            raise FileNotFoundError(_missing(f"KARAT_DATA.JSONS[{index}]", name, json_file, "file"))
        if not os.path.isdir(image_dir):
            raise FileNotFoundError(_missing(f"KARAT_DATA.IMAGE_DIRS[{index}]", name, image_dir, "folder"))
        status = os.stat(json_file)
        entry = (json_file, image_dir, status.st_mtime_ns, status.st_size)
        if _registered.get(name) != entry:
            register_coco(
                name, json_file, image_dir, read_categories(json_file, f"KARAT_DATA.JSONS[{index}], {json_file},")
            )
            _registered[name] = entry


def _missing(key: str, name: str, path: str, kind: str) -> str:
    other = not_a_file(path) if kind == "file" else ""
    return (
        f"{key} is {path!r}, for the dataset {name!r}, but {f'it is {other}: ' * bool(other)}there is no such {kind} "
        f"({os.path.abspath(path)}). "
        "Correct the path; a relative one starts at the current folder."
    )
