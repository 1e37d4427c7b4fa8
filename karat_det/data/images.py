"""The one reader of images, for training, evaluation, prediction and pretraining.

An image comes out upright, as its EXIF data says, and with 8 bits a channel. Files that
Detectron2 reads correctly give the same, bit for bit. Otherwise:

- Images of 16 bits are scaled by the range that their files declare, 0 to 65535 or less, and floating point greys from
  0 to 1. The log names the range once. An image of unknown range, or which would come out black, is refused.
- Every checksum of a PNG is compared. Pillow skips the checksum of the pixels and returns wrong pixels from a damaged
  file.
- Only files are opened: a FIFO would block, and a device may never end.
"""

import io
import logging
import multiprocessing
import os
import stat
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.utils.file_io import PathManager
from PIL import ExifTags, Image, ImageOps

logger = logging.getLogger(__name__)

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# A scaled image whose brightest pixel is below this, on a scale of 1, looks black: 12 bits stored as 16, for example.
_BLACK = 1 / 16
_TIFF_BITS_PER_SAMPLE, _TIFF_PHOTOMETRIC, _TIFF_WHITE_IS_ZERO = 258, 262, 0
# Kinds of grey images whose range this process has named already.
_named: set[str] = set()


def read_image(path: str, image_format: str) -> np.ndarray:
    """Reads an image, upright and with 8 bits a channel.

    Args:
        path: a file, or an address that Detectron2's PathManager opens.
        image_format: "RGB", "BGR", "L", or another that Detectron2's `read_image` takes.

    Returns:
        uint8 of shape (H, W, channels).

    Raises:
        OSError: it cannot be read, or is damaged, or its values have no known range; the message names it.
    """
    return convert_PIL_to_numpy(read_upright(path), image_format)


def read_upright(path: str) -> Image.Image:
    """As `read_image`, but returns Pillow's image, of a mode that it can convert to RGB."""
    with unreadable_image_named(path), open_image_file(path) as file:
        if file.read(len(PNG_SIGNATURE)) == PNG_SIGNATURE:
            file = io.BytesIO(_with_compared_checksums(file.read()))
        file.seek(0)
        return upright_8_bit(Image.open(file), path)


def upright_8_bit(image: Image.Image, name: str) -> Image.Image:
    """Turns an image upright and scales it to 8 bits a channel.

    Args:
        image: of any mode.
        name: the user's name for it, for the log.

    Raises:
        ValueError: its values have no known range, or come out black. Pillow may raise other errors.
    """
    # How the pixels are packed; Pillow itself keeps the upper 8 bits of colours of 16.
    of_16_bits = any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))
    # Before the EXIF data is read: Pillow may decode a PNG for it, and decodes only once, even if that fails.
    image.load()
    if is_deep(image):
        scaled = _scaled(image, name)
    else:
        if of_16_bits:
            _refuse_black(image, name)
        # Pillow converts these two to few others.
        through = {"La": "LA", "LAB": "RGB"}
        scaled = image.convert(through[image.mode]) if image.mode in through else image
    return _turned(scaled, orientation(image))


def is_deep(image: Image.Image) -> bool:
    """Whether an image is grey with more than 8 bits, or floating point."""
    return image.mode in ("I", "F") or image.mode.startswith("I;")


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of a loaded image, from 1 to 8; 1 where there is none that can be read, as in Detectron2.

    An image that is not loaded is not read further: the orientation is what has been read so far.
    """
    try:
        # Image's own method: a PNG's decodes the whole file, in case the orientation comes after the pixels.
        value = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # the kind of error depends on the file; damaged metadata does not make the pixels unusable
        return 1
    return value if value in range(1, 9) else 1


@contextmanager
def open_image_file(path: str) -> Iterator[BinaryIO]:
    """Opens a file, a link to one, or an address by Detectron2's PathManager.

    Raises:
        OSError: the path is anything else.
    """
    if "://" in path:
        with PathManager.open(path, "rb") as file:
            yield file
        return
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise OSError(f"it is {_kind(mode)}, not a file")
    with open(path, "rb") as file:
        yield file


@contextmanager
def unreadable_image_named(name: str) -> Iterator[None]:
    """Turns whatever Pillow raises for a missing, truncated or foreign file into an OSError that names it.

    A broken header may raise any error: ValueError, TypeError, zlib.error and others.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise OSError(
            f"Cannot read the image {name}: {type(error).__name__}: {error}. "
            "Replace the file, or take it out of the dataset."
        ) from error


def name_range_once(kind: str, message: str) -> None:
    """Logs how a kind of grey images is scaled, once a run and not in the processes of a data loader."""
    if kind not in _named and multiprocessing.parent_process() is None:
        _named.add(kind)
        logger.info(message)


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "something else")


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    """The image, turned by its EXIF orientation."""
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    return image.transpose(turns[orientation]) if orientation in turns else image


def _scaled(image: Image.Image, name: str) -> Image.Image:
    """Scales a grey image of more than 8 bits, or of floating point, to mode L."""
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    if image.mode == "F":
        kind, highest = "floating point", 1.0
    elif image.mode.startswith("I;"):
        bits = tags.get(_TIFF_BITS_PER_SAMPLE, (16,))[0]
        kind, highest = f"{bits}-bit", 2.0**bits - 1
    elif image.format in ("PNG", "PPM"):
        # Pillow scales a PPM to 16 bits, whatever range it declares.
        kind, highest = "16-bit", 65535.0
    else:
        raise ValueError(
            f"its pixels are signed or 32-bit whole numbers, here from {values.min()} to {values.max()}, of a range "
            "that is not known; save it with 8 bits, or with 16 unsigned ones from 0 to 65535"
        )
    lowest_held, highest_held = float(values.min()), float(values.max())
    held = f"{lowest_held:g} to {highest_held:g}"
    if not (lowest_held >= 0 and highest_held <= highest):
        raise ValueError(
            f"its pixels are {kind} grey values, which must be from 0 to {highest:g}, but are {held}; scale them, or "
            "save it with 8 bits"
        )
    if 0 < highest_held < _BLACK * highest:
        raise ValueError(
            f"its pixels are {kind} grey values from {held}; scaled from 0 to {highest:g}, it would come out black. "
            "Scale all images of the dataset alike, or save them with 8 bits"
        )
    name_range_once(
        f"{kind} {highest:g}",
        f"{kind[0].upper()}{kind[1:]} grey images: 0 to {highest:g} become 0 to 255. The first is {name}, which holds "
        f"{held}.",
    )
    scaled = Image.fromarray(np.rint(values * (255 / highest)).astype(np.uint8))
    if tags.get(_TIFF_PHOTOMETRIC) == _TIFF_WHITE_IS_ZERO:
        # Pillow inverts such images of 8 bits only.
        scaled = ImageOps.invert(scaled)
    return scaled


def _refuse_black(image: Image.Image, name: str) -> None:
    """Refuses an image of 16-bit channels whose upper 8 bits are black."""
    colors = [band.getextrema() for band, letter in zip(image.split(), image.getbands(), strict=True) if letter != "A"]
    if max(highest for _, highest in colors) < _BLACK * 256:
        raise ValueError(
            "its channels have 16 bits, of which the upper 8 are black; scale the values of all images of the dataset "
            "alike, or save them with 8 bits"
        )
    name_range_once(
        "16-bit colors", f"16-bit channels of colours: 0 to 65535 become 0 to 255. The first image is {name}."
    )


def _with_compared_checksums(chunks: bytes) -> bytes:
    """Checks the checksums of a PNG, given without its signature, and returns it with its pixels uncompressed.

    zlib inflates the pixels and compares their checksum here. They are stored uncompressed, so that Pillow does not
    inflate them a second time.

    Raises:
        ValueError: it is damaged or cut short.
    """
    view = memoryview(chunks)
    kept: list[bytes | memoryview] = [PNG_SIGNATURE]
    pixels = bytearray()
    place_of_pixels = 0
    start, kind = 0, b""
    while kind != b"IEND":
        length, kind = _chunk_header(view[start : start + 8])
        end = start + 8 + length
        if end + 4 > len(view):
            raise ValueError("the PNG is cut short")
        if zlib.crc32(view[start + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            raise ValueError(f"the PNG is damaged: the checksum of a chunk {kind!r} is wrong")
        if kind == b"IDAT":
            place_of_pixels = place_of_pixels or len(kept)
            pixels += view[start + 8 : end]
        else:
            kept.append(view[start : end + 4])
        start = end + 4
    if place_of_pixels:
        stored = zlib.compress(_inflated(pixels, bytes(view[8:21])), 0)
        checksum = zlib.crc32(stored, zlib.crc32(b"IDAT"))
        kept[place_of_pixels:place_of_pixels] = (
            *(struct.pack(">I", len(stored)), b"IDAT", stored),
            struct.pack(">I", checksum),
        )
    return b"".join(kept)


def _chunk_header(header: memoryview) -> tuple[int, bytes]:
    if len(header) < 8:
        raise ValueError("the PNG is cut short")
    return int.from_bytes(header[:4], "big"), bytes(header[4:8])


def _inflated(pixels: bytearray, header: bytes) -> bytes:
    """The rows of a PNG, each after the number of its filter, from its IDAT chunks and its IHDR chunk's content."""
    width, height, bits, color_type = struct.unpack(">IIBB", header[:10])
    channels = {2: 3, 4: 2, 6: 4}.get(color_type, 1)
    # Interlaced images have more rows, which are shorter.
    at_most = 2 * height * (1 + (width * bits * channels + 7) // 8) + 1024
    if width * height > 2 * (Image.MAX_IMAGE_PIXELS or float("inf")):
        raise Image.DecompressionBombError(f"{width} × {height} pixels are more than Pillow takes")
    inflater = zlib.decompressobj()
    rows = inflater.decompress(pixels, at_most)
    if not inflater.eof:
        # All rows may be inflated, but the checksum after them not yet compared.
        inflater.decompress(inflater.unconsumed_tail, 1)
    if not inflater.eof:
        raise ValueError("the PNG's pixels are cut short, or more than it declares")
    return rows
