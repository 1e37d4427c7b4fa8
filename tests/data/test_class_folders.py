"""Class folders: torchvision's classes, images and order; hidden folders, other files and loops are left out."""

import os

import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from karat_det.data.class_folders import find_labelled_images


@pytest.fixture
def folder(tmp_path):
    """Three classes, one of them with folders in it."""
    for name in ("a/1.png", "a/10.JPG", "a/2.png", "b/deep/er/1.png", "b/deep-1/1.png", "b/deep/0.webp", "B/1.png"):
        path = tmp_path / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
    return tmp_path / "train"


def test_classes_and_images_are_those_of_torchvision_in_its_order(folder, caplog):
    expected = ImageFolder(str(folder))
    assert find_labelled_images(folder) == (expected.classes, expected.samples)
    assert not caplog.records


def test_what_is_no_class_or_image_is_left_out_and_counted(folder, caplog):
    expected = find_labelled_images(folder)
    for name in (".git/1.png", ".ipynb_checkpoints/1.png", "a/.ipynb_checkpoints/1.png", "a/._1.png", ".DS_Store"):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    for i in range(5):
        (folder / "b" / f"notes{i}.txt").write_text("")
    (folder / "list.csv").write_text("")
    os.mkfifo(folder / "a" / "fifo.png")
    assert find_labelled_images(folder) == expected
    assert len(caplog.records) == 1
    for part in (
        f"Left out 12 files and folders of {folder}: ",
        "5 hidden (.DS_Store, .git, .ipynb_checkpoints, …)",
        "5 of other kinds (b/notes0.txt, b/notes1.txt, b/notes2.txt, …)",
        "1 beside the class folders (list.csv)",
        "1 no files, but FIFOs, sockets or devices (a/fifo.png)",
    ):
        assert part in caplog.text


@pytest.mark.parametrize(
    "link, target",
    [
        ("a/self.png", "self.png"),
        ("a/self", "self"),
        ("a/here", "."),
        ("a/train", ".."),
        ("a/all", "../.."),
        ("c", "."),
        ("b/deep/er/up", "../.."),
        ("a/one/two", "../one"),
    ],
)
def test_links_that_lead_back_are_left_out(folder, caplog, link, target):
    expected = find_labelled_images(folder)
    path = folder / link
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(target)
    assert find_labelled_images(folder) == expected
    assert f"links that lead back ({link})" in caplog.text


def test_a_loop_of_links_at_the_top_is_no_class(folder, caplog):
    expected = find_labelled_images(folder)
    (folder / "d").symlink_to("e")
    (folder / "e").symlink_to("d")
    assert find_labelled_images(folder) == expected
    assert "Left out 2 files" in caplog.text


def test_links_to_images_and_folders_elsewhere_are_followed(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "elsewhere" / "7.png")
    (folder / "a" / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "a" / "8.png").symlink_to(tmp_path / "elsewhere" / "7.png")
    (folder / "c").symlink_to(tmp_path / "elsewhere")
    expected = ImageFolder(str(folder))
    assert find_labelled_images(folder) == (expected.classes, expected.samples)


def test_a_link_to_nothing_is_an_image_that_cannot_be_read(folder):
    (folder / "a" / "3.png").symlink_to("nowhere.png")
    assert (str(folder / "a" / "3.png"), 1) in find_labelled_images(folder)[1]
