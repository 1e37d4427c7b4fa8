"""The check of a dataset's images before a run: the header of each, and the pixels of some.

A header shows whether the file is an image, and its size; reading it takes some 0.06 ms on a local disk. A PNG may give
its orientation after its pixels. So its end is read too, and not all of it, as Pillow would. A file beside the JSON of
the dataset keeps which images were good, until an image, or its size in the JSON, changes.

Threads, not processes: files are opened and pixels decoded without Python's lock, and a process would first import
PyTorch for seconds, since it runs the head of the program that starts it.
"""

import contextlib
import hashlib
import json
import logging
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, NamedTuple, TypeVar

from detectron2.utils import comm
from PIL import Image
from tqdm import tqdm

from .images import is_deep, open_image_file, orientation, read_upright, unreadable_image_named

logger = logging.getLogger(__name__)

# How many images have their pixels read, of usual images and of each kind of greys of more than 8 bits.
NUM_SAMPLED = 256
# Lines of a report, and names of missing files in it.
_MAX_LINES = 20
_MAX_NAMES = 5
# More than the cores, since network storage is mostly waiting.
_NUM_THREADS = 16
# Pixels of all images that are decoded at once: some 2 GB.
_PIXELS_AT_ONCE = 1 << 28
_CHUNK = 200
# Bytes at the end of a PNG in which to look for its last IDAT chunk.
_TAIL = 1 << 16
# Version of the files of kept results.
_VERSION = 1

_Given = TypeVar("_Given")
_Found = TypeVar("_Found")


class Header(NamedTuple):
    """The content of an image's header.

    Attributes:
        width, height: in pixels, upright.
        deep: Pillow's mode, if it is a grey image of more than 8 bits, else "".
    """

    width: int
    height: int
    deep: str


class _Problem(NamedTuple):
    error: type[Exception]
    message: str


def check_images(
    records: Sequence[dict[str, Any]], source: str, json_file: str | None, hint: str, all_needed: bool = True
) -> None:
    """Checks that each image of a dataset exists, is an image and has the size of its record.

    It also reads the pixels of NUM_SAMPLED of them, and of as many of each kind of greys of more than 8 bits. One
    process a machine does this, and all raise its error. Images behind addresses ("://") are left out.

    Args:
        records: Detectron2's dataset dicts.
        source: the user's name for the dataset.
        json_file: its annotations, beside which the result is kept; None keeps none.
        hint: what to do where a folder of images is missing.
        all_needed: whether one unusable image is an error; else only a dataset without a usable one is.

    Raises:
        FileNotFoundError: some do not exist.
        OSError: some cannot be read.
        ValueError: some have another size than their records. Each error names all faults, in 20 lines at most.
    """
    alone = comm.get_world_size() == 1
    found = _problems(records, json_file) if alone or comm.get_local_rank() == 0 else []
    problems = found if alone else next(filter(None, comm.all_gather(found)), [])
    if len(problems) >= (1 if all_needed else max(1, len(records))):
        kinds = [each.error for each in problems]
        kind = next(error for error in (FileNotFoundError, OSError, ValueError) if error in kinds)
        raise kind(_report(problems, len(records), source, hint))


def read_headers(paths: Sequence[str]) -> list[Header | OSError]:
    """Reads the headers of images, or the errors that reading them raises; with a progress bar if that takes long.

    No pixels are decoded.
    """
    return list(_in_threads(_header_or_error, paths, "Checking images"))


def _problems(records: Sequence[dict[str, Any]], json_file: str | None) -> list[_Problem]:
    start = time.monotonic()
    records = [record for record in records if "://" not in record["file_name"]]
    paths = [record["file_name"] for record in records]
    states = list(_in_threads(_state, paths, "Looking for images"))
    missing = [path for path, state in zip(paths, states, strict=True) if isinstance(state, FileNotFoundError)]
    problems = [_Problem(FileNotFoundError, path) for path in missing]
    digest = "" if missing else _digest(records, states)
    kept = _read_kept(json_file, digest)
    if kept is not None:
        # Reading them logs the ranges of their greys.
        return [_Problem(OSError, str(error)) for error in map(_pixel_error, kept) if error]

    there = [record for record, state in zip(records, states, strict=True) if not isinstance(state, FileNotFoundError)]
    headers = read_headers([record["file_name"] for record in there])
    good: list[str] = []
    deep: dict[str, list[str]] = {}
    for record, header in zip(there, headers, strict=True):
        if isinstance(header, OSError):
            problems.append(_Problem(OSError, str(header)))
        elif (width_height := header[:2]) != (given := _size_in(record, header)):
            problems.append(_Problem(ValueError, _other_size(record["file_name"], width_height, given)))
        else:
            (deep.setdefault(header.deep, []) if header.deep else good).append(record["file_name"])
    sampled = [path for group in (good, *deep.values()) for path in spread(group, NUM_SAMPLED)]
    largest = max((header.width * header.height for header in headers if isinstance(header, Header)), default=1)
    threads = max(1, min(_NUM_THREADS, os.cpu_count() or 1, _PIXELS_AT_ONCE // max(1, largest)))
    for error in _in_threads(_pixel_error, sampled, "Reading images", chunk=4, num_threads=threads):
        if error:
            problems.append(_Problem(OSError, str(error)))
    if not problems:
        logger.info(
            "Checked %d images in %.1f s, and the pixels of %d.", len(paths), time.monotonic() - start, len(sampled)
        )
        if json_file is not None:
            _keep(json_file, digest, [group[0] for group in deep.values()])
    return problems


def _in_threads(
    function: Callable[[_Given], _Found],
    items: Sequence[_Given],
    title: str,
    chunk: int = _CHUNK,
    num_threads: int = _NUM_THREADS,
) -> Iterator[_Found]:
    """Applies a function to each of many items, in order."""
    chunks = [items[start : start + chunk] for start in range(0, len(items), chunk)]
    bar = tqdm(total=len(items), unit="image", desc=title, delay=1, leave=False, disable=not comm.is_main_process())
    with bar, ThreadPoolExecutor(num_threads) as threads:
        for results in threads.map(lambda part: [function(item) for item in part], chunks):
            bar.update(len(results))
            yield from results


def _state(path: str) -> os.stat_result | OSError | ValueError:
    try:
        return os.stat(path)
    except (OSError, ValueError) as error:  # a ValueError if it has characters that no path may have
        return error


def _size_in(record: dict[str, Any], header: Header) -> tuple[int, int]:
    return record.get("width", header.width), record.get("height", header.height)


def _pixel_error(path: str) -> OSError | None:
    try:
        read_upright(path)
    except OSError as error:
        return error
    return None


def spread(items: Sequence[_Given], at_most: int) -> list[_Given]:
    """At most this many items, at equal distances."""
    step = max(1, len(items) / at_most)
    return [items[int(i * step)] for i in range(min(at_most, len(items)))]


def _report(problems: Sequence[_Problem], num_images: int, source: str, hint: str) -> str:
    missing = [each.message for each in problems if each.error is FileNotFoundError]
    others = [each.message for each in problems if each.error is not FileNotFoundError]
    lines = []
    if missing:
        names = ", ".join(missing[:_MAX_NAMES]) + (", …" if len(missing) > _MAX_NAMES else "")
        lines.append(
            f"{len(missing)} of the {num_images} images of {source} do not exist: {names}. Put them there, or take "
            "them out of the JSON."
        )
        if any("\\" in path for path in missing):
            lines[0] += " A path has / between its folders here, not \\ as on Windows."
        folders = sorted({os.path.dirname(os.path.abspath(path)) for path in missing})
        absent = [folder for folder in folders if not os.path.isdir(folder)]
        if absent:
            more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
            lines.append(f"There is no folder {absent[0]}{more}. {hint}")
    if others:
        lines.append(f"{len(others)} of the {num_images} images of {source} cannot be used:")
        room = _MAX_LINES - len(lines) - 1
        lines += others[:room] if len(others) <= room + 1 else [*others[:room], f"… and {len(others) - room} more."]
    return "\n".join(lines)


def _other_size(path: str, size: tuple[int, int], given: tuple[int, int]) -> str:
    return (
        f"{path} has {size[0]} × {size[1]} pixels, upright as its EXIF data says, but its annotations are for "
        f"{given[0]} × {given[1]}. Correct width, height and annotations in the JSON."
    )


def _header_or_error(path: str) -> Header | OSError:
    try:
        with unreadable_image_named(path), open_image_file(path) as file:
            return _header(file)
    except OSError as error:
        return error


def _header(file: BinaryIO) -> Header:
    image = Image.open(file)
    deep = image.mode if is_deep(image) else ""
    if image.format == "PNG":
        for kind, content in _chunks_behind_pixels(file):
            if kind == b"eXIf":
                image.info["exif"] = content
            elif content.startswith((b"XML:com.adobe.xmp", b"Raw profile type exif")):
                # The orientation may be here too, in forms that are left to Pillow.
                image.load()
    turned = orientation(image)
    if turned > 4 and image.format == "TIFF":
        # Whether Pillow has changed the size already depends on its version.
        image.load()
        turned = orientation(image)
    width, height = image.size if turned < 5 else image.size[::-1]
    return Header(width, height, deep)


def _chunks_behind_pixels(file: BinaryIO) -> list[tuple[bytes, bytes]]:
    """Kind and content of each chunk of a PNG after its last IDAT chunk.

    Raises:
        ValueError: it is cut short.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _TAIL))
    tail = file.read()
    place = tail.find(b"IDAT")
    while place >= 0:
        chunks = list(_chunks(tail, max(0, place - 4)))
        if chunks and chunks[-1][0] == b"IEND":
            return [(kind, content) for kind, content in chunks if kind != b"IDAT"]
        # These four bytes are pixels.
        place = tail.find(b"IDAT", place + 1)
    # The last chunk of pixels begins further ahead.
    start, behind = 8, []
    kind = b""
    while kind != b"IEND":
        file.seek(start)
        header = file.read(8)
        length, kind = int.from_bytes(header[:4], "big"), header[4:]
        start += 12 + length
        if len(header) < 8 or start > size:
            raise ValueError("the PNG is cut short")
        if kind == b"IDAT":
            behind = []
        else:
            behind.append((kind, file.read(length)))
    return behind


def _chunks(data: bytes, start: int) -> Iterable[tuple[bytes, bytes]]:
    """Kind and content of the chunks from a place on, until IEND or one that does not end within the data."""
    kind = b""
    while kind != b"IEND" and start + 12 <= len(data):
        length, kind = int.from_bytes(data[start : start + 4], "big"), data[start + 4 : start + 8]
        end = start + 12 + length
        if end > len(data):
            return
        yield kind, data[start + 8 : end - 4]
        start = end


def _digest(records: Sequence[dict[str, Any]], states: Sequence[os.stat_result | OSError | ValueError]) -> str:
    """A checksum that changes with the name, size in pixels, file and time of any image."""
    digest = hashlib.sha256()
    for record, state in zip(records, states, strict=True):
        if isinstance(state, Exception):
            known: tuple[Any, ...] = (str(state),)
        else:
            known = (state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino, stat.S_IFMT(state.st_mode))
        digest.update(repr((record["file_name"], record.get("width"), record.get("height"), known)).encode())
    return digest.hexdigest()


def _kept_file(json_file: str) -> str:
    return f"{json_file}.images-checked"


def _read_kept(json_file: str | None, digest: str) -> list[str] | None:
    """The images whose ranges are to be logged, if all were found good and have not changed since; else None."""
    if json_file is None or not digest:
        return None
    try:
        with open(_kept_file(json_file), encoding="utf-8") as file:
            kept = json.load(file)
        if (kept["version"], kept["digest"]) != (_VERSION, digest):
            return None
        return [path for path in kept["deep"] if isinstance(path, str)]
    except (OSError, ValueError, KeyError, TypeError):
        # No such file, or another program's: the check is made anew.
        return None


def _keep(json_file: str, digest: str, deep: list[str]) -> None:
    place = _kept_file(json_file)
    partial = f"{place}.{os.getpid()}"
    try:
        with open(partial, "w", encoding="utf-8") as file:
            json.dump({"version": _VERSION, "digest": digest, "deep": deep}, file)
        os.replace(partial, place)
    except OSError as error:
        logger.info("The result is not kept: %s cannot be written (%s).", place, error.strerror)
        with contextlib.suppress(OSError):
            os.remove(partial)
