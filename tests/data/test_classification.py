import io
import pickle
import struct
import sys
import types
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageOps

from karat_det.config import pretrain_config
from karat_det.data import classification
from karat_det.data.classification import NO_LABEL, LabelledImages, Split, build_datasets, load_splits


def write_image(path, value=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(value).integers(256, size=(12, 10, 3), dtype=np.uint8)
    pixels[0, 0] = value
    Image.fromarray(pixels).save(path)


def write_tree(root, **splits):
    """Writes root/<split>/<class>/<i>.png for each split's {class: number of images}."""
    for split, classes in splits.items():
        for name, count in classes.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                write_image(root / split / name / f"{i}.png", value=10 * i)
    return root


def config(root, name="folder", **keys):
    cfg = pretrain_config()
    cfg.DATA.NAME, cfg.DATA.ROOT = name, str(root)
    for key, value in keys.items():
        cfg.DATA[key] = value
    return cfg


def test_a_folder_gives_classes_and_labels(tmp_path):
    write_tree(tmp_path, train={"b": 2, "a": 1, "a10/images": 1, "a9": 1}, validation={"a10": 1, "b": 2})
    write_image(tmp_path / "train" / "of_no_class.png")
    train, val = build_datasets(config(tmp_path, NUM_CLASSES=4))
    assert train.split.classes == val.split.classes == ["a", "a10", "a9", "b"]
    assert sorted(label for _, label in (train[i] for i in range(len(train)))) == [0, 1, 2, 3, 3]
    # Validation has fewer classes; its labels are still those of training.
    assert [val[i][1] for i in range(3)] == [1, 3, 3]
    image, _ = val[2]
    assert image.mode == "RGB" and image.size == (10, 12)
    assert image.getpixel((0, 0)) == (10, 10, 10)


def test_each_process_validates_its_share_and_trains_on_all(tmp_path):
    write_tree(tmp_path, train={"a": 2, "b": 2}, val={"a": 3, "b": 2})
    shares = [build_datasets(config(tmp_path), rank, 2) for rank in (0, 1)]
    assert [len(train) for train, _ in shares] == [4, 4]
    seen = [index for _, val in shares for index in val.indices]
    assert sorted(seen) == list(range(5))


@pytest.mark.parametrize(
    ("splits", "keys", "error", "message"),
    [
        ({"train": {"a": 1, "b": 0}, "val": {"a": 1}}, {}, ValueError, r"1 of the 2 class folders of .*train hold no"),
        ({"train": {"a": 0}, "val": {"a": 1}}, {}, ValueError, r"1 of the 1 class folders of .*train hold no image: a"),
        ({"train": {}, "val": {"a": 1}}, {}, FileNotFoundError, r"has no folder train\."),
        ({"train": {"a": 1}}, {}, FileNotFoundError, r"has no folder val or validation or valid or test"),
        (
            {"train": {"a": 1}, "val": {"a": 1, "c": 1}},
            {},
            ValueError,
            r"val has classes that .*train has not: c\. Remove or rename",
        ),
        (
            {"train": {"a": 1, "b": 1}, "val": {"a": 1}},
            {"NUM_CLASSES": 3},
            ValueError,
            r"train has 2 classes, but DATA\.NUM_CLASSES is 3.*to 2, or to 0",
        ),
        ({}, {"NAME": "fodler"}, ValueError, r"DATA\.NAME is 'fodler', which is unknown\. Did you mean folder\?"),
        ({}, {"NAME": "CIFAR10"}, FileNotFoundError, r"torchvision does not find CIFAR10 in .*downloads nothing"),
        (
            {},
            {"NAME": "SVHN"},
            FileNotFoundError,
            r"SVHN\(.*, split='train', .* and .*split='test', download=True\) do",
        ),
        ({}, {"ROOT": ""}, FileNotFoundError, r"--data is not given"),
        ({}, {"ROOT": "nowhere"}, FileNotFoundError, r"--data is 'nowhere', but there is no such folder"),
    ],
)
def test_mistakes_are_named_with_their_remedy(tmp_path, splits, keys, error, message):
    write_tree(tmp_path, **splits)
    with pytest.raises(error, match=message):
        load_splits(config(tmp_path, **keys))


def test_images_beside_the_class_folders_are_no_class_folder(tmp_path):
    write_image(tmp_path / "train" / "1.png")
    with pytest.raises(ValueError, match="train has no folders"):
        load_splits(config(tmp_path))


@pytest.fixture
def tree_of_2000(tmp_path):
    """2,000 images to train on, all links to one file, and 2 to validate on."""
    write_tree(tmp_path, train={"a": 1, "b": 1}, val={"a": 1, "b": 1})
    for i in range(1, 1000):
        for name in ("a", "b"):
            (tmp_path / "train" / name / f"{i}.png").hardlink_to(tmp_path / "train" / name / "0.png")
    return tmp_path


def break_image(path, content=b"no image"):
    path.unlink()
    path.write_bytes(content)


def test_one_broken_image_in_1000_is_named_and_skipped_and_two_are_an_error(tree_of_2000, caplog):
    break_image(tree_of_2000 / "train/a/3.png")
    break_image(tree_of_2000 / "train/b/7.png")
    train, _ = build_datasets(config(tree_of_2000))
    assert "1 of at most 2" in caplog.text and "a/3.png" in caplog.text and "b/7.png" in caplog.text
    labels = [train[i][1] for i in range(len(train))]
    # The next image stands for a broken one.
    assert labels == [0] * 1000 + [1] * 1000
    assert len(caplog.records) == 2
    break_image(tree_of_2000 / "train/b/8.png")
    with pytest.raises(ValueError, match=r"b/8\.png.*broken image 3 of the 2000 of .*no more than 1 in 1000"):
        build_datasets(config(tree_of_2000))


def with_damaged_pixels(content):
    place = content.index(b"IDAT") + 20
    return content[:place] + bytes(8) + content[place + 8 :]


def test_an_image_that_breaks_midway_is_found_when_its_turn_comes(tree_of_2000, caplog):
    whole = (tree_of_2000 / "train/a/0.png").read_bytes()
    break_image(tree_of_2000 / "train/a/4.png", with_damaged_pixels(whole))
    train, _ = build_datasets(config(tree_of_2000))
    assert not caplog.records
    index = [path for path, _ in train.split.samples].index(str(tree_of_2000 / "train/a/4.png"))
    for _ in range(2):
        assert train[index][1] == 0
    assert len(caplog.records) == 1 and "a/4.png" in caplog.text


def test_broken_images_are_counted_across_the_loaders_processes(tree_of_2000):
    whole = (tree_of_2000 / "train/a/0.png").read_bytes()
    for i in range(4, 8):
        break_image(tree_of_2000 / f"train/a/{i}.png", with_damaged_pixels(whole))
    train, _ = build_datasets(config(tree_of_2000))
    train.transform = lambda image: torch.zeros(1)
    loader = torch.utils.data.DataLoader(train, batch_size=2, num_workers=2)
    # Each process meets two of them, which it alone would skip.
    with pytest.raises(ValueError, match="no more than 1 in 1000 may be skipped"):
        list(loader)


def test_broken_images_are_counted_across_processes():
    """Each of two has met one of 1000, which it alone may skip."""
    samples = [("nowhere.png", 0)] * 2 + [(Image.new("L", (3, 3)), 1)] * 998
    first, second = (LabelledImages(Split("here", ["a", "b"], samples), is_train=True) for _ in range(2))
    first.merge_broken([first.broken, second.broken])
    first._read(0)
    first.merge_broken([first.broken, second.broken])
    second._read(1)
    with pytest.raises(ValueError, match=r"2 of the 1000 images of here are .*: number 0, number 1\. Re"):
        first.merge_broken([first.broken, second.broken])


def test_a_broken_image_to_validate_on_has_no_label():
    samples = [("nowhere.png", 0)] + [(Image.new("L", (3, 3)), 1)] * 1999
    images = LabelledImages(Split("here", ["a", "b"], samples), is_train=False)
    assert images[0][1] == NO_LABEL and images[1][1] == 1


def test_images_are_upright_and_of_8_bits(tmp_path):
    """Files and images that are decoded already, in any of Pillow's modes."""
    grey = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(np.rot90(grey) * np.uint16(257)).save(tmp_path / "x.png", exif=exif)
    decoded = Image.open(tmp_path / "x.png")
    float_image = Image.fromarray(grey.astype(np.float32) / 255)
    samples = [(each, 0) for each in (str(tmp_path / "x.png"), decoded, float_image, Image.fromarray(grey))]
    for is_train in (True, False):
        images = LabelledImages(Split("here", ["a"], samples), is_train=is_train)
        for i in range(4):
            assert images[i][0].mode == "RGB"
            np.testing.assert_array_equal(images[i][0], np.repeat(grey[..., None], 3, axis=2))


def test_images_that_a_dataset_decodes_are_turned_once(tmp_path):
    """torchvision's datasets convert what they open, and do not turn it; Hugging Face's turn it."""
    grey = np.kron(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40, np.ones((8, 8), np.uint8))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    path = tmp_path / "x.jpg"
    Image.fromarray(np.rot90(grey)).save(path, exif=exif, quality=100)
    samples = [(Image.open(path).convert("RGB"), 0), (ImageOps.exif_transpose(Image.open(path)), 0), (str(path), 0)]
    images = LabelledImages(Split("here", ["a"], samples), is_train=False)
    for i in range(3):
        assert np.abs(np.asarray(images[i][0])[..., 0].astype(int) - grey).max() < 8


def test_an_image_whose_range_is_not_known_is_a_broken_one(caplog):
    samples = [(Image.fromarray(np.full((8, 8), 200, np.float32)), 0)] + [(Image.new("L", (8, 8)), 0)] * 999
    images = LabelledImages(Split("the table", ["a"], samples), is_train=False)
    assert images[0][1] == NO_LABEL
    assert "number 0 of the table" in caplog.text and "must be from 0 to 1" in caplog.text


@pytest.mark.parametrize("is_file", [True, False])
def test_the_range_of_greys_is_named_before_the_run(tmp_path, caplog, monkeypatch, is_file):
    """The processes of a loader do not."""
    monkeypatch.setattr("karat_det.data.images._named", set())
    caplog.set_level("INFO")
    grey = Image.fromarray(np.full((8, 8), 60000, np.uint16))
    if is_file:
        write_tree(tmp_path, train={"a": 3, "b": 3}, val={"a": 1, "b": 1})
        grey.save(tmp_path / "train" / "b" / "1.png")
        build_datasets(config(tmp_path))
    else:
        LabelledImages(Split("the table", ["a"], [(grey, 0)] * 3), is_train=True).open_all()
    assert caplog.text.count("0 to 65535 become 0 to 255") == 1


def test_greys_whose_range_is_not_known_end_the_run_before_it_starts(tmp_path):
    write_tree(tmp_path, train={"a": 3, "b": 3}, val={"a": 1, "b": 1})
    Image.fromarray(np.full((8, 8), 3000, np.uint16)).save(tmp_path / "train" / "b" / "1.png")
    with pytest.raises(ValueError, match=r"b/1\.png.*come out black.*no more than 1 in 1000"):
        build_datasets(config(tmp_path))


def test_a_row_without_an_image_is_a_broken_one(caplog):
    samples = [(Image.new("RGB", (8, 8)), 0)] * 1000
    samples[5] = None, 0
    images = LabelledImages(Split("the table", ["a"], samples), is_train=False)
    assert images[5][1] == NO_LABEL
    assert "Skipped, 1 of at most 1: Number 5 of the table has no image." in caplog.text


class _Lazy(Sequence):
    """Decodes as it is read, as a Hugging Face dataset does; the first cannot be."""

    def __len__(self):
        return 1000

    def __getitem__(self, index):
        return Image.new("RGB", (8, 8)) if index else Image.open(io.BytesIO(b"nothing")), 0


def test_the_first_of_images_that_decode_as_they_are_read_may_be_broken(caplog):
    images = LabelledImages(Split("the table", ["a"], _Lazy()), is_train=False)
    images.open_all()
    assert images[0][1] == NO_LABEL and images[1][1] == 0
    assert "Skipped, 1 of at most 1: Cannot read the image number 0 of the table" in caplog.text


@pytest.mark.parametrize("content", [b"P6\n4 x\n255\n", b"P6\n99999999999999 1\n255\n", b"P6\n4 4\n255\n.."])
def test_whatever_pillow_raises_is_a_broken_image(tree_of_2000, caplog, content):
    """For these ValueErrors, not OSErrors."""
    (tree_of_2000 / "train/a/4.png").unlink()
    (tree_of_2000 / "train/a/4.ppm").write_bytes(content)
    train, _ = build_datasets(config(tree_of_2000))
    index = [path for path, _ in train.split.samples].index(str(tree_of_2000 / "train/a/4.ppm"))
    assert train[index][1] in (0, 1)
    assert len(caplog.records) == 1 and "a/4.ppm" in caplog.text


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3000), st.data())
def test_no_more_than_one_in_1000_is_ever_skipped(total, data):
    broken = data.draw(st.sets(st.integers(0, total - 1), max_size=5))
    good = Image.new("RGB", (1, 1))
    samples = [("nowhere.png" if i in broken else good, 0) for i in range(total)]
    images = LabelledImages(Split("here", ["a"], samples), is_train=True)

    def read_all():
        return [images[i] for i in range(total)]

    if len(broken) * 1000 > total:
        with pytest.raises(ValueError, match="may be skipped"):
            read_all()
    else:
        assert len(read_all()) == total


def test_the_digits_are_made_where_they_are_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("karat_det.data.digits.NUM_CROPS", {"train": 60, "val": 50})
    train, val = load_splits(config(tmp_path, name="digits"))
    assert len(train.samples) == 60 and len(val.samples) == 50
    assert train.classes == list("0123456789")


def write_mnist(root, name):
    """MNIST's files: big-endian magic number and sizes, then bytes."""
    folder = root / name / "raw"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("t10k", 10)):
        images = struct.pack(">4I", 2051, count, 28, 28) + rng.integers(256, size=count * 784, dtype=np.uint8).tobytes()
        labels = struct.pack(">2I", 2049, count) + bytes(i % 10 for i in range(count))
        (folder / f"{split}-images-idx3-ubyte").write_bytes(images)
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(labels)


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
def test_a_dataset_of_grey_images_is_read_as_rgb(tmp_path, name):
    write_mnist(tmp_path, name)
    train, val = build_datasets(config(tmp_path, name=name, NUM_CLASSES=10))
    assert len(train) == 20 and len(val) == 10 and len(train.split.classes) == 10
    image, label = train[13]
    assert image.size == (28, 28) and image.mode == "RGB" and label == 3


@pytest.mark.parametrize("name", classification._TORCHVISION)
def test_torchvisions_datasets_take_the_arguments_that_they_get(tmp_path, name):
    """Each looks for its files and finds none: an argument that it does not know would be a TypeError."""
    with pytest.raises(FileNotFoundError, match=f"torchvision does not find {name} in "):
        load_splits(config(tmp_path, name=name))


def write_cifar10(root):
    """A CIFAR-10 of 10 images in each file; torchvision's own check of the files is by their sums."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        content = {"data": rng.integers(256, size=(10, 3072), dtype=np.uint8), "labels": list(range(10))}
        (folder / name).write_bytes(pickle.dumps(content))
    names = [f"class {i}" for i in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))


def test_a_torchvision_dataset_on_the_disk(tmp_path, monkeypatch):
    write_cifar10(tmp_path)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *arguments: True)
    train, val = build_datasets(config(tmp_path, name="CIFAR10", NUM_CLASSES=10))
    assert len(train) == 50 and len(val) == 10
    assert train.split.classes[3] == "class 3"
    image, label = train[13]
    assert image.size == (32, 32) and label == 3


class Table(list):
    """A split of a Hugging Face dataset, as far as it is used: rows by number, columns by name, and features."""

    def __init__(self, names, labels, images="Image"):
        super().__init__({"img": Image.new("L", (8, 8)), "label": label} for label in labels)
        label = types.SimpleNamespace(names=names) if names else types.SimpleNamespace(dtype="int64")
        self.features = {"img": type(images, (), {"decode": True})(), "label": label}

    def __getitem__(self, key):
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)


@pytest.fixture
def huggingface(monkeypatch):
    """Gives the package datasets something to load."""

    def give(loaded):
        module = types.ModuleType("datasets")
        module.load_from_disk = lambda root: loaded
        monkeypatch.setitem(sys.modules, "datasets", module)

    return give


def test_a_hugging_face_dataset_on_the_disk(tmp_path, huggingface):
    huggingface({"train": Table(["a", "b", "c"], [2, 0, 1]), "test": Table(["c", "a"], [0, 1])})
    train, val = build_datasets(config(tmp_path, name="huggingface", IMAGE_COLUMN="img"))
    assert [train[i][1] for i in range(3)] == [2, 0, 1]
    assert [val[i][1] for i in range(2)] == [2, 0]
    assert train[0][0].mode == "RGB"


@pytest.mark.parametrize(
    ("loaded", "keys", "message"),
    [
        ({"train": Table("ab", [0])}, {}, r"must have the splits train and val or .*but it has train\."),
        (Table("ab", [0]), {}, r"but it is a single split\."),
        ({"train": Table("ab", [0]), "val": Table("ab", [])}, {"IMAGE_COLUMN": "img"}, r"the split val of .*no image"),
        ({"train": Table("ab", [0]), "val": Table("ab", [0])}, {}, r"IMAGE_COLUMN is 'image'.*Its columns: img, label"),
        (
            {"train": Table(None, [0]), "val": Table("ab", [0])},
            {"IMAGE_COLUMN": "img"},
            r"class_encode_column",
        ),
        (
            {"train": Table("ab", [0], images="Value"), "val": Table("ab", [0])},
            {"IMAGE_COLUMN": "img"},
            r"IMAGE_COLUMN is 'img'.*are no images.*cast_column",
        ),
        (
            {"train": Table("abc", [0, 1]), "test": Table("abc", [0, 2])},
            {"IMAGE_COLUMN": "img"},
            r"the split test of .* has classes that the split train of .* has not: c\.",
        ),
        (
            {"train": Table("ab", [0]), "test": Table("ab", [-1, 1, -1])},
            {"IMAGE_COLUMN": "img"},
            r"2 of the 3 images of the split test of .*have no label \(-1",
        ),
    ],
)
def test_mistakes_of_hugging_face_datasets(tmp_path, huggingface, loaded, keys, message):
    huggingface(loaded)
    with pytest.raises(ValueError, match=message):
        load_splits(config(tmp_path, name="huggingface", **keys))


def test_hugging_faces_own_files(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    if not hasattr(datasets, "DatasetDict"):  # this project's folder of that name
        pytest.skip("the package datasets is not installed")
    rng = np.random.default_rng(0)

    def split(labels, names):
        images = [Image.fromarray(rng.integers(256, size=(9, 8, 3), dtype=np.uint8)) for _ in labels]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)

    def save(name, **splits):
        datasets.DatasetDict(splits).save_to_disk(str(tmp_path / name))
        return config(tmp_path / name, name="huggingface")

    train, val = build_datasets(save("good", train=split([2, 0, 1], ["a", "b", "c"]), test=split([0, 1], ["c", "a"])))
    assert [train[i][1] for i in range(3)] == [2, 0, 1]
    assert [val[i][1] for i in range(2)] == [2, 0]
    assert train[0][0].size == (8, 9) and train[0][0].mode == "RGB"
    labelled = split([0, 1], ["a", "b"])
    hidden = split([-1, 1], ["a", "b"])
    with pytest.raises(ValueError, match=r"1 of the 2 images .* have no label"):
        load_splits(save("hidden", train=labelled, test=hidden))
    encoded = labelled.cast_column("image", datasets.Image(decode=False))
    with pytest.raises(ValueError, match=r"are no images but Image\(.*decode=False.*cast_column"):
        load_splits(save("encoded", train=encoded, validation=labelled))
    with pytest.raises(ValueError, match=r"is not what datasets\.DatasetDict\.save_to_disk writes"):
        load_splits(config(tmp_path, name="huggingface"))


def test_a_missing_package_is_named_with_how_to_install_it(tmp_path, monkeypatch):
    # Where it is not installed, Python takes the folder datasets of this project for an empty package of that name.
    monkeypatch.setitem(sys.modules, "datasets", types.ModuleType("datasets"))
    with pytest.raises(ImportError, match=r"needs the package datasets.*pip install datasets"):
        load_splits(config(tmp_path, name="huggingface"))
