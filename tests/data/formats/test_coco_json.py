"""What the reader of COCO's JSON puts right, refuses and leaves out: every rule of the schema, and what lies beside."""

import copy
import json
import logging
import math
import os
import re
import time
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from karat_det.data.formats import coco_masks
from karat_det.data.formats.coco import read_categories, read_coco
from karat_det.data.formats.coco_schema import DOCUMENTATION, RULES, markdown
from karat_det.data.formats.report import MAX_LINES

WIDTH, HEIGHT = 80, 50
NAN, INFINITY = math.nan, math.inf


def square(x=10, y=10, w=30, h=20):
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def content():
    """Four images with an object each."""
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": WIDTH, "height": HEIGHT} for i in range(1, 5)],
        "annotations": [
            {
                "id": i,
                "image_id": i,
                "category_id": 1 + i % 2,
                "bbox": [10, 10, 30, 20],
                "segmentation": [square()],
                "area": 600,
                "iscrowd": 0,
            }
            for i in range(1, 5)
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }


def with_(part, **values):
    """The content with other values in the second entry of a list."""
    changed = content()
    changed[part][1].update(values)
    return changed


def without(part, key):
    changed = content()
    del changed[part][1][key]
    return changed


def all_with(part, key, values):
    changed = content()
    for entry, value in zip(changed[part], values, strict=True):
        entry[key] = value
    return changed


def rle(mask=None, **values):
    if mask is None:
        mask = mask_util.decode(mask_util.frPyObjects([square()], HEIGHT, WIDTH))[:, :, 0]
    counts = mask_util.encode(np.asfortranarray(mask))["counts"].decode()
    return {"size": [HEIGHT, WIDTH], "counts": counts, **values}


def runs(mask):
    """The uncompressed runs of a mask, from zeros."""
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    lengths = np.diff([0, *edges, flat.size]).tolist()
    return lengths if not flat[0] else [0, *lengths]


def read(tmp_path, changed, name="some.json"):
    path = tmp_path / name
    path.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    return read_coco(str(path))


def masked(segmentation):
    return with_("annotations", segmentation=segmentation)


def boxed(*bbox):
    return with_("annotations", bbox=list(bbox))


PLACE = r"annotations\[1\] \(id 2, image_id 2\): "
SQUARE_RUNS = runs(mask_util.decode(mask_util.frPyObjects([square()], HEIGHT, WIDTH))[:, :, 0])

# (rule, content, what the message says).
REFUSED = [
    ("structure", [], "must be an object"),
    ("structure", {**content(), "images": None}, "'images' is None"),
    ("structure", {**content(), "annotations": None}, "'annotations' is None"),
    ("structure", {**content(), "annotations": {}}, "'annotations' is {}"),
    ("structure", {"images": [], "annotations": []}, "'categories' is missing"),
    ("structure", {**content(), "categories": [3]}, r"categories\[0\]: 3 is no object"),
    ("structure", {**content(), "images": [None]}, r"images\[0\]: None is no object"),
    ("structure", {**content(), "annotations": [[]]}, r"annotations\[0\]: \[\] is no object"),
    ("no-categories", {**content(), "categories": []}, "has no categories"),
    (
        "key-twice",
        json.dumps(content()).replace('"iscrowd": 0', '"iscrowd": 0, "bbox": [1, 2, 3, 4]', 1),
        r"annotations\[0\] \(id 1, image_id 1\): the key 'bbox' stands twice there",
    ),
    *[("id", with_("images", id=value), r"images\[1\] .*id is") for value in (None, True, 1.5, "", [1], {}, NAN, 1e30)],
    ("id", without("images", "id"), r"images\[1\] \(file_name '2.jpg'\): id is missing"),
    ("id", without("categories", "id"), r"categories\[1\] \(name 'dog'\): id is missing"),
    ("id", without("annotations", "image_id"), r"annotations\[1\] \(id 2\): image_id is missing"),
    ("id", with_("annotations", category_id=None), PLACE + "category_id is None"),
    ("id", with_("annotations", id=False), "id is False"),
    *[
        ("id-twice", with_("images", id=id), r"images\[1\] \(id .*'2.jpg'\): the id is that of images\[0\] \('1.jpg'\)")
        for id in (1, "1", 1.0)
    ],
    (
        "id-twice",
        with_("categories", id=1),
        r"categories\[1\] \(id 1, name 'dog'\): the id is that of categories\[0\] \('cat'\)",
    ),
    (
        "id-twice",
        with_("annotations", id=1),
        r"annotations\[1\] \(id 1, image_id 2\): the id is that of annotations\[0\]",
    ),
    *[
        ("reference", with_("annotations", image_id=id), f"image_id is {id!r}, which is no id")
        for id in (99, "2 ", "٢", "02")
    ],
    ("reference", with_("annotations", category_id=99), "category_id is 99, which is no id of 'categories'"),
    *[("file-name", with_("images", file_name=value), "file_name is") for value in (None, "", 5, ["2.jpg"])],
    ("file-name", without("images", "file_name"), r"images\[1\] \(id 2\): file_name is missing"),
    *[("file-name", with_("images", file_name=url), "is a URL") for url in ("http://x.org/2.jpg", "s3://b/2.jpg")],
    *[
        (
            "file-twice",
            with_("images", file_name=name),
            r"the images with the ids 1 and 2 are both '.*1.jpg', and have other objects",
        )
        for name in ("1.jpg", "./1.jpg")
    ],
    *[
        ("size", with_("images", width=value), r"images\[1\] \(id 2, file_name '2.jpg'\): width is")
        for value in (0, -80, 80.5, "80", None, True, [80], NAN, 10**9)
    ],
    ("size", without("images", "height"), "height is missing"),
    ("size", with_("images", width=10**6, height=10**6), "more than"),
    *[("name", with_("categories", name=value), "name is") for value in (None, "", True, ["dog"])],
    ("name", without("categories", "name"), r"categories\[1\] \(id 2\): name is missing"),
    *[
        ("bbox", boxed(*value), PLACE + "bbox is")
        for value in (
            (),
            (1, 2, 3),
            (1, 2, 3, 4, 5),
            ("1", 2, 3, 4),
            (1, 2, None, 4),
            (True, 2, 3, 4),
            ([1, 2], [3, 4]),
        )
    ],
    ("bbox", with_("annotations", bbox=None), "bbox is None"),
    ("bbox", with_("annotations", bbox={"x": 1}), "bbox is {'x': 1}"),
    ("bbox", without("annotations", "bbox"), PLACE + "bbox is missing"),
    *[
        ("bbox-not-finite", boxed(*value), PLACE + "bbox is .*finite")
        for value in ((NAN, 2, 3, 4), (1, 2, INFINITY, 4), (1, -INFINITY, 3, 4))
    ],
    *[
        ("bbox-far", boxed(*value), PLACE + "bbox is .*far outside the image of 80 × 50")
        for value in ((1e6, 1, 3, 4), (1, 2, 3, 1e300), (1, 10**400, 3, 4), (-1e5, 2, 3, 4))
    ],
    (
        "boxes-as-fractions",
        all_with("annotations", "bbox", [[0.125, 0.2, 0.375, 0.4]] * 4),
        "4 of 4 boxes look like fractions",
    ),
    (
        "boxes-as-fractions",
        all_with("annotations", "bbox", [[0.1, 0.2, 0.5, 0.6]] * 3 + [[10, 10, 30, 20]]),
        "3 of 4 boxes",
    ),
    (
        "boxes-as-corners",
        all_with("annotations", "bbox", [[10, 10, 40, 30]] * 4),
        r"4 of 4 boxes fit their masks better as corners \[x1, y1, x2, y2\]",
    ),
    ("boxes-as-corners", all_with("annotations", "bbox", [[10, 10, 90, 70]] * 4), "not where their masks are"),
    (
        "boxes-as-corners",
        all_with("annotations", "bbox", [[25, 20, 30, 20]] * 4),
        "fit their masks better as .* from the centre",
    ),
    *[
        ("mask", masked(value), PLACE + "segmentation")
        for value in (
            "polygon",
            5,
            True,
            [["a"] * 6],
            [[True] * 6],
            [None],
            [{"x": 1}],
            [[[1, 2, 3]] * 3],
            [[1, 2, 3, 4, 5, None]],
            [rle()],
        )
    ],
    *[
        ("polygon-length", masked(value), PLACE + "segmentation")
        for value in ([square() + [1]], [[10, 10, 40, 30]], [[10, 10]], [[10, 10], [20, 20]])
    ],
    *[
        ("polygon-not-finite", masked([[*square(), value, 10]]), PLACE + "segmentation holds")
        for value in (NAN, INFINITY, -INFINITY)
    ],
    *[
        ("polygon-far", masked([[*square(), 10, value]]), PLACE + "segmentation has a point")
        for value in (1e6, -1e300, 10**400)
    ],
    *[
        ("rle-size", masked(rle(size=size)), PLACE + "segmentation has the size")
        for size in (
            [WIDTH, HEIGHT],
            [HEIGHT],
            None,
            "50",
            [HEIGHT, 80.5],
            [str(HEIGHT), str(WIDTH)],
            [HEIGHT + 1, WIDTH],
        )
    ],
    ("rle-size", masked(rle(size=[WIDTH, HEIGHT])), "they are swapped"),
    ("rle-counts", masked(rle(counts=[510, 20, 30, 20])), "counts of 580 pixels; height × width is 4000"),
    *[
        ("rle-counts", masked(rle(counts=counts)), PLACE + "segmentation")
        for counts in (
            [5000, -1000],
            [3999.5, 0.5],
            [True, 3999],
            ["4000"],
            [],
            None,
            5,
            "",
            "abc",
            "ü",
            "~",
            "l",
            rle()["counts"][:-1],
            rle()["counts"] + "0",
            "0" * 40,
            "ooooooooooo0",
        )
    ],
    (
        "masks-as-fractions",
        all_with("annotations", "segmentation", [[[0.1, 0.2, 0.5, 0.2, 0.5, 0.6]]] * 3 + [[square()]]),
        "3 of 4 masks look like fractions",
    ),
    (
        # The last one covers a pixel, far from its box.
        "masks-as-fractions",
        all_with("annotations", "segmentation", [[[0.1, 0.2, 0.5, 0.2, 0.5, 0.6]]] * 3 + [[square(0, 0, 1, 1)]]),
        "3 of 4 masks look like fractions",
    ),
    *[
        ("iscrowd", with_("annotations", iscrowd=value), PLACE + "iscrowd is")
        for value in (2, -1, "yes", "", 0.5, [], NAN)
    ],
    *[("ignore", with_("annotations", ignore=value), "Set iscrowd 1 .* or remove ignore") for value in (1, True)],
    *[
        ("area", with_("annotations", area=value), PLACE + "area is")
        for value in (10**400, 1e300, -1, NAN, INFINITY, "600", True, [])
    ],
]


@pytest.mark.parametrize("rule, changed, message", REFUSED, ids=[f"{i}-{case[0]}" for i, case in enumerate(REFUSED)])
def test_refused(tmp_path, rule, changed, message):
    assert RULES[rule].verdict == "refused"
    with pytest.raises(ValueError, match=rf"(?s)some\.json is not in COCO format as {DOCUMENTATION} .*{message}"):
        read(tmp_path, changed)


def test_boxes_without_masks_that_look_like_corners_are_refused(tmp_path):
    changed = all_with("annotations", "bbox", [[40, 20, 75, 45], [30, 30, 70, 50], [50, 10, 80, 30], [1, 1, 20, 20]])
    for annotation in changed["annotations"]:
        del annotation["segmentation"]
    message = r"3 of 4 boxes leave their image, such as \[40, 20, 75, 45\] of annotations\[0\] .*3 of these .* corners"
    with pytest.raises(ValueError, match=message):
        read(tmp_path, changed)
    # Cut from a larger image, objects leave it with their masks.
    for annotation in changed["annotations"]:
        annotation["segmentation"] = [square(*annotation["bbox"])]
    assert len(read(tmp_path, changed).annotations[2]) == 1
    for annotation in changed["annotations"]:
        del annotation["segmentation"]
    changed["annotations"][0]["bbox"] = changed["annotations"][1]["bbox"] = [10, 10, 30, 20]
    assert len(read(tmp_path, changed).annotations[2]) == 1


def test_a_tenth_of_the_boxes_is_enough_where_all_would_be_corners(tmp_path):
    changed = content()
    boxes = [[5, 5, 30, 20], [10, 2, 25, 24], [3, 8, 20, 30]] * 3 + [[50, 10, 75, 45]] * 2
    changed["annotations"] = [
        {"id": i, "image_id": 1, "category_id": 1, "bbox": bbox, "area": bbox[2] * bbox[3]}
        for i, bbox in enumerate(boxes)
    ]
    with pytest.raises(ValueError, match=r"2 of 11 boxes leave .* 2 of these would fit as corners"):
        read(tmp_path, changed)
    # It starts further right than it is wide.
    changed["annotations"][0]["bbox"] = [30, 5, 10, 20]
    assert len(read(tmp_path, changed).annotations[0]) == 11


def test_boxes_that_leave_their_image_and_are_no_corners_either_are_asked_back(tmp_path):
    changed = all_with("annotations", "bbox", [[-10, 10, 95, 20]] * 4)
    for annotation in changed["annotations"]:
        del annotation["segmentation"]
    with pytest.raises(
        ValueError, match=r"4 of 4 boxes leave .* of another size\? If not, clip them to theirs\. A bbox"
    ):
        read(tmp_path, changed)


def test_loose_boxes_may_leave_their_image_by_a_twentieth(tmp_path):
    changed = all_with("annotations", "bbox", [[-3, 10, 60, 20], [10, 35, 30, 19], [50, 10, 34, 20], [-4, -4, 88, 58]])
    for annotation in changed["annotations"]:
        del annotation["segmentation"]
    assert [len(of_image) for of_image in read(tmp_path, changed).annotations] == [1, 1, 1, 1]
    changed["annotations"][0]["bbox"][0] = changed["annotations"][1]["bbox"][1] = -5
    changed["annotations"][2]["bbox"][2] = 35
    with pytest.raises(ValueError, match="3 of 4 boxes leave their image"):
        read(tmp_path, changed)


def test_boxes_with_the_area_of_corners_are_refused(tmp_path):
    changed = all_with("annotations", "bbox", [[10, 10, 40, 30], [5, 5, 25, 35], [20, 10, 30, 15], [10, 10, 30, 20]])
    for annotation, area in zip(changed["annotations"], [600, 600, 50.2, 600], strict=True):
        annotation.update(area=area, segmentation=None)
    with pytest.raises(
        ValueError, match=r"3 of 4 boxes have the area of corners.*\[10, 10, 40, 30\] of annotations\[0\]"
    ):
        read(tmp_path, changed)
    changed["annotations"][0]["area"] = 1200
    assert len(read(tmp_path, changed).annotations[0]) == 1


def read_right(tmp_path, changed, rules, caplog):
    """Reads what may be put right or left out, and checks which rules are named in the log, and that with a count."""
    with caplog.at_level(logging.WARNING, "karat_det"):
        found = read(tmp_path, changed)
    messages = [record.getMessage() for record in caplog.records]
    assert sorted(rules) == sorted(key for key, rule in RULES.items() if any(rule.text in each for each in messages))
    assert all(re.search(r"some\.json: \d+ (put right|left out): ", each) for each in messages)
    return found


# (rules, content, the value of the second image or its annotation that is expected).
PUT_RIGHT = [
    ([], content(), None),
    ([], with_("annotations", id=0), None),
    ([], with_("annotations", id=2**80), None),
    ([], without("annotations", "iscrowd"), None),
    ([], with_("annotations", ignore=0), None),
    ([], with_("annotations", ignore=1, iscrowd=1), {"iscrowd": 1}),
    (["id-text"], with_("annotations", id="a"), None),
    (["id-text", "id-other-type"], with_("annotations", image_id="2"), None),
    (["id-text", "id-other-type"], with_("annotations", category_id="1"), None),
    (["id-float"], with_("annotations", image_id=2.0), None),
    (["id-float"], with_("images", id=2.0), None),
    (["id-missing"], without("annotations", "id"), None),
    (["id-missing"], with_("annotations", id=None), None),
    (["size-float"], with_("images", width=80.0, height=50.0), None),
    (["name-number"], with_("categories", name=7), None),
    (["name-twice"], with_("categories", name="cat"), None),
    (["bbox-negative"], boxed(40, 30, -30, -20), None),
    (["bbox-negative"], boxed(10, 30, 30, -20), None),
    (["polygon-pairs"], masked([[[10, 10], [40, 10], [40, 30], [10, 30]]]), None),
    (["polygon-pairs"], masked([[10, 10], [40, 10], [40, 30], [10, 30]]), None),
    (["polygon-pairs"], masked(square()), None),
    (["polygon-short"], masked([square(), [1, 2, 3, 4]]), None),
    ([], masked([square(), []]), None),
    (["rle-float"], masked(rle(size=[50.0, 80.0])), {"segmentation": rle()}),
    (
        ["rle-float"],
        masked(rle(counts=[float(x) for x in SQUARE_RUNS])),
        {"segmentation": rle(counts=rle()["counts"].encode())},
    ),
    ([], masked(rle(counts=SQUARE_RUNS)), {"segmentation": rle(counts=rle()["counts"].encode())}),
    ([], masked(rle()), {"segmentation": rle()}),
    (["mask-empty"], masked([[5, 5, 5, 5, 5, 5]]), {"segmentation": None, "empty_mask": True}),
    (["mask-empty"], masked([square(100, 100)]), {"segmentation": None, "empty_mask": True}),
    (["mask-empty"], masked(rle(counts=[4000])), {"segmentation": None, "empty_mask": True}),
    *[([], masked(value), {"segmentation": None}) for value in (None, [], [[]], [[], []], {})],
    *[(["iscrowd-null"], with_("annotations", iscrowd=value), None) for value in (None, False, 0.0, "0")],
    *[(["iscrowd-null"], with_("annotations", iscrowd=value), {"iscrowd": 1}) for value in (True, 1.0, "1")],
    (["area-missing"], without("annotations", "area"), None),
    (["area-missing"], with_("annotations", area=None), None),
    (["area-missing"], with_("annotations", area=0), None),
    (
        ["area-missing"],
        with_("annotations", area=None, segmentation=[square(10, 10, 15, 20)]),
        {"area": 300, "segmentation": [square(10, 10, 15, 20)]},
    ),
    (["area-missing"], with_("annotations", area=None, segmentation=None), {"segmentation": None}),
    ([], boxed(70, 10, 30, 20), {"bbox": [70, 10, 30, 20]}),
]


@pytest.mark.parametrize("rules, changed, other", PUT_RIGHT, ids=["+".join(case[0]) or "as is" for case in PUT_RIGHT])
def test_put_right(tmp_path, rules, changed, other, caplog):
    found = read_right(tmp_path, changed, rules, caplog)
    annotation = found.annotations[1][0]
    expected = {"bbox": [10, 10, 30, 20], "segmentation": [square()], "area": 600, "iscrowd": 0, **(other or {})}
    assert {key: annotation.get(key) for key in expected} == expected
    image = found.images[1]
    assert (image.id, image.width, image.height) == (2, WIDTH, HEIGHT)
    assert type(image.width) is int
    assert all(len(of_image) == 1 for of_image in found.annotations)


@pytest.mark.parametrize(
    "bbox",
    [
        (80, 10, 5, 5),
        (100, 10, 30, 20),
        (-40, 10, 30, 20),
        (10, 60, 5, 5),
        (10, 10, 0, 5),
        (10, 10, 5, 0),
        (0, 0, 0, 0),
        (79.9999, 10, 5, 5),
        (10, 10, 1e-9, 5),
        (500, 500, 30, 20),
        (0, 0, -1, -1),
    ],
)
def test_boxes_outside_the_image_or_without_area_are_left_out(tmp_path, bbox, caplog):
    rules = ["bbox-empty", "bbox-negative"] if min(bbox[2:]) < 0 else ["bbox-empty"]
    found = read_right(tmp_path, boxed(*bbox), rules, caplog)
    assert [len(of_image) for of_image in found.annotations] == [1, 0, 1, 1]


@pytest.mark.parametrize("points", [[[10, 10], [40, 10], [40, 30]], [[[10, 10], [40, 10], [40, 30]]]])
def test_what_is_put_right_is_counted_once(tmp_path, points, caplog):
    read_right(tmp_path, masked(points), ["polygon-pairs"], caplog)
    assert "some.json: 1 put right" in caplog.text


def test_every_rule_has_an_example():
    shown = {case[0] for case in REFUSED} | {rule for case in PUT_RIGHT for rule in case[0]} | {"bbox-empty"}
    assert shown == set(RULES)


@pytest.mark.parametrize(
    "given, expected",
    [
        (["0003", "0001", "0002", "0010"], ["0001", "0002", "0003", "0010"]),
        (["10", "9", "2", "1"], ["1", "2", "9", "10"]),
        (["b", "a", 10, 9], [9, 10, "a", "b"]),
        ([2**62 + 1, 2**62 + 3, 2**62 + 2, 5], [5, 2**62 + 1, 2**62 + 2, 2**62 + 3]),
        (["frame_1", "  x", "１", -3], [-3, "  x", "frame_1", "１"]),
    ],
)
def test_ids_are_only_names(tmp_path, given, expected):
    changed = content()
    for image, annotation, id in zip(changed["images"], changed["annotations"], given, strict=True):
        image["id"] = annotation["image_id"] = id
    found = read(tmp_path, changed)
    assert [image.id for image in found.images] == expected
    file_of = dict(zip(given, (f"{i}.jpg" for i in range(1, 5)), strict=True))
    assert [image.file_name for image in found.images] == [file_of[id] for id in expected]
    assert [of_image[0]["id"] for of_image in found.annotations] == [1 + given.index(id) for id in expected]


def test_classes_are_in_the_order_of_their_ids_and_told_apart(tmp_path):
    changed = content()
    names = {"10": "weed", "9": "weed", "2": 3, "1": "weed (id 9)"}
    changed["categories"] = [{"id": id, "name": name} for id, name in names.items()]
    for annotation in changed["annotations"]:
        annotation["category_id"] = "9"
    found = read(tmp_path, changed)
    assert found.category_ids == ["1", "2", "9", "10"]
    assert found.class_names == ["weed (id 9) (id 1)", "3", "weed (id 9) (id 9)", "weed (id 10)"]
    assert found.annotations[0][0]["category_id"] == 2
    assert read_categories(str(tmp_path / "some.json")) == (found.category_ids, found.class_names)


def test_all_errors_come_in_one_report_of_at_most_20_lines(tmp_path):
    changed = content()
    changed["annotations"] = [{**changed["annotations"][0], "id": i, "bbox": [1, 2]} for i in range(100)]
    changed["annotations"][70]["iscrowd"] = 7
    changed["images"][2]["width"] = "80"
    with pytest.raises(ValueError) as error:
        read(tmp_path, changed)
    lines = str(error.value).splitlines()
    assert len(lines) == MAX_LINES == 20
    assert lines[0].endswith("102 errors.")
    assert lines[-1] == "  … and 84 more."
    # The rare ones are shown, too, in the order of the file.
    assert "images[2] (id 3" in lines[1]
    assert "annotations[70] (id 70, image_id 1): iscrowd is 7" in lines[-2]


@pytest.mark.parametrize("part", ["images", "categories"])
def test_a_list_that_is_none_is_one_error(tmp_path, part):
    for value in (None, {"1": "cat"}):
        with pytest.raises(ValueError, match=rf"describes it: '{part}' is .*; it must be a list of objects\.$"):
            read(tmp_path, {**content(), part: value})
    # An empty list of images is no error, but each annotation of an image that is not there is one.
    with pytest.raises(ValueError, match="4 errors" if part == "images" else "describes it: it has no categories"):
        read(tmp_path, {**content(), part: []})


def test_classes_alone_are_refused_with_all_else_that_is_wrong(tmp_path, caplog):
    path = tmp_path / "some.json"
    path.write_text(json.dumps(with_("categories", name=7)))
    assert read_categories(str(path)) == ([1, 2], ["cat", "7"])
    assert not caplog.records
    path.write_text(json.dumps(boxed(1, 2)))
    assert read_categories(str(path))[1] == ["cat", "dog"]
    changed = boxed(1, 2)
    changed["categories"][0]["id"] = 2
    path.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=r"(?s)4 errors.*categories\[1\].*annotations\[1\].*bbox is.*annotations\[3\]"):
        read_categories(str(path))


def test_a_report_is_quick_whatever_it_reports(tmp_path):
    changed = content()
    changed["annotations"] = [
        {
            **changed["annotations"][0],
            "id": f"object {i}",
            "segmentation": [[[10, 10], [40, 10], [40, 30]] * 20],
            "area": None,
        }
        for i in range(4_000)
    ]
    text = json.dumps(changed)
    start = time.process_time()
    assert len(read(tmp_path, changed).annotations[0]) == 4_000
    with pytest.raises(ValueError, match=r"the key 'images' stands twice in an object"):
        read(tmp_path, text[:-1] + ', "images": []}')
    assert time.process_time() - start < 10


def test_a_test_set_has_no_annotations_and_other_keys_are_ignored(tmp_path, caplog):
    changed = {**content(), "info": None, "licenses": NAN}
    del changed["annotations"]
    assert read_right(tmp_path, changed, [], caplog).annotations is None


@pytest.mark.parametrize(
    "text, encoding",
    [("", "utf-8"), ("{", "utf-8"), ("[" * 100_000, "utf-8"), ('{"a": ' + "9" * 5000 + "}", "utf-8"), ("ü", "latin-1")],
)
def test_what_is_no_json_is_named(tmp_path, text, encoding):
    path = tmp_path / "some.json"
    path.write_bytes(text.encode(encoding))
    with pytest.raises(ValueError, match=r"some\.json is not a JSON file"):
        read_coco(str(path))


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    for name in ("pipe.json", ""):
        with pytest.raises(ValueError, match="is a folder or a pipe"):
            read_coco(str(tmp_path / name))
    with pytest.raises(FileNotFoundError):
        read_coco(str(tmp_path / "absent.json"))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32-le"])
def test_other_encodings_and_byte_order_marks_are_read(tmp_path, encoding):
    changed = with_("categories", name="köter 犬")
    (tmp_path / "some.json").write_bytes(json.dumps(changed, ensure_ascii=False).encode(encoding))
    assert read_coco(str(tmp_path / "some.json")).class_names == ["cat", "köter 犬"]


def test_entries_that_repeat_an_image_with_its_objects_are_let_be(tmp_path):
    changed = with_("images", file_name="1.jpg")
    changed["annotations"][1]["category_id"] = changed["annotations"][0]["category_id"]
    assert [len(of_image) for of_image in read(tmp_path, changed).annotations] == [1, 1, 1, 1]
    del changed["annotations"]
    assert len(read(tmp_path, changed).images) == 4


def test_annotation_ids_twice_are_let_pass_in_coco_2014s_minival(tmp_path):
    assert len(read(tmp_path, with_("annotations", id=1), "instances_minival2014.json").images) == 4


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.integers(1, 40), st.integers(1, 40))
def test_compressed_runs_are_decoded_as_pycocotools_encodes_them(seed, density, height, width):
    mask = (np.random.default_rng(seed).random((height, width)) < density).astype(np.uint8)
    counts = mask_util.encode(np.asfortranarray(mask))["counts"].decode()
    assert coco_masks._decoded(counts) == runs(mask)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(-20, 100).map(lambda x: x / 2), min_size=6, max_size=12), min_size=1, max_size=2))
def test_masks_without_a_pixel_are_those_that_pycocotools_rasterises_to_none(polygons):
    polygons = [polygon[: len(polygon) // 2 * 2] for polygon in polygons]
    _, extent = coco_masks.read_mask(polygons, 40, 30, lambda *found: pytest.fail(str(found)))
    assert (extent is not None) == bool(mask_util.area(mask_util.merge(mask_util.frPyObjects(polygons, 30, 40))))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    part=st.sampled_from(["images", "annotations", "categories"]),
    key=st.sampled_from(
        [
            "id",
            "file_name",
            "width",
            "height",
            "image_id",
            "category_id",
            "bbox",
            "segmentation",
            "area",
            "iscrowd",
            "name",
            "ignore",
        ]
    ),
    value=json_values,
    inside=st.booleans(),
)
def test_any_value_is_read_or_refused_by_name(tmp_path, part, key, value, inside):
    changed = with_(part, **{key: {"size": [HEIGHT, WIDTH], "counts": value} if inside else value})
    before = copy.deepcopy(changed)
    try:
        found = read(tmp_path, changed)
    except ValueError as error:
        assert "is not in COCO format" in str(error)
        return
    assert str(changed) == str(before)
    for of_image in found.annotations:
        for annotation in of_image:
            assert all(type(x) is float and math.isfinite(x) for x in annotation["bbox"])
            assert annotation["area"] > 0
            assert annotation["iscrowd"] in (0, 1)


def test_the_documentation_is_that_of_the_schema():
    assert (Path(__file__).parents[3] / DOCUMENTATION).read_text() == markdown()
