"""The reader of images: as Detectron2's where that reads rightly; greys scaled; damage and what is no file named."""

import logging
import os
import random
import socket
import struct
import zlib

import numpy as np
import pytest
from detectron2.data import detection_utils
from PIL import ExifTags, Image

from karat_det.data import images
from karat_det.data.images import read_image, read_upright


@pytest.fixture(autouse=True)
def nothing_named(monkeypatch):
    monkeypatch.setattr(images, "_named", set())


def photo(height=30, width=40):
    """Smooth colours with a noisy patch: a PNG of several kinds of deflate blocks and filters."""
    pixels = (np.add.outer(np.arange(height), np.arange(width))[..., None] * [1, 2, 3] % 256).astype(np.uint8)
    pixels[5:20, 10:30] = np.random.default_rng(0).integers(256, size=(15, 20, 3))
    return pixels


def save(path, image, **options):
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return str(path)


@pytest.mark.parametrize("image_format", ["RGB", "BGR", "L"])
@pytest.mark.parametrize(
    "name, mode",
    [(f"x.{suffix}", mode) for suffix in ("png", "tif") for mode in ("1", "L", "LA", "P", "RGB", "RGBA")]
    + [("x.jpg", mode) for mode in ("L", "RGB", "CMYK", "YCbCr")]
    + [("x.tif", "CMYK"), ("x.webp", "RGB"), ("x.bmp", "RGB"), ("x.gif", "P"), ("x.ppm", "RGB")],
)
def test_eight_bit_images_are_read_as_detectron2_reads_them(tmp_path, name, mode, image_format):
    path = save(tmp_path / name, Image.fromarray(photo()).convert(mode))
    np.testing.assert_array_equal(read_image(path, image_format), detection_utils.read_image(path, image_format))


@pytest.mark.parametrize("image_format", ["RGB", "L"])
def test_lab_colours_are_converted(tmp_path, image_format):
    path = save(tmp_path / "x.tif", Image.new("LAB", (4, 3), (128, 128, 128)))
    # Half the lightness is a grey of 119 in sRGB.
    assert np.abs(read_image(path, image_format).astype(int) - 119).max() <= 2


@pytest.mark.parametrize("mode, transparent", [("RGB", (0, 0, 0)), ("P", 0), ("P", bytes(range(256))), ("L", 0)])
def test_transparent_colours_are_read_as_detectron2_reads_them(tmp_path, mode, transparent):
    path = save(tmp_path / "x.png", Image.fromarray(photo()).convert(mode), transparency=transparent)
    np.testing.assert_array_equal(read_image(path, "BGR"), detection_utils.read_image(path, "BGR"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
def test_images_come_out_upright(tmp_path, suffix, orientation):
    upright = Image.fromarray(np.kron(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40, np.ones((8, 8), np.uint8)))
    # How a camera held so would store it: the inverse of what its reader does.
    inverse = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = upright.transpose(Image.Transpose(inverse[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = save(tmp_path / f"x.{suffix}", stored, exif=exif)
    difference = np.asarray(read_upright(path).convert("L")).astype(int) - np.asarray(upright)
    assert np.abs(difference).max() <= 12


def test_damaged_exif_data_costs_nobody_the_pixels(tmp_path):
    path = save(tmp_path / "x.jpg", photo(), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12\0\x03")
    assert read_image(path, "RGB").shape == (30, 40, 3)


GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)


def tiff_of_12_bits(path, values):
    """A TIFF as microscopes write it: three bytes for two pixels."""
    pairs = values.reshape(-1, 2).astype(int)
    packed = bytes(byte for a, b in pairs for byte in (a >> 4, (a & 15) << 4 | b >> 8, b & 255))
    height, width = values.shape
    tags = {256: width, 257: height, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(packed)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    header = b"II*\0" + struct.pack("<I", 8 + len(packed))
    path.write_bytes(header + packed + struct.pack("<H", len(tags)) + entries + bytes(4))
    return str(path)


@pytest.mark.parametrize(
    "name, image, options",
    [
        ("x.png", Image.fromarray(GREY * np.uint16(257)), {}),
        ("x.tif", Image.fromarray(GREY * np.uint16(257)), {}),
        ("x.pgm", Image.fromarray(GREY * np.uint16(257)), {}),
        ("x.tif", Image.fromarray((GREY * np.uint16(257)).astype(">u2")), {}),
        ("x.tif", Image.fromarray((255 - GREY) * np.uint16(257)), {"tiffinfo": {262: 0}}),
        ("x.tif", Image.fromarray(GREY.astype(np.float32) / 255), {}),
    ],
    ids=["png", "tiff", "pgm", "tiff of a Mac", "tiff, white is zero", "floats"],
)
@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_greys_of_more_than_eight_bits_are_scaled_and_their_range_is_named_once(
    tmp_path, caplog, name, image, options, image_format
):
    caplog.set_level(logging.INFO)
    path = save(tmp_path / name, image, **options)
    for _ in range(2):
        np.testing.assert_array_equal(read_image(path, image_format), np.repeat(GREY[..., None], 3, axis=2))
    assert len(caplog.records) == 1
    highest = "1" if image.mode == "F" else "65535"
    assert f"0 to {highest} become 0 to 255. The first is {path}," in caplog.text


def test_a_tiff_of_12_bits_is_scaled_by_them(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    values = np.arange(256, dtype=np.uint16).reshape(16, 16) * 16
    path = tiff_of_12_bits(tmp_path / "x.tif", values)
    np.testing.assert_array_equal(read_image(path, "L")[..., 0], np.rint(values * (255 / 4095)).astype(np.uint8))
    assert "0 to 4095 become 0 to 255" in caplog.text


@pytest.mark.parametrize(
    "values, message",
    [
        (GREY * np.uint16(16), r"from 0 to 4080.*come out black.*save"),
        (GREY.astype(np.uint16), r"from 0 to 255.*come out black"),
        (GREY.astype(np.float32), r"must be from 0 to 1, but are 0 to 255"),
        (-GREY.astype(np.float32) / 255, r"must be from 0 to 1, but are -1 to"),
        (np.where(GREY == 7, np.nan, 0.5).astype(np.float32), r"must be from 0 to 1, but are nan"),
        (np.where(GREY == 7, np.inf, 0.5).astype(np.float32), r"must be from 0 to 1, but are 0.5 to inf"),
        (GREY.astype(np.float32) / 1e6, r"come out black"),
        (GREY.astype(np.int32) * 1000, r"from 0 to 255000, of a range that is not known"),
    ],
    ids=["12 of 16 bits", "8 of 16 bits", "floats to 255", "negative", "nan", "inf", "faint", "32 bits"],
)
def test_greys_whose_range_is_not_known_are_refused_by_name(tmp_path, values, message):
    path = save(tmp_path / "x.tif", values)
    with pytest.raises(OSError, match=rf"Cannot read the image .*x\.tif.*{message}"):
        read_image(path, "RGB")


@pytest.mark.parametrize("color_type, channels", [(2, 3), (4, 2), (6, 4)], ids=["RGB", "LA", "RGBA"])
@pytest.mark.parametrize("highest", [65535, 4095, 255])
def test_colours_of_16_bits_are_scaled_or_refused(tmp_path, caplog, color_type, channels, highest):
    caplog.set_level(logging.INFO)
    values = np.random.default_rng(0).integers(highest + 1, size=(9, 8, channels), dtype=np.uint16)
    if channels != 3:
        values[..., -1] = 65535
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    path = tmp_path / "x.png"
    header = struct.pack(">IIBBBBB", 8, 9, 16, color_type, 0, 0, 0)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    path.write_bytes(images.PNG_SIGNATURE + b"".join(chunks))
    if highest < 65535:
        with pytest.raises(OSError, match=r"x\.png.*16 bits, of which the upper 8 are black"):
            read_image(str(path), "RGB")
        return
    np.testing.assert_array_equal(read_image(str(path), "RGB")[..., 0], values[..., 0] >> 8)
    np.testing.assert_array_equal(read_image(str(path), "BGR"), detection_utils.read_image(str(path), "BGR"))
    assert caplog.text.count("0 to 65535 become 0 to 255") == 1


def test_a_black_image_of_16_bits_is_black(tmp_path):
    assert not read_image(save(tmp_path / "x.png", np.zeros((4, 4), np.uint16)), "RGB").any()


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def chunks_of(png):
    start = 8
    while start < len(png):
        (length,) = struct.unpack(">I", png[start : start + 4])
        yield start, png[start + 4 : start + 8], length
        start += 12 + length


def with_checksums(png):
    """The PNG with checksums of its chunks that are right for what they hold."""
    png = bytearray(png)
    for start, _, length in list(chunks_of(png)):
        end = start + 8 + length
        png[end : end + 4] = zlib.crc32(png[start + 4 : end]).to_bytes(4, "big")
    return bytes(png)


def damages(png, rng):
    """One damaged copy of a PNG of each kind."""
    place, value = rng.randrange(len(png)), rng.randrange(1, 256)
    flipped = bytearray(png)
    flipped[place] ^= value
    yield bytes(flipped)
    yield png[:place]
    yield png[:place] + png[place + value :]
    yield png[:place] + bytes(rng.randrange(256) for _ in range(value)) + png[place:]
    zeroed = bytearray(png)
    zeroed[place : place + value] = bytes(min(value, len(png) - place))
    yield bytes(zeroed)
    start, length = next((start, length) for start, kind, length in chunks_of(png) if kind == b"IDAT")
    inside = bytearray(png)
    inside[start + 8 + rng.randrange(length)] ^= value
    yield bytes(inside)
    # As of a program that damages the pixels before it writes them.
    yield with_checksums(inside)
    crc = bytearray(png)
    crc[start + 8 + length + rng.randrange(4)] ^= value
    yield bytes(crc)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "LA", "1", "I;16"])
@pytest.mark.parametrize("behind", [False, True], ids=["", "EXIF behind the pixels"])
def test_a_damaged_png_is_named_and_never_read_with_other_pixels(tmp_path, mode, behind):
    image = Image.fromarray(GREY * np.uint16(257)) if mode == "I;16" else Image.fromarray(photo()).convert(mode)
    path = tmp_path / "x.png"
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    save(path, image, exif=exif)
    if behind:
        png = path.read_bytes()
        start, length = next((start, length) for start, kind, length in chunks_of(png) if kind == b"eXIf")
        path.write_bytes(png[:start] + png[start + 12 + length : -12] + png[start : start + 12 + length] + png[-12:])
    whole, right = path.read_bytes(), read_image(str(path), "BGR")
    assert right.shape[:2] == (image.width, image.height)
    named = 0
    for seed in range(40):
        for damaged in damages(whole, random.Random(seed)):
            path.write_bytes(damaged)
            try:
                np.testing.assert_array_equal(read_image(str(path), "BGR"), right)
            except OSError as error:
                assert str(path) in str(error)
                named += 1
    assert named > 250


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "webp", "bmp", "tif", "ppm"])
def test_a_file_that_is_cut_short_is_named(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    save(path, photo())
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(OSError, match=rf"x\.{suffix}"):
        read_image(str(path), "RGB")


def test_a_png_that_inflates_to_more_than_it_declares_is_named(tmp_path):
    header = struct.pack(">IIBBBBB", 4, 4, 8, 0, 0, 0, 0)
    bomb = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10**8))) + chunk(b"IEND", b"")
    path = tmp_path / "bomb.png"
    path.write_bytes(images.PNG_SIGNATURE + bomb)
    with pytest.raises(OSError, match=r"bomb\.png.*more than it declares"):
        read_image(str(path), "RGB")


def test_what_is_no_file_is_named_in_a_moment(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "dangling.png").symlink_to("nowhere.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        place = os.getcwd()
        os.chdir(tmp_path)  # a socket's path is short
        server.bind("socket.png")
        os.chdir(place)
        for name, message in {
            "fifo": "a FIFO, not a file",
            "folder": "a folder, not a file",
            "loop": "symbolic links",
            "dangling": "No such file",
            "device": "a device, not a file",
            "socket": "a socket, not a file",
        }.items():
            with pytest.raises(OSError, match=rf"{name}\.png.*{message}"):
                read_image(str(tmp_path / f"{name}.png"), "RGB")


def test_a_link_to_a_file_is_read(tmp_path):
    save(tmp_path / "x.png", photo())
    (tmp_path / "link.png").symlink_to("x.png")
    np.testing.assert_array_equal(read_image(str(tmp_path / "link.png"), "RGB"), photo())
