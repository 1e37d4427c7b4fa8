"""Kolmogorov-Arnold attention itself. It imports torch and nothing else; `backends.triton`, Triton too.

In the order to read: `config`, `operator`, the equation, `basis`, its families of functions, `module`, the layer around
it, `window`, the windows of ViTDet and Swin, and `backends`, which sum over scores.
"""

from .bias import Bias
from .config import KArAtConfig, parse_shorthand
from .module import KArAtAttention
from .operator import KArAtOperator

__all__ = ["Bias", "KArAtAttention", "KArAtConfig", "KArAtOperator", "parse_shorthand"]
