"""Kolmogorov-Arnold attention itself. It imports torch and nothing else; `kernels`, Triton too."""

from .module import KArAtAttention
from .operator import KArAtConfig, KArAtOperator

__all__ = ["KArAtAttention", "KArAtConfig", "KArAtOperator"]
