"""Checks over all boxes of a file whether they are COCO's, [x, y, width, height] in pixels."""

from dataclasses import dataclass, field

from .coco_masks import NUMBERS, Extent
from .report import Report, place_of

# How far a box may leave its image: in pixels, by rounding, and as a share of its longer side, if drawn by hand.
_MARGIN = 2.0
_LOOSE = 1 / 20
# Least number of boxes to judge by what they all have in common.
_ENOUGH = 10
_MEANING = "A bbox must be [x, y, width, height], in pixels from the upper left corner."
# Extents by other meanings of a box's elements (a, b, c, d).
_READINGS = {
    "corners [x1, y1, x2, y2]": lambda a, b, c, d: (a, b, c, d),
    "[x, y, width, height] from the centre": lambda a, b, c, d: (a - c / 2, b - d / 2, a + c / 2, b + d / 2),
    "[y, x, height, width]": lambda a, b, c, d: (b, a, b + d, a + c),
}


@dataclass
class BoxHabits:
    """Counts what the boxes of a file have in common, so that the whole file can be refused."""

    boxes: int = 0
    fractions: int = 0
    leaving: int = 0
    inside_as_corners: int = 0
    masked: int = 0
    masks_as_fractions: int = 0
    corners_by_area: int = 0
    disagreeing: int = 0
    # For each reading: boxes that leave their image and would fit in it, and boxes that would fit their masks better.
    fit_image: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_READINGS, 0))
    fit_mask: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_READINGS, 0))
    first: dict[str, str] = field(default_factory=dict)

    def add(
        self, box: list[float], extent: Extent | None, width: int, height: int, index: int, annotation: dict
    ) -> None:
        """Counts one box.

        Args:
            box: an annotation's four elements, finite.
            extent: its mask's, if it has one with pixels.
            width, height: the image's, in pixels.
            index, annotation: its place in the JSON's list, and itself.
        """
        x, y, w, h = box
        self.boxes += 1
        kinds = []
        # A box of whole numbers may be that of one pixel, in the corner.
        if x <= 1 and y <= 1 and w <= 1 and h <= 1 and any(side % 1 for side in box) and max(width, height) > 2:
            self.fractions += 1
            kinds.append("fractions")
        agreement = 0.0
        if extent is not None:
            self.masked += 1
            agreement = _agreement((x, y, x + w, y + h), extent)
            if agreement < 0.5:
                self.disagreeing += 1
            if agreement < 0.8:
                kinds.append("disagreeing")
                for name, reading in _READINGS.items():
                    other = _agreement(reading(x, y, w, h), extent)
                    self.fit_mask[name] += other >= 0.7 and other > agreement + 0.2
        elif _has_area_of_corners(box, annotation.get("area")):
            self.corners_by_area += 1
            kinds.append("corners by area")
        self.inside_as_corners += _is_inside((x, y, w, h), width, height)
        # A box that agrees with its mask is right, wherever it is.
        margin = max(_MARGIN, _LOOSE * max(width, height))
        if agreement < 0.8 and not _is_inside((x, y, x + w, y + h), width, height, margin):
            self.leaving += 1
            kinds.append("leaving")
            for name, reading in _READINGS.items():
                self.fit_image[name] += _is_inside(reading(x, y, w, h), width, height)
        for kind in kinds:
            if kind not in self.first:
                self.first[kind] = _seen(box, extent, width, height, index, annotation)

    def judge(self, report: Report) -> None:
        """Refuses a file more than half of whose boxes are fractions, leave images or contradict masks, or more than
        half of whose masks are fractions."""
        as_mask = max(self.fit_mask, key=self.fit_mask.__getitem__)
        as_image = max(self.fit_image, key=self.fit_image.__getitem__)
        # Among COCO's boxes, some start further right or down than they are wide or high.
        all_as_corners = self.inside_as_corners == self.boxes >= _ENOUGH
        if 2 * self.fractions > self.boxes:
            rule = "boxes-as-fractions"
            detail = (
                f"{self.fractions} of {self.boxes} boxes look like fractions of the image, such as "
                f"{self.first['fractions']}. Are they? Multiply x and width by the image's width, y and height by its "
                "height."
            )
        elif self.masks_as_fractions > self.masked:
            rule = "masks-as-fractions"
            detail = (
                f"{self.masks_as_fractions} of {self.masks_as_fractions + self.masked} masks look like fractions of "
                "the image. Are they? Multiply x by the image's width, y by its height."
            )
        elif 2 * self.fit_mask[as_mask] > self.masked:
            rule = "boxes-as-corners"
            detail = (
                f"{self.fit_mask[as_mask]} of {self.masked} boxes fit their masks better as {as_mask}, such as "
                f"{self.first['disagreeing']}. Are they? {_MEANING}"
            )
        elif 2 * self.disagreeing > self.masked:
            rule = "boxes-as-corners"
            detail = (
                f"{self.disagreeing} of {self.masked} boxes are not where their masks are, such as "
                f"{self.first['disagreeing']}. Are they corners [x1, y1, x2, y2], or for images of another size? "
                f"{_MEANING}"
            )
        elif 2 * self.corners_by_area > self.boxes:
            rule = "boxes-as-corners"
            detail = (
                f"{self.corners_by_area} of {self.boxes} boxes have the area of corners [x1, y1, x2, y2], such as "
                f"{self.first['corners by area']}. Are they? {_MEANING}"
            )
        elif (10 if all_as_corners else 2) * self.leaving > self.boxes:
            rule = "boxes-as-corners"
            fit = self.fit_image[as_image]
            guess = f"{fit} of these would fit as {as_image}. Are they?"
            if 2 * fit <= self.leaving:
                guess = "Are they for images of another size? If not, clip them to theirs."
            detail = (
                f"{self.leaving} of {self.boxes} boxes leave their image, such as {self.first['leaving']}. {guess} "
                f"{_MEANING}"
            )
        else:
            return
        report.add(rule, detail=detail)


def _is_inside(box: Extent, width: int, height: int, margin: float = _MARGIN) -> bool:
    left, top, right, bottom = box
    return -margin <= left < right <= width + margin and -margin <= top < bottom <= height + margin


def _has_area_of_corners(box: list[float], area: object) -> bool:
    """Whether an object's area is (x2 − x1) · (y2 − y1) of its box's elements, and far from width × height."""
    x, y, w, h = box
    # An area is at most an image's; an int may be larger than any float.
    if type(area) not in NUMBERS or not 0 < area < 2**53 or not (x < w and y < h):
        return False
    return abs((w - x) * (h - y) - area) <= 0.01 * area and abs(w * h - area) > 0.1 * area


def _seen(box: list[float], extent: Extent | None, width: int, height: int, index: int, annotation: dict) -> str:
    numbers = ", ".join(f"{x:g}" for x in box)
    mask = f", whose mask spans {', '.join(f'{x:g}' for x in extent)}" if extent else ""
    return f"[{numbers}] of {place_of('annotations', index, annotation)} in an image of {width} × {height}{mask}"


def _agreement(box: Extent, mask: Extent) -> float:
    """Intersection over union of two extents, a pixel added on each side; 0 if the first one is no box.

    Masks may be rounded to pixels, so that small ones would not agree otherwise.
    """
    left, top, right, bottom = box
    left_of, top_of, right_of, bottom_of = mask
    if left >= right or top >= bottom:
        return 0.0
    width = min(right, right_of) - max(left, left_of) + 2
    height = min(bottom, bottom_of) - max(top, top_of) + 2
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    areas = (right - left + 2) * (bottom - top + 2) + (right_of - left_of + 2) * (bottom_of - top_of + 2)
    return both / (areas - both)
