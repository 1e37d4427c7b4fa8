"""Kolmogorov-Arnold attention itself. It imports torch and nothing else; `kernels`, Triton too."""

from .config import KArAtConfig
from .functional import Bias
from .module import KArAtAttention
from .operator import KArAtOperator

__all__ = ["Bias", "KArAtAttention", "KArAtConfig", "KArAtOperator"]
