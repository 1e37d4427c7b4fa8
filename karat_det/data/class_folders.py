"""Images in class folders: FOLDER/<class>/…/image, in the order of torchvision's ImageFolder.

Unlike ImageFolder, it ignores hidden folders, takes only files for images, does not follow a link that leads back, and
counts in the log what it leaves out.
"""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

logger = logging.getLogger(__name__)

_MAX_NAMES = 3


def find_labelled_images(folder: Path) -> tuple[list[str], list[tuple[str, int]]]:
    """Finds the classes of a folder and their images, in the order of their names.

    Links to folders are followed, but no folder is visited twice within a class, and none that the class lies in. A
    broken link counts as an image that cannot be read.

    Args:
        folder: holds a folder for each class, with images at any depth.

    Returns:
        The names of the classes; paths of the images and their labels.
    """
    left_out = _LeftOut()
    # A link to one of these would add the images of other classes.
    around = {_identity(path) for path in (folder, *folder.resolve().parents)}
    classes = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            left_out.add("hidden", path)
        elif not path.is_dir():
            left_out.add("beside the class folders", path)
        elif _identity(path) in around:
            left_out.add("links that lead back", path)
        else:
            classes.append(path.name)
    samples = []
    for label, name in enumerate(classes):
        paths = _images_below(str(folder / name), set(around), left_out)
        # ImageFolder's order.
        samples += [(path, label) for path in sorted(paths, key=os.path.split)]
    left_out.log(folder)
    return classes, samples


class _LeftOut:
    """Counts what is neither image nor class, by reason, with the first names."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.names: dict[str, list[str]] = {}

    def add(self, reason: str, path: str | Path) -> None:
        self.counts[reason] += 1
        names = self.names.setdefault(reason, [])
        if len(names) < _MAX_NAMES:
            names.append(str(path))

    def log(self, folder: Path) -> None:
        if not self.counts:
            return
        groups = [
            f"{count} {reason} ({', '.join(os.path.relpath(name, folder) for name in self.names[reason])}"
            f"{', …' if count > _MAX_NAMES else ''})"
            for reason, count in self.counts.most_common()
        ]
        logger.warning("Left out %d files and folders of %s: %s", self.counts.total(), folder, "; ".join(groups))


def _images_below(folder: str, seen: set[tuple[int, int]], left_out: _LeftOut) -> Iterator[str]:
    """The paths of the images in a folder and in its folders. `seen` are folders to leave out."""
    seen.add(_identity(folder))
    folders = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        try:
            if entry.name.startswith("."):
                left_out.add("hidden", entry.path)
            elif entry.is_dir():
                folders.append(entry.path)
            elif not entry.name.lower().endswith(IMG_EXTENSIONS):
                left_out.add("of other kinds", entry.path)
            elif entry.is_file() or not _exists(entry.path):
                yield entry.path
            else:
                left_out.add("no files, but FIFOs, sockets or devices", entry.path)
        except OSError:
            left_out.add("links that lead back", entry.path)
    for path in folders:
        if _identity(path) in seen:
            left_out.add("links that lead back", path)
        else:
            yield from _images_below(path, seen, left_out)


def _exists(path: str) -> bool:
    try:
        os.stat(path)
    except FileNotFoundError:
        return False
    return True


def _identity(folder: str | Path) -> tuple[int, int]:
    state = os.stat(folder)
    return state.st_dev, state.st_ino
