"""Kolmogorov-Arnold attention itself. It imports torch and nothing else; `backends.triton`, Triton too."""

from .bias import Bias
from .config import KArAtConfig, parse_shorthand
from .module import KArAtAttention
from .operator import KArAtOperator

__all__ = ["Bias", "KArAtAttention", "KArAtConfig", "KArAtOperator", "parse_shorthand"]
