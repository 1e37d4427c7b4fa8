"""Kolmogorov-Arnold attention itself. It imports torch and nothing else; `kernels`, Triton too."""

from .functional import Bias
from .module import KArAtAttention
from .operator import KArAtConfig, KArAtOperator

__all__ = ["Bias", "KArAtAttention", "KArAtConfig", "KArAtOperator"]
