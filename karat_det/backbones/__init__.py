"""KArAt inside other people's transformers. Importing it registers the detectors' backbones with Detectron2."""

from . import swin, vitdet  # noqa: F401
