"""Datasets and the mappers that turn their records into what the model takes.

Importing it registers the embedded dataset with Detectron2.
"""

from . import digits

digits.register_digits()
