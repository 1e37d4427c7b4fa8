"""Findings of a reader of annotations: counted by rule, and reported in few lines that name list, index and id."""

import logging
import reprlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

logger = logging.getLogger(__name__)

MAX_LINES = 20

_short = reprlib.Repr()
_short.maxlist = _short.maxdict = 12
_short.maxstring = 60

Verdict = Literal["put right", "refused", "left out"]


@dataclass(frozen=True)
class Rule:
    """A fault that a file may have.

    Attributes:
        verdict: "put right": read as surely meant, with a counted warning; "refused": the run does not start;
            "left out": the entry is not used, neither in training nor in evaluation, with a counted warning.
        part: the list or entry that it is in, such as "images".
        text: the fault and what becomes of it, for the documentation and the log.
    """

    verdict: Verdict
    part: str
    text: str


class Report:
    """Collects findings, for one error or a warning for each rule.

    Args:
        source: the user's name for the file.
        rules: the rules by key.
        documentation: the page with the rules.
    """

    def __init__(self, source: str, rules: Mapping[str, Rule], documentation: str):
        self.source = source
        self.counts: dict[str, int] = defaultdict(int)
        self._rules = rules
        self._documentation = documentation
        self._lines: dict[str, list[tuple[int, str]]] = defaultdict(list)
        self._order = 0

    def add(
        self, rule: str, list_name: str = "", index: int = -1, entry: Any = None, detail: str | Callable[[], str] = ""
    ) -> None:
        """Notes one finding.

        Args:
            rule: key of the rule.
            list_name, index, entry: its place, for example "annotations", 3 and the annotation; default the whole file.
            detail: the finding, or a function that returns it, for findings of which a million may occur and few show.
        """
        self.counts[rule] += 1
        if len(self._lines[rule]) < MAX_LINES:
            self._order += 1
            place = f"{place_of(list_name, index, entry)}: " if list_name else ""
            self._lines[rule].append((self._order, place + (detail() if callable(detail) else detail)))

    def raise_refused(self) -> None:
        """Raises ValueError if anything was refused, in at most `MAX_LINES` lines."""
        refused = [rule for rule in self.counts if self._rules[rule].verdict == "refused"]
        total = sum(self.counts[rule] for rule in refused)
        if total:
            # Each rule has a line before any has a second one: a frequent fault must not hide a rare one.
            turns = sorted((turn, *line) for rule in refused for turn, line in enumerate(self._lines[rule]))
            shown = turns[: MAX_LINES - 1 if total < MAX_LINES else MAX_LINES - 2]
            lines = [f"\n  {text}" for _, _, text in sorted(shown, key=lambda line: line[1])]
            if total > len(shown):
                lines.append(f"\n  … and {total - len(shown)} more.")
            raise ValueError(
                f"{self.source} is not in COCO format as {self._documentation} describes it: "
                + (lines[0].strip() if total == 1 else f"{total} errors." + "".join(lines))
            )

    def log(self) -> None:
        """Logs what was put right or left out, in a warning for each rule."""
        for rule, count in self.counts.items():
            verdict, first = self._rules[rule].verdict, self._lines[rule][0][1]
            logger.warning("%s: %d %s: %s First: %s", self.source, count, verdict, self._rules[rule].text, first)


def place_of(list_name: str, index: int, entry: Any) -> str:
    """The place of an entry, such as "annotations[3] (id 4, image_id 7)"."""
    names = {"annotations": ("id", "image_id"), "images": ("id", "file_name")}.get(list_name, ("id", "name"))
    known = [f"{name} {short(entry[name])}" for name in names if isinstance(entry, dict) and name in entry]
    return f"{list_name}[{index}]" + (f" ({', '.join(known)})" if known else "")


def short(value: Any) -> str:
    """The value as it is written, on one line of some 60 characters at most; quick, whatever its size."""
    text = repr(value) if isinstance(value, (int, float)) else _short.repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
