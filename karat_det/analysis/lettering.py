"""Makes matplotlib draw names of classes correctly, in any script that a font of the machine has.

matplotlib reads text between two dollar signs as a formula, has one font, DejaVu Sans, unless it is given more, and
before its version 3.11 draws characters from left to right, each by itself.
"""

import functools
import logging
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib import font_manager
from matplotlib.text import Text

logger = logging.getLogger(__name__)

_FIRST_FAMILY = "DejaVu Sans"
# Replaces a character that no font has.
_MISSING = "□"
# Scripts whose letters change their shape or order with their neighbours; by the first and last of their characters.
_JOINED = ("\u0900", "\u0dff"), ("\u0f00", "\u109f"), ("\u1780", "\u17ff")
# From this version on, matplotlib orders and joins letters itself.
_SHAPES_ITSELF = matplotlib.__version_info__ >= (3, 11)


@dataclass(frozen=True)
class Lettering:
    """How some names are drawn.

    Attributes:
        names: each name, as characters to draw from left to right.
        families: fonts that have them, for matplotlib's fallback.
    """

    names: tuple[str, ...]
    families: tuple[str, ...]

    def apply(self, texts: Iterable[Text]) -> None:
        """Makes texts with the names be drawn literally, in these fonts."""
        for text in texts:
            text.set_parse_math(False)
            text.set_fontfamily(list(self.families))


def lettering(names: Sequence[str]) -> Lettering:
    """Finds fonts for names. A character that no font has becomes a box, and is named in the log once.

    Args:
        names: the classes', in any script.
    """
    return _lettering(tuple(map(str, names)))


@functools.lru_cache(maxsize=16)
def _lettering(names: tuple[str, ...]) -> Lettering:
    families = {_FIRST_FAMILY: None}
    missing: dict[str, None] = {}

    def drawn(character: str) -> str:
        family = _family_with(character)
        if family is not None:
            families[family] = None
            return character
        # Invisible: marks of direction, joiners, variants of emoji.
        if unicodedata.category(character) == "Cf" or "\ufe00" <= character <= "\ufe0f":
            return ""
        missing[character] = None
        return _MISSING

    lettered = tuple("".join(map(drawn, _from_left_to_right(name))) for name in names)
    if missing:
        logger.warning(
            "No font of this machine has %s: a box stands for each in the pictures. Install a font that has them, such "
            "as one of Noto Sans.",
            " ".join(f"{c} (U+{ord(c):04X})" if c.isprintable() else f"U+{ord(c):04X}" for c in list(missing)[:20])
            + (" …" if len(missing) > 20 else ""),
        )
    joined = [name for name in lettered if any(first <= c <= last for c in name for first, last in _JOINED)]
    if joined and not _SHAPES_ITSELF:
        logger.warning(
            "matplotlib %s does not join the letters of %s: they stand side by side in the pictures.",
            *(matplotlib.__version__, ", ".join(joined[:5]) + (", …" if len(joined) > 5 else "")),
        )
    return Lettering(lettered, tuple(families))


@functools.cache
def _family_with(character: str) -> str | None:
    """The family of a font that has a character, DejaVu Sans before others; None if none has it."""
    if ord(character) in _characters(font_manager.findfont(_FIRST_FAMILY)):
        return _FIRST_FAMILY
    known = font_manager.fontManager.ttflist
    return _first_family_with(character, known) or _first_family_with(character, _new_fonts())


def _first_family_with(character: str, fonts: Iterable[font_manager.FontEntry]) -> str | None:
    # Upright fonts without serifs are the most readable; Computer Modern has other glyphs for its characters.
    fonts = [font for font in fonts if not font.name.startswith(("cm", "Last Resort"))]
    for font in sorted(fonts, key=lambda font: (font.style != "normal", "Sans" not in font.name, font.name)):
        # matplotlib chooses a font by its family, and there the regular one.
        if ord(character) in _characters(font.fname):
            regular = font_manager.findfont(font.name, fallback_to_default=True)
            if ord(character) in _characters(regular):
                return font.name
    return None


@functools.cache
def _characters(path: str) -> frozenset[int]:
    try:
        return frozenset(font_manager.get_font(path).get_charmap())
    except (OSError, RuntimeError):  # removed since it was listed, or broken
        return frozenset()


@functools.lru_cache(maxsize=1)
def _new_fonts() -> list[font_manager.FontEntry]:
    """Fonts installed after matplotlib made its list, which it keeps in a file; adds them to the list."""
    manager = font_manager.fontManager
    listed = {font.fname for font in manager.ttflist}
    start = len(manager.ttflist)
    for path in sorted(set(font_manager.findSystemFonts()) - listed):
        try:
            manager.addfont(path)
        except Exception as error:  # depends on what is wrong in the file
            logger.debug("%s is no font that matplotlib takes: %s", path, error)
    return manager.ttflist[start:]


def _from_left_to_right(name: str) -> str:
    """A name in the visual order of its characters: one line, accents composed, Arabic letters joined."""
    name = " ".join(unicodedata.normalize("NFC", name).split())
    name = "".join(c for c in name if unicodedata.category(c) != "Cc")
    directions = [unicodedata.bidirectional(c) for c in name]
    if _SHAPES_ITSELF or not {"R", "AL"} & set(directions):
        return name
    return _reordered(_joined_arabic(name))


def _reordered(name: str) -> str:
    """The characters of a name, some of which run from right to left, in their visual order from left to right.

    This is Unicode's bidirectional algorithm without embeddings and mirrored brackets.
    """
    strong = [{"L": False, "R": True, "AL": True}.get(unicodedata.bidirectional(c)) for c in name]
    base = next(to_left for to_left in strong if to_left is not None)
    # Numbers and accents take the direction before them; signs that of their neighbours, where both agree.
    to_left: list[bool | None] = []
    before = base
    for character, own in zip(name, strong, strict=True):
        if own is None and unicodedata.bidirectional(character) not in ("EN", "AN", "NSM"):
            to_left.append(None)
        else:
            before = before if own is None else own
            to_left.append(before)
    runs: list[tuple[bool, str]] = []
    for i, (character, own) in enumerate(zip(name, to_left, strict=True)):
        if own is None:
            behind = next((each for each in to_left[i:] if each is not None), base)
            own = behind if runs and runs[-1][0] == behind else base
        if runs and runs[-1][0] == own:
            runs[-1] = own, runs[-1][1] + character
        else:
            runs.append((own, character))
    ordered = [_mirrored(run) if from_right else run for from_right, run in runs]
    return "".join(reversed(ordered) if base else ordered)


def _mirrored(run: str) -> str:
    """A run from right to left: its last character first, but accents after their letters, and numbers unchanged."""
    return "".join(reversed(re.findall(r"\d+(?:[.,:/]\d+)*|.[\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0670]*", run)))


@functools.lru_cache(maxsize=1)
def _arabic_forms() -> dict[str, dict[str, str]]:
    """For each Arabic letter, or lam with alef, its forms: "isolated", "final", "initial" and "medial"."""
    forms: dict[str, dict[str, str]] = {}
    for code in (*range(0xFB50, 0xFBFF), *range(0xFE70, 0xFEFD)):
        form, *letters = unicodedata.decomposition(chr(code)).split() or [""]
        if form.strip("<>") in ("isolated", "final", "initial", "medial"):
            letter = "".join(chr(int(each, 16)) for each in letters)
            forms.setdefault(letter, {}).setdefault(form.strip("<>"), chr(code))
    return forms


def _joined_arabic(name: str) -> str:
    """The name with each Arabic letter in the form that its neighbours require."""
    forms = _arabic_forms()
    letters: list[str] = []
    for character in name:
        if letters and letters[-1] + character in forms and letters[-1] == "\u0644":  # lam with alef
            letters[-1] += character
        else:
            letters.append(character)
    joined = []
    for i, letter in enumerate(letters):
        own = forms.get(letter, {})
        before, behind = (
            next((each for each in neighbours if not unicodedata.combining(each[0])), "")
            for neighbours in (reversed(letters[:i]), letters[i + 1 :])
        )
        from_before = "final" in own and "initial" in forms.get(before, {})
        to_behind = "initial" in own and "final" in forms.get(behind, {})
        form = {(True, True): "medial", (True, False): "final", (False, True): "initial"}.get(
            (from_before, to_behind), "isolated"
        )
        joined.append(own.get(form, letter))
    return "".join(joined)
