"""Installs Detectron2 into the environment of the Python that runs this, unless it is there already.

Detectron2 has no release on PyPI. The PyPI package sal-detectron2 0.7.2 is its main branch of 2024-04-17: apart from
nine lines, version included, its Python is the same file by file. Its wheel is tagged for Python 3.10 because of one
optional compiled module that karat_det never uses, so the wheel is downloaded, its SHA-256 is checked, and it is
installed under the name of a wheel for any Python. Its list of requirements is left out, since it asks for numpy < 2
although Detectron2 runs with numpy 2; requirements.txt has its needs.

Usage: python tools/install_detectron2.py
"""

import hashlib
import signal
import subprocess
import sys
import tempfile
from importlib import metadata, util
from pathlib import Path

PACKAGE = "sal-detectron2"
VERSION = "0.7.2"
SHA256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"
# The parts that karat_det uses. A broken or half-copied Detectron2 fails at one of them.
USED_MODULES = (
    "detectron2.config",
    "detectron2.data",
    "detectron2.engine",
    "detectron2.evaluation",
    "detectron2.modeling",
    "detectron2.utils.visualizer",
)
ALTERNATIVE = (
    "Instead, you can build the main branch of github.com/facebookresearch/detectron2 from source:\n"
    f"  {sys.executable} -m pip install --no-build-isolation --no-deps "
    "git+https://github.com/facebookresearch/detectron2.git\n"
    "A Detectron2 that can be imported is left as it is."
)


def main() -> None:
    if util.find_spec("detectron2") is not None:
        error = import_error()
        if error is None:
            print(f"Detectron2 {installed_version()} is installed already: nothing to do.")
            return
        if belongs_to_user():
            raise SystemExit(
                f"The Detectron2 in {package_folder()} cannot be imported:\n\n{error}\n\n"
                "Repair it, or uninstall it and run this again."
            )
        print(f"The Detectron2 in {package_folder()} is incomplete: installing it again.")

    with tempfile.TemporaryDirectory() as folder:
        wheel = download(Path(folder))
        check_sha256(wheel, SHA256)
        wheel = wheel.rename(wheel.with_name(f"{PACKAGE.replace('-', '_')}-{VERSION}-py3-none-any.whl"))
        # --no-deps also spares the reader pip's complaint about numpy < 2.
        if pip("install", "--quiet", "--no-deps", "--force-reinstall", str(wheel)) != 0:
            raise SystemExit(f"pip could not install {wheel.name}; its message is above.\n{ALTERNATIVE}")

    error = import_error()
    if error is not None:
        raise SystemExit(
            f"Detectron2 is installed, but cannot be imported:\n\n{error}\n\n"
            "If a module is missing, install what requirements.txt lists: "
            f"{sys.executable} -m pip install --requirement requirements.txt"
        )
    print(f"Installed Detectron2 ({PACKAGE} {VERSION}).")


def download(folder: Path) -> Path:
    """Downloads the wheel of Detectron2 into `folder` and returns its path."""
    print(f"Downloading {PACKAGE} {VERSION}: Detectron2's main branch of 2024-04-17, as a wheel")
    options = ("--quiet", "--no-deps", "--only-binary=:all:", "--python-version", "3.10", "--dest", str(folder))
    failed = pip("download", *options, f"{PACKAGE}=={VERSION}") != 0
    wheels = list(folder.glob("*.whl"))
    if failed or len(wheels) != 1:
        raise SystemExit(
            f"pip could not download {PACKAGE} {VERSION}; its message is above. Is there a network connection?\n"
            f"Run this again when there is.\n{ALTERNATIVE}"
        )
    return wheels[0]


def check_sha256(wheel: Path, expected: str) -> None:
    """Stops unless `wheel` has the SHA-256 `expected` (hexadecimal): no other file than the tried one is installed."""
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != expected:
        raise SystemExit(
            f"{wheel.name} is not the file that karat_det was tried with, and was not installed.\n"
            f"  expected SHA-256 {expected}\n"
            f"  found    SHA-256 {found}\n{ALTERNATIVE}"
        )


def pip(*arguments: str) -> int:
    return subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]).returncode


def import_error() -> str | None:
    """The last line of the traceback if a part of Detectron2 that karat_det uses cannot be imported, else None."""
    code = "; ".join(f"import {module}" for module in USED_MODULES)
    # In a process of its own: an import that failed halfway stays half done, and PyTorch is large.
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return None if result.returncode == 0 else result.stderr.strip().splitlines()[-1]


def belongs_to_user() -> bool:
    """Whether the Detectron2 that is found is someone's own, not what an interrupted run of this command left."""
    own_distribution = any(dist.name == "detectron2" for dist in metadata.distributions())
    return own_distribution or "site-packages" not in package_folder().parts


def package_folder() -> Path:
    return Path(util.find_spec("detectron2").submodule_search_locations[0])


def installed_version() -> str:
    code = "import detectron2; print(detectron2.__version__)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends without a trace
    main()
