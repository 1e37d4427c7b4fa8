"""Kolmogorov-Arnold attention for object detection and instance segmentation on Detectron2.

Importing the package registers its backbones and its embedded dataset with Detectron2, see registration.py. Detectron2
itself is imported with the names below, or by its user: `karat_det.attention` needs torch alone.
"""

from importlib import import_module
from typing import Any

from . import registration

__all__ = ["add_karat_config", "replace_attention"]

registration.begin()


def __getattr__(name: str) -> Any:
    homes = {"add_karat_config": ".config", "replace_attention": ".backbones.replace"}
    if name not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(homes[name], __name__), name)
    except ModuleNotFoundError as error:
        if error.name != "detectron2":
            raise
        raise ModuleNotFoundError(
            "karat_det needs Detectron2, which is not on PyPI. `make install` in the project's folder installs it, as "
            "does `python tools/install_detectron2.py`; or build it from source, as its own INSTALL.md says.",
            name="detectron2",
        ) from None
