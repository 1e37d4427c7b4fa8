"""COCO's JSON as this project reads it: its keys, and what becomes of other content that tools write.

docs/coco_format.md is made from this file:

    python -m karat_det.data.formats.coco_schema > docs/coco_format.md
"""

from .report import Rule

DOCUMENTATION = "docs/coco_format.md"

# Coordinates further from the image than this many times its longer side do not belong to it.
FAR = 20
# Least width and height, in pixels, that a box must have inside its image.
LEAST_SIDE = 1e-3
# Largest width or height, in pixels, of an image, and most pixels: run-length encoding counts them in 32 bits.
MAX_SIDE = 1_000_000
MAX_PIXELS = 2**32 - 1

# (list, key, what it must be).
KEYS = (
    ("images", "id", "A number or text, no two alike. Ids are only names: results carry them as they are."),
    ("images", "file_name", "The image's path below the image folder; an absolute path is taken as it is."),
    ("images", "width, height", f"Whole numbers of pixels from 1 to {MAX_SIDE:,}, of the image turned upright."),
    ("categories", "id", "A number or text, no two alike. Their order is that of the model's classes."),
    ("categories", "name", "Text."),
    ("annotations", "id", "A number or text, no two alike. It may be missing."),
    ("annotations", "image_id, category_id", "The id of an image and of a category."),
    ("annotations", "bbox", "[x, y, width, height] in pixels from the image's upper left corner."),
    (
        "annotations",
        "segmentation",
        "Polygons [[x, y, x, y, …], …] of at least three points, or a run-length encoded mask {size: [height, width], "
        "counts: a list of runs, or COCO's compressed text}. It may be missing, null or empty with MODEL.MASK_ON "
        "False.",
    ),
    (
        "annotations",
        "area",
        "The object's area in pixels, which decides whether it counts as small, medium or large. Where more than a "
        "tenth do not fit their boxes, the log says so.",
    ),
    (
        "annotations",
        "iscrowd",
        "0, or 1 for what is neither trained on nor counted as missed. Missing is 0. Where more than a tenth are 1, "
        "the log says so: some tools mark every mask.",
    ),
)

RULES: dict[str, Rule] = {
    # The file.
    "structure": Rule(
        "refused",
        "file",
        "What is no object with the lists `images` and `categories`, and `annotations` "
        "unless it is a test set without; entries of a list that are no objects.",
    ),
    "no-categories": Rule("refused", "file", "An empty list of categories."),
    "key-twice": Rule("refused", "file", "An object that holds a key twice."),
    # Ids.
    "id": Rule(
        "refused",
        "ids",
        "Ids that are missing, null, empty, true or false, fractions or lists. (An annotation's "
        "own id may be missing or null.)",
    ),
    "id-twice": Rule(
        "refused",
        "ids",
        'Two images, two categories or two annotations with the same id, 1 and "1" '
        "included. (Of annotations it is let pass where the file's name has \"minival\": COCO 2014's has.)",
    ),
    "reference": Rule("refused", "ids", "Annotations of an image or a category that is not in the file."),
    "id-text": Rule("put right", "ids", "Ids that are text are numbered inside; results carry them as they are."),
    "id-float": Rule("put right", "ids", "Ids such as 80.0 are 80."),
    "id-other-type": Rule("put right", "ids", "An id that is a number in one list and the same as text in another."),
    "id-missing": Rule("put right", "ids", "Annotations without an id are numbered."),
    # Images.
    "file-name": Rule("refused", "images", "A file_name that is missing, empty or no text, or a URL."),
    "file-twice": Rule(
        "refused", "images", "Two images with the same file_name and other objects: each would lack those of the other."
    ),
    "size": Rule(
        "refused",
        "images",
        "A width or height that is missing, no number, not whole, below 1 or larger than an image can be.",
    ),
    "size-float": Rule("put right", "images", "Sizes such as 80.0 are 80."),
    # Categories.
    "name": Rule("refused", "categories", "A name that is missing, null, empty, true or false, or a list."),
    "name-number": Rule("put right", "categories", "Names that are numbers are taken as text."),
    "name-twice": Rule("put right", "categories", 'Equal names are told apart by their ids: "weed (id 1)".'),
    # Boxes.
    "bbox": Rule("refused", "boxes", "A bbox that is missing, null, or not four numbers."),
    "bbox-not-finite": Rule("refused", "boxes", "A bbox with NaN or an infinite number."),
    "bbox-far": Rule("refused", "boxes", f"A bbox that is more than {FAR} times the image's longer side away from it."),
    "bbox-negative": Rule("put right", "boxes", "A negative width or height: the corner is the opposite one."),
    "bbox-empty": Rule(
        "left out", "boxes", f"Boxes outside their image, or without area in it (narrower than {LEAST_SIDE} pixels)."
    ),
    "boxes-as-fractions": Rule(
        "refused",
        "boxes",
        "Boxes that look like fractions of the image: none of the numbers "
        "is above 1, in more than half of the file's boxes.",
    ),
    "boxes-as-corners": Rule(
        "refused",
        "boxes",
        "More than half of the file's boxes leave their image, by more than two pixels and a twentieth of its longer "
        "side, and not with their masks; or overlap what their masks span by less than half; or fit their masks better "
        "as corners [x1, y1, x2, y2], from their centre, or as [y, x, height, width]; or have no masks and the area of "
        "corners. Or more than a tenth leave their image, and all, ten at least, would be inside as corners. The error "
        "says what was seen.",
    ),
    # Masks.
    "mask": Rule(
        "refused",
        "masks",
        "A segmentation that is neither polygons nor a run-length encoded mask, or holds what is no number.",
    ),
    "polygon-length": Rule(
        "refused",
        "masks",
        "A polygon with an odd number of coordinates; masks whose polygons all have fewer than three points.",
    ),
    "polygon-not-finite": Rule("refused", "masks", "A polygon with NaN or an infinite number."),
    "polygon-far": Rule(
        "refused", "masks", f"A polygon with points more than {FAR} times the image's longer side away from it."
    ),
    "polygon-pairs": Rule(
        "put right", "masks", "Polygons of points [[x, y], …], and one polygon that is not in a list of polygons."
    ),
    "polygon-short": Rule("left out", "masks", "Polygons of fewer than three points, beside others of the same mask."),
    "rle-size": Rule("refused", "masks", "A run-length encoded mask whose size is not [height, width] of its image."),
    "rle-counts": Rule(
        "refused",
        "masks",
        "Runs that are negative or no whole numbers, text that cannot be decoded, "
        "and runs whose sum is not height × width.",
    ),
    "rle-float": Rule("put right", "masks", "Runs and sizes such as 80.0 are 80."),
    "mask-empty": Rule(
        "left out",
        "masks",
        "Objects whose mask has no pixel in the image; with MODEL.MASK_ON False they are used, with their boxes.",
    ),
    "masks-as-fractions": Rule(
        "refused", "masks", "More than half of the file's masks have no pixel, and no coordinate above 1."
    ),
    # The rest of an annotation.
    "iscrowd": Rule("refused", "annotations", "An iscrowd other than 0 and 1."),
    "iscrowd-null": Rule(
        "put right",
        "annotations",
        'An iscrowd that is null is 0; true and false, 1.0 and 0.0, "1" and "0" are 1 and 0.',
    ),
    "ignore": Rule("refused", "annotations", "An `ignore` other than 0 where iscrowd, which says this, is not 1."),
    "area": Rule("refused", "annotations", "An area that is no number, negative, not finite or above 2^53."),
    "area-missing": Rule(
        "put right",
        "annotations",
        "An area that is missing, null, or 0 though the box has one, is "
        "computed: the mask's pixels, or width × height of the box.",
    ),
}


def markdown() -> str:
    """The schema as docs/coco_format.md has it."""
    lines = [
        "# COCO's JSON, as it is read here",
        "",
        "One reader serves training, evaluation and pictures, for your own datasets and Detectron2's COCO names alike.",
        "Made from `karat_det/data/formats/coco_schema.py`, which holds the same rules for the program.",
        "",
        "The file is one JSON object with the lists `images`, `categories` and, unless it is a test set without,",
        "`annotations`. Other keys are ignored.",
        "",
        "| list | key | what it is |",
        "|---|---|---|",
        *(f"| {part} | {key} | {text} |" for part, key, text in KEYS),
        "",
        "A run checks the whole file before it starts, for DATASETS.TRAIN and DATASETS.TEST alike. All errors of a",
        "file come in one report of at most 20 lines, each with list, index and id, and their number.",
    ]
    titles = {
        "refused": "Refused: the run does not start",
        "put right": "Put right, with a counted warning",
        "left out": "Left out of training and evaluation alike, with a counted warning",
    }
    for verdict, title in titles.items():
        lines += ["", f"## {title}", "", "| part | what |", "|---|---|"]
        lines += [f"| {rule.part} | {rule.text} |" for rule in RULES.values() if rule.verdict == verdict]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
