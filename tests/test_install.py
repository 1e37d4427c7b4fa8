"""`make install` and tools/install_detectron2.py, as far as they can be tried without a network."""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
INSTALLED_FILES = ("requirements.txt", "constraints.txt", "setup.py", "tools/install_detectron2.py")


@pytest.fixture
def installer():
    """tools/install_detectron2.py as a module."""
    spec = importlib.util.spec_from_file_location("install_detectron2", ROOT / "tools/install_detectron2.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_download(monkeypatch, installer, content: bytes) -> list[tuple[str, ...]]:
    """Lets pip "download" a file with `content` without a network; returns the list of pip's calls, as they come."""
    calls = []

    def pip(*arguments: str) -> int:
        calls.append(arguments)
        if arguments[0] == "download":
            folder = Path(arguments[arguments.index("--dest") + 1])
            (folder / "sal_detectron2-0.7.2-cp310-none-any.whl").write_bytes(content)
        return 0

    monkeypatch.setattr(installer, "pip", pip)
    return calls


def pretend_missing(monkeypatch, installer) -> None:
    monkeypatch.setattr(installer.util, "find_spec", lambda name: None)


def test_installed_detectron2_is_left_alone(monkeypatch, installer, capsys):
    calls = write_download(monkeypatch, installer, b"")
    monkeypatch.setattr(installer, "import_error", lambda: None)
    monkeypatch.setattr(installer, "installed_version", lambda: "0.7")
    installer.main()
    assert calls == []
    assert "nothing to do" in capsys.readouterr().out


def test_file_with_another_hash_is_named_and_not_installed(monkeypatch, installer):
    pretend_missing(monkeypatch, installer)
    calls = write_download(monkeypatch, installer, b"something else")
    with pytest.raises(SystemExit) as stop:
        installer.main()
    for part in (installer.SHA256, hashlib.sha256(b"something else").hexdigest(), "cp310", "from source"):
        assert part in str(stop.value)
    assert [call[0] for call in calls] == ["download"]


def test_right_file_is_installed_for_any_python_without_its_requirements(monkeypatch, installer):
    pretend_missing(monkeypatch, installer)
    calls = write_download(monkeypatch, installer, b"the wheel")
    monkeypatch.setattr(installer, "SHA256", hashlib.sha256(b"the wheel").hexdigest())
    monkeypatch.setattr(installer, "import_error", lambda: None)
    installer.main()
    command, *options, wheel = calls[-1]
    assert command == "install"
    assert "--no-deps" in options
    assert Path(wheel).name == "sal_detectron2-0.7.2-py3-none-any.whl"


def test_failed_download_names_the_network_and_the_other_way(monkeypatch, installer):
    pretend_missing(monkeypatch, installer)
    monkeypatch.setattr(installer, "pip", lambda *arguments: 1)
    with pytest.raises(SystemExit, match=r"(?s)network connection.*from source"):
        installer.main()


def test_broken_detectron2_of_the_user_is_not_replaced(monkeypatch, installer):
    calls = write_download(monkeypatch, installer, b"")
    monkeypatch.setattr(installer, "import_error", lambda: "ImportError: undefined symbol")
    monkeypatch.setattr(installer, "belongs_to_user", lambda: True)
    with pytest.raises(SystemExit, match="undefined symbol"):
        installer.main()
    assert calls == []


def test_every_direct_requirement_is_pinned():
    def names(file: str) -> set[str]:
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
        return {line.split("=")[0].split(">")[0] for line in lines if line and not line.startswith("#")}

    assert names("requirements.txt") <= names("constraints.txt")


@pytest.fixture
def checkout(tmp_path):
    """A folder with the files that `make install` looks at, and nothing installed."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    for file in ("Makefile", *INSTALLED_FILES):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    return tmp_path


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    # Without the flags that a `make test` around this one has left in the environment.
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return subprocess.run(["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def pretend_installed(folder: Path) -> None:
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/python").symlink_to(sys.executable)
    (folder / ".venv/.installed").touch()


def write_python(file: Path, version: str, has_ensurepip: bool) -> Path:
    """A stand-in for a Python of the given version that can say its version and whether it has ensurepip."""
    file.write_text(
        f'#!/bin/sh\ncase "$*" in *version_info*) echo {version};; *ensurepip*) exit {0 if has_ensurepip else 1};; '
        '*) echo "called with $*" >&2; exit 1;; esac\n'
    )
    file.chmod(0o755)
    return file


def test_second_make_install_does_nothing(checkout):
    pretend_installed(checkout)
    assert make(checkout, "--question", "install").returncode == 0


@pytest.mark.parametrize("changed", INSTALLED_FILES)
def test_make_installs_again_after_a_change(checkout, changed):
    pretend_installed(checkout)
    stamp_time = (checkout / ".venv/.installed").stat().st_mtime
    os.utime(checkout / changed, (stamp_time + 10, stamp_time + 10))
    assert make(checkout, "--question", "install").returncode == 1


@pytest.mark.parametrize("version", ["2.7", "3.9", "3.14"])
def test_make_refuses_other_pythons(checkout, version):
    python = write_python(checkout / "some-python", version, has_ensurepip=True)
    result = make(checkout, "install", f"PYTHON={python}")
    assert result.returncode != 0
    assert f"needs Python 3.10 to 3.13, and '{python}' is Python {version}" in result.stderr
    assert "make install PYTHON=python3.12" in result.stderr
    assert not (checkout / ".venv").exists()


def test_make_names_a_python_that_does_not_run(checkout):
    result = make(checkout, "install", "PYTHON=no-such-python")
    assert result.returncode != 0
    assert "'no-such-python' does not run" in result.stderr


def test_make_names_the_debian_package_that_is_missing(checkout):
    python = write_python(checkout / "some-python", "3.11", has_ensurepip=False)
    result = make(checkout, "install", f"PYTHON={python}")
    assert result.returncode != 0
    assert "apt install python3.11-venv" in result.stderr


def test_unfinished_installation_is_begun_anew(checkout):
    pretend_installed(checkout)
    (checkout / ".venv/.installed").rename(checkout / ".venv/.unfinished")
    result = make(checkout, "install", "PYTHON=no-such-python")
    assert result.returncode != 0
    assert "did not finish" in result.stdout
    assert not (checkout / ".venv").exists()
