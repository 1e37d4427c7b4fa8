"""Names of classes as they are drawn: literally, in fonts that have their characters, from left to right."""

import warnings

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from karat_det.analysis import lettering as module
from karat_det.analysis.lettering import lettering


@pytest.fixture(autouse=True)
def fonts(monkeypatch):
    """matplotlib's own fonts and what a test adds, none of the machine's."""
    manager = font_manager.fontManager
    own = [font for font in manager.ttflist if "mpl-data" in font.fname]
    monkeypatch.setattr(manager, "ttflist", own)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [])

    def forget():
        for function in (module._lettering, module._family_with, module._new_fonts):
            function.cache_clear()
        font_manager.fontManager._findfont_cached.cache_clear()

    forget()
    yield
    monkeypatch.undo()
    forget()


def make_font(path, family, characters, style="Regular"):
    """A font in which each of some characters is a black square."""
    builder = FontBuilder(1000, isTTF=True)
    names = [".notdef", *(f"uni{ord(c):04X}" for c in characters)]
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(c): name for c, name in zip(characters, names[1:], strict=True)})
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for point in ((0, 900), (900, 900), (900, 0)):
        pen.lineTo(point)
    pen.closePath()
    square = pen.glyph()
    builder.setupGlyf(dict.fromkeys(names, square))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": family, "styleName": style})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return str(path)


def draw(name):
    """The pixels of a name and what matplotlib warns of."""
    letters = lettering([name])
    figure = Figure(figsize=(6, 1))
    canvas = FigureCanvasAgg(figure)
    text = figure.text(0, 0.3, letters.names[0], size=20, family="sans-serif")
    letters.apply([text])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., 0]


def ink(name):
    return int((draw(name) < 128).sum())


@pytest.mark.parametrize("name", ["$a$", "$$", "US$ and A$", r"$\frac{1}{2}$", r"\$x\$", "a_b^c", "$\\nonsense$"])
def test_dollars_and_backslashes_are_drawn_as_they_are(name):
    assert lettering([name]).names == (name,)
    # As wide as its characters: a formula drops the dollars, and ends in an error where it is none.
    columns = (draw(name) < 128).any(axis=0)
    figure = Figure()
    FigureCanvasAgg(figure)
    widths = [figure.text(0, 0, each, size=20, parse_math=False).get_window_extent().width for each in name]
    assert np.flatnonzero(columns)[-1] > 0.8 * sum(widths)


def test_characters_that_dejavu_sans_lacks_come_from_a_font_that_has_them(tmp_path, caplog):
    font_manager.fontManager.addfont(make_font(tmp_path / "Cats.ttf", "Cats", "猫"))
    letters = lettering(["a 猫", "dog"])
    assert letters.names == ("a 猫", "dog") and letters.families == ("DejaVu Sans", "Cats")
    assert not caplog.records
    square = ink("a 猫") - ink("a ")
    assert 500 < square < 1500


def test_several_scripts_take_several_fonts(tmp_path):
    for family, characters in (("Cats", "猫"), ("Gats", "बिल"), ("Hats", "🐈")):
        font_manager.fontManager.addfont(make_font(tmp_path / f"{family}.ttf", family, characters))
    letters = lettering(["猫", "🐈", "मल"])
    assert set(letters.families) == {"DejaVu Sans", "Cats", "Gats", "Hats"}
    assert letters.names == ("猫", "🐈", "□ल")
    assert ink("猫🐈ल") > 2.5 * ink("猫")


def test_a_font_that_was_installed_after_matplotlib_made_its_list_is_found(tmp_path, monkeypatch, caplog):
    path = make_font(tmp_path / "New Cats.ttf", "New Cats", "猫")
    broken = tmp_path / "broken.ttf"
    broken.write_bytes(b"no font")
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [path, str(broken)])
    assert lettering(["猫"]).families == ("DejaVu Sans", "New Cats")
    assert not caplog.records


def test_a_family_whose_regular_font_lacks_the_character_is_not_taken(tmp_path):
    font_manager.fontManager.addfont(make_font(tmp_path / "Two.ttf", "Two", "犬"))
    font_manager.fontManager.addfont(make_font(tmp_path / "TwoBold.ttf", "Two", "猫", style="Bold"))
    assert lettering(["猫"]).names == ("□",)


def test_what_no_font_has_is_a_box_and_named_once(caplog):
    names = ["猫", "a猫b", "\ud800", "👍"]
    for _ in range(3):
        assert lettering(names).names == ("□", "a□b", "□", "□")
    assert len(caplog.records) == 1
    assert "No font of this machine has 猫 (U+732B) U+D800 👍 (U+1F44D)" in caplog.text
    assert draw("a猫b").any()


def test_letters_that_matplotlib_does_not_join_are_named(tmp_path, caplog):
    font_manager.fontManager.addfont(make_font(tmp_path / "Gats.ttf", "Gats", "हिन्दी"))
    lettering(["हिन्दी", "cat"])
    assert "does not join the letters of हिन्दी:" in caplog.text


@pytest.mark.parametrize(
    "name, drawn",
    [
        ("cat\nand\tdog", "cat and dog"),
        ("cat\u200b\u200f", "cat"),
        ("☺\ufe0f", "☺"),
        ("cafe\u0301", "café"),
        ("a\x07b", "ab"),
        ("", ""),
        (7, "7"),
    ],
)
def test_what_is_not_seen_is_not_drawn(name, drawn, caplog):
    letters = lettering([name])
    seen = "".join(c for c in letters.names[0] if c not in "\u200b\u200f\ufe0f")
    assert seen == drawn and not caplog.records
    draw(name)


needs_order = pytest.mark.skipif(module._SHAPES_ITSELF, reason="this matplotlib orders and joins letters itself")


@needs_order
@pytest.mark.parametrize(
    "name, drawn",
    [
        ("כלב", "בלכ"),
        ("כלב חום", "םוח בלכ"),
        ("כלב 12", "12 בלכ"),
        ("dog כלב", "dog בלכ"),
        ("dog כלב חום 3 cat", "dog 3 םוח בלכ cat"),
        ("כלב 12 dog", "dog 12 בלכ"),
        ("כלב dog 12", "dog 12 בלכ"),
        ("כלב, 1.5-2", "2-1.5 ,בלכ"),
        ("כָּלֶב", "בלֶכָּ"),
        # Joined: qaf begins, tah is in the middle, teh marbuta ends.
        ("قطة", "\ufe94\ufec4\ufed7"),
        # A dal joins nothing behind it.
        ("دد", "\ufea9\ufea9"),
        ("سلام", "\ufee1\ufefc\ufeb3"),
        ("لا", "\ufefb"),
    ],
)
def test_scripts_from_right_to_left_stand_so_and_arabic_letters_are_joined(name, drawn):
    assert lettering([name]).names == (drawn,)
    draw(name)
