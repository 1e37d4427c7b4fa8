"""The ids of COCO's JSON: numbers or text, used as names alone."""

from typing import Any

from .report import Report, short

Id = int | str
# Up to here each float is the nearest to one whole number only.
MAX_EXACT = 2**53


def read_id(entry: dict[str, Any], key: str, list_name: str, index: int, place: Any, report: Report) -> Id | None:
    id = entry.get(key)
    if type(id) is int:
        return id
    if type(id) is str and id:
        report.add("id-text", list_name, index, place, f"{key} is {short(id)}")
        return id
    # A larger float may be the nearest to several whole numbers.
    if type(id) is float and id.is_integer() and abs(id) <= MAX_EXACT:
        report.add("id-float", list_name, index, place, f"{key} is {short(id)}")
        return int(id)
    report.add("id", list_name, index, place, f"{key} is {found_in(entry, key)}; it must be a number or text.")
    return None


def key_of(id: Id) -> Id:
    """The key to compare ids by: 1 and "1" are the same, "01" is another one."""
    if type(id) is str and len(id) < 20 and id.isascii() and id.lstrip("-").isdigit() and str(int(id)) == id:
        return int(id)
    return id


def place_in_order(id: Id) -> tuple[bool, int, str]:
    """Sorts ids: numbers and text of digits by value, then other text by its letters."""
    is_number = type(id) is int or (len(id) < 20 and id.isascii() and id.isdigit())
    return (False, int(id), str(id)) if is_number else (True, 0, id)


def found_in(entry: dict[str, Any], key: str) -> str:
    return short(entry[key]) if key in entry else "missing"
