"""Package metadata. What is needed at run time is listed in requirements.txt, tried versions in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def read_requirements() -> list[str]:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in map(str.strip, lines) if line and not line.startswith("#")]


setup(
    name="karat_det",
    version="0.1.0",
    description="Kolmogorov-Arnold attention (KArAt) in Detectron2's detectors",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["karat_det", "karat_det.*"]),
    package_data={"karat_det.attention.backends": ["*.cpp", "*.h"]},
    # Detectron2 is left out: people bring their own, or take the one that tools/install_detectron2.py installs.
    install_requires=read_requirements(),
    extras_require={"test": ["pytest>=7.4", "pytest-xdist>=3.5", "hypothesis>=6.80", "ruff>=0.6"]},
)
