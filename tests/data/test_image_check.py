"""The check of images: headers that agree with the reader, one report, a result that is kept as long as it is true."""

import json
import os
import struct
import zlib

import numpy as np
import pytest
from detectron2.utils import comm
from PIL import ExifTags, Image, PngImagePlugin

from karat_det.data import image_check, images
from karat_det.data.image_check import NUM_SAMPLED, check_images, read_headers
from karat_det.data.images import read_upright


@pytest.fixture(autouse=True)
def nothing_named(monkeypatch):
    monkeypatch.setattr(images, "_named", set())


@pytest.fixture
def records(tmp_path):
    """Records of 40 images of 8 × 6, and a JSON that nobody reads."""
    (tmp_path / "data.json").write_text("{}")
    (tmp_path / "images").mkdir()
    paths = [tmp_path / "images" / f"{i}.png" for i in range(40)]
    for i, path in enumerate(paths):
        Image.new("RGB", (8, 6), (i, i, i)).save(path)
    return [{"file_name": str(path), "width": 8, "height": 6} for path in paths]


def check(records, tmp_path):
    check_images(records, "data.json (dataset 'mine')", str(tmp_path / "data.json"), "Correct the keys.")


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def orientation_6():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return exif


XMP = b"XML:com.adobe.xmp\0\0\0\0\0" + b'<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="6"/>'
BEHIND = {
    "nothing": b"",
    "a date": chunk(b"tEXt", b"date:create\0IDAT 2026"),
    "EXIF": chunk(b"eXIf", orientation_6().tobytes()[6:]),
    "EXIF with a large thumbnail": chunk(b"eXIf", orientation_6().tobytes()[6:] + bytes(100_000)),
    "XMP": chunk(b"iTXt", XMP),
}


@pytest.mark.parametrize("behind", BEHIND)
@pytest.mark.parametrize("pixels", ["few", "in chunks of 8 KB", "in one chunk"])
def test_the_header_of_a_png_tells_the_size_that_the_reader_gives(tmp_path, monkeypatch, behind, pixels):
    noise = np.random.default_rng(0).integers(256, size=(300, 200, 3), dtype=np.uint8)
    size = 20 if pixels == "few" else 300
    rows = b"".join(b"\0" + row.tobytes() for row in noise[:size])
    data = zlib.compress(rows)
    step = 8192 if pixels == "in chunks of 8 KB" else len(data)
    content = chunk(b"IHDR", struct.pack(">IIBBBBB", 200, size, 8, 2, 0, 0, 0))
    content += b"".join(chunk(b"IDAT", data[i : i + step]) for i in range(0, len(data), step))
    path = tmp_path / "x.png"
    path.write_bytes(images.PNG_SIGNATURE + content + BEHIND[behind] + chunk(b"IEND", b""))
    right = read_upright(str(path)).size
    assert right == ((200, size) if behind in ("nothing", "a date") else (size, 200))
    if behind != "XMP":
        monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: pytest.fail("decodes the pixels"))
    (header,) = read_headers([str(path)])
    assert (header.width, header.height) == right


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp", "gif", "bmp"])
def test_the_header_tells_the_size_that_the_reader_gives(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = str(tmp_path / f"x.{suffix}")
    Image.new("RGB", (7, 5)).save(path, exif=exif)
    (header,) = read_headers([path])
    assert (header.width, header.height) == read_upright(path).size and not header.deep


def test_headers_come_in_order_with_errors_that_name_the_file(records, tmp_path):
    paths = [record["file_name"] for record in records] * 20
    with open(paths[3], "w") as file:
        file.write("no image")
    headers = read_headers(paths)
    assert len(headers) == 800
    for i, header in enumerate(headers):
        assert ("3.png" in str(header)) if i % 40 == 3 else header == (8, 6, "")


def test_all_that_is_wrong_is_in_one_report(records, tmp_path):
    folder = tmp_path / "images"
    for i in range(8):
        (folder / f"{i}.png").unlink()
    (folder / "8.png").write_text("no image")
    os.mkfifo(folder / "fifo.png")
    (folder / "loop.png").symlink_to("loop.png")
    records[9]["file_name"], records[10]["file_name"] = str(folder / "fifo.png"), str(folder / "loop.png")
    for i in range(11, 40):
        records[i]["width"] = 9
    with pytest.raises(FileNotFoundError) as caught:
        check(records, tmp_path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 20
    assert "8 of the 40 images of data.json (dataset 'mine') do not exist" in lines[0]
    assert "images/0.png" in lines[0] and "images/4.png, …" in lines[0] and "images/5.png" not in lines[0]
    assert lines[1] == "32 of the 40 images of data.json (dataset 'mine') cannot be used:"
    assert "images/8.png" in lines[2] and "a FIFO, not a file" in lines[3] and "symbolic links" in lines[4]
    assert "images/11.png has 8 × 6 pixels" in lines[5] and "for 9 × 6" in lines[5]
    assert lines[-1] == "… and 15 more."


def test_names_as_windows_has_them_are_told_what_is_wrong(records, tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        check([*records, {"file_name": str(tmp_path / "none.png")}], tmp_path)
    assert "Windows" not in str(caught.value)
    records[0]["file_name"] = str(tmp_path / "images\\0.png")
    with pytest.raises(FileNotFoundError, match=r"images\\0\.png\. .* A path has / between its folders here, not"):
        check(records, tmp_path)


def test_where_not_all_are_needed_one_that_can_be_used_is_enough(records, tmp_path):
    for record in records[1:]:
        record["width"] = 9
    check_images(records, "mine", None, "", all_needed=False)
    records[0]["file_name"] += "x"
    with pytest.raises(FileNotFoundError, match=r"1 of the 40 images.*0\.pngx"):
        check_images(records, "mine", None, "", all_needed=False)


def test_a_missing_folder_is_named_with_the_remedy(records, tmp_path):
    records[0]["file_name"] = str(tmp_path / "nowhere" / "0.png")
    with pytest.raises(FileNotFoundError, match=rf"There is no folder {tmp_path}/nowhere\. Correct the keys\."):
        check(records, tmp_path)


@pytest.mark.parametrize("name", ["a\0.png", "\ud800.png", "0.png/1.png", "x" * 300, ""])
def test_names_that_no_file_can_have_are_named(records, tmp_path, name):
    records[5]["file_name"] = str(tmp_path / "images") + "/" + name
    with pytest.raises(OSError, match=r"(?s)1 of the 40 images.*Cannot read the image .*/images/") as caught:
        check(records, tmp_path)
    assert name in str(caught.value)


def test_images_behind_addresses_are_left_out(records, tmp_path):
    check([*records, {"file_name": "https://here/1.png", "width": 1, "height": 1}], tmp_path)


def flip_a_byte_of_the_pixels(path):
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 12] ^= 255
    path.write_bytes(bytes(content))


def test_the_pixels_of_a_sample_are_read_and_those_of_a_small_dataset(records, tmp_path, monkeypatch):
    flip_a_byte_of_the_pixels(tmp_path / "images" / "17.png")
    with pytest.raises(OSError, match=r"(?s)1 of the 40 images.*images/17\.png.*damaged"):
        check(records, tmp_path)
    assert len(image_check.spread(list(range(100_000)), NUM_SAMPLED)) == NUM_SAMPLED
    assert image_check.spread(list(range(5)), NUM_SAMPLED) == list(range(5))
    monkeypatch.setattr(image_check, "NUM_SAMPLED", 2)
    check(records, tmp_path)


@pytest.fixture
def opened(monkeypatch):
    """The files whose headers are read."""
    paths = []
    original = image_check._header_or_error
    monkeypatch.setattr(image_check, "_header_or_error", lambda path: paths.append(path) or original(path))
    return paths


def replace_with_the_same_times(path, image):
    state = os.stat(path)
    image.save(path)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


@pytest.mark.parametrize(
    "change",
    [
        lambda records, path: replace_with_the_same_times(path, Image.new("RGB", (6, 8), (5, 5, 5))),
        lambda records, path: os.remove(path),
        lambda records, path: records[5].update(width=9),
        lambda records, path: (os.remove(path), os.mkfifo(path)),
    ],
    ids=["image", "missing", "size in the JSON", "FIFO"],
)
def test_what_was_found_good_is_kept_until_it_changes(records, tmp_path, opened, change):
    check(records, tmp_path)
    assert len(opened) == 40
    check(records, tmp_path)
    assert len(opened) == 40
    change(records, records[5]["file_name"])
    for _ in range(2):
        with pytest.raises((OSError, ValueError), match=r"images/5\.png"):
            check(records, tmp_path)
    assert len(opened) > 100


def test_more_images_are_checked_anew_and_what_was_found_bad_is_not_kept(records, tmp_path, opened):
    check(records[:20], tmp_path)
    records[30]["height"] = 7
    for _ in range(2):
        with pytest.raises(ValueError, match=r"images/30\.png"):
            check(records, tmp_path)
    records[30]["height"] = 6
    check(records, tmp_path)
    assert len(opened) == 20 + 3 * 40


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"version": 1}', '{"version": 0, "digest": "x", "deep": []}', "\udcff"]
)
def test_a_kept_result_that_cannot_be_believed_is_made_anew(records, tmp_path, opened, content):
    check(records, tmp_path)
    kept = tmp_path / "data.json.images-checked"
    whole = kept.read_text()
    kept.write_bytes(content.encode(errors="surrogateescape"))
    check(records, tmp_path)
    assert len(opened) == 80 and kept.read_text() == whole
    kept.write_text(json.dumps({**json.loads(whole), "version": 99}))
    check(records, tmp_path)
    assert len(opened) == 120


def test_where_nothing_can_be_written_the_check_goes_on(records, tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "data.json.images-checked").mkdir()
    check(records, tmp_path)
    assert "The result is not kept" in caplog.text
    check_images(records, "mine", str(tmp_path / "nowhere" / "data.json"), "")
    check_images(records, "mine", None, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.json", "data.json.images-checked", "images"]


def test_the_range_of_greys_is_named_in_each_run(records, tmp_path, caplog, monkeypatch, opened):
    caplog.set_level("INFO")
    Image.fromarray(np.full((6, 8), 60000, np.uint16)).save(records[25]["file_name"])
    check(records, tmp_path)
    assert caplog.text.count("0 to 65535 become 0 to 255") == 1
    monkeypatch.setattr(images, "_named", set())
    check(records, tmp_path)
    assert caplog.text.count("0 to 65535 become 0 to 255") == 2 and len(opened) == 40


def test_of_several_processes_one_looks_and_all_raise(records, tmp_path, monkeypatch, opened):
    records[3]["width"] = 9
    gathered = []
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(comm, "get_local_rank", lambda: 0)
    monkeypatch.setattr(comm, "all_gather", lambda found: gathered.append(found) or [found, []])
    with pytest.raises(ValueError, match=r"images/3\.png"):
        check(records, tmp_path)
    assert len(opened) == 40
    monkeypatch.setattr(comm, "get_local_rank", lambda: 1)
    monkeypatch.setattr(comm, "all_gather", lambda found: [*gathered, found])
    with pytest.raises(ValueError, match=r"images/3\.png"):
        check(records, tmp_path)
    assert len(opened) == 40
