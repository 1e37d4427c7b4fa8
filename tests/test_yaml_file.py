"""No YAML file hangs, grows without bounds, runs code, or loses a value without a word."""

import os
import time

import pytest

from karat_det.yaml_file import read_config, read_yaml

LAUGHS = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("a: 1\nb: 2\na: 3\n", "the key 'a' is there twice, in lines 1 and 3"),
        ("a:\n  b: 1\n  c: 2\n  b: 3\n", "the key 'b' is there twice, in lines 2 and 4"),
        (LAUGHS, "stands for more than 10,000 values"),
        ("x: &x {y: 1}\n" + "z:\n  <<: [" + ", ".join(["*x"] * 9_999) + "]\n", "stands for more than"),
        ("a: &a\n  b: *a\n", "line 2 refers to what it is in itself"),
        ("a: [" * 100, "levels deep"),
        ("[" * 100_000, "levels deep"),
        ("a: " + "- " * 5_000 + "1", "sequence entries are not allowed here"),
        ("- a\n- b\n", "it holds a list"),
        ("hello", "it holds a str"),
        ("", "it is empty"),
        ("# nothing\n", "it is empty"),
        ("a: 1\n---\na: 2\n", "but found another document, in line 2"),
        ("a:\n\tb: 1\n", "cannot start any token, in line 2"),
        ("a: !!python/object/apply:os.mkdir [made]\n", "could not determine a constructor for the tag"),
        ("a: !mine 3\n", "could not determine a constructor for the tag"),
        ("1: 2\n", "the key '1' in line 1 is no word"),
        ("yes: 2\n", "the key 'yes' in line 1 is no word"),
        ("[a]: 2\n", "in line 1 is no word"),
        ("a: *b\n", "found undefined alias 'b'"),
        ("a: [", "expected the node content"),
        (b"a: \xff\xfe\n", "it is not in UTF-8"),
        ("a: ü".encode("latin1"), "it is not in UTF-8"),
        ("a: 1".encode("utf-16"), "it is not in UTF-8"),
        ("a: \0", "special characters are not allowed"),
        ("a: " + "1" * 5_000, "Exceeds the limit"),
        ("a: " + "x" * 2_000_000, "more than 1,000,000 bytes"),
        ("a: " + "[]\n", None),
    ],
)
def test_what_is_no_plain_mapping_is_refused_by_file_and_line(tmp_path, monkeypatch, content, why):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    start = time.process_time()
    if why is None:
        assert read_yaml("mine.yaml", "config") == {"a": []}
        return
    with pytest.raises(ValueError, match=r"mine\.yaml is no config that can be read: ") as caught:
        read_yaml("mine.yaml", "config")
    assert why in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert time.process_time() - start < 2
    assert not (tmp_path / "made").exists()


def test_references_and_marks_of_an_editor_are_read(tmp_path):
    text = "\ufeffa: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: {<<: [*a], z: [*a, *a]}\n"
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    a = {"x": 1, "y": 2}
    expected = {"a": a, "b": {"x": 1, "y": 3}, "c": {**a, "z": [a, a]}}
    assert read_yaml(tmp_path / "mine.yaml", "config") == expected


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "loop"])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path, kind):
    path = tmp_path / "mine.yaml"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else path)
    for read in (read_config, lambda path: read_yaml(path, "study")):
        with pytest.raises(ValueError, match=rf"mine\.yaml is a .*{kind}"):
            read(path)


def test_bases_lie_below_and_one_below_another(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "base.yaml").write_text("A: {B: 1, C: 2}\nD: [1]\n")
    (tmp_path / "other.yaml").write_text("_BASE_: below/base.yaml\nA: {C: 3}\n")
    (tmp_path / "third.yaml").write_text("A: {E: 4}\n")
    (tmp_path / "mine.yaml").write_text("_BASE_: [other.yaml, third.yaml]\nD: [2]\nA: {B: {X: 1}}\n")
    assert read_config(tmp_path / "mine.yaml") == {"A": {"B": {"X": 1}, "C": 3, "E": 4}, "D": [2]}


@pytest.mark.parametrize("way", ["itself", "another", "link", "list"])
def test_a_config_that_is_its_own_base_is_refused(tmp_path, way):
    base = {"itself": "mine.yaml", "another": "other.yaml", "link": "link.yaml", "list": "[third.yaml, ./mine.yaml]"}
    (tmp_path / "mine.yaml").write_text(f"_BASE_: {base[way]}\n")
    (tmp_path / "other.yaml").write_text(f"_BASE_: {tmp_path}/../{tmp_path.name}/mine.yaml\n")
    (tmp_path / "third.yaml").write_text("A: 1\n")
    (tmp_path / "link.yaml").symlink_to("mine.yaml")
    with pytest.raises(ValueError, match=r"is its own _BASE_: .*mine\.yaml → "):
        read_config(tmp_path / "mine.yaml")


def test_bases_without_end_are_refused(tmp_path):
    for number in range(40):
        (tmp_path / f"{number}.yaml").write_text(f"_BASE_: [{number + 1}.yaml, {number + 1}.yaml]\n")
    (tmp_path / "40.yaml").write_text("A: 1\n")
    with pytest.raises(ValueError, match=r"0\.yaml is made of more than 50 files by _BASE_"):
        read_config(tmp_path / "0.yaml")


@pytest.mark.parametrize("base", ["3", "{a: 1}", "[1]", "''", "nowhere.yaml", "https://example.com/a.yaml", "null"])
def test_a_base_that_is_no_file_is_named(tmp_path, base):
    (tmp_path / "mine.yaml").write_text(f"_BASE_: {base}\n")
    with pytest.raises((ValueError, FileNotFoundError), match=r"mine\.yaml.*_BASE_"):
        read_config(tmp_path / "mine.yaml")
