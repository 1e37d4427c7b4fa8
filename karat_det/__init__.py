"""Kolmogorov-Arnold attention for object detection and instance segmentation on Detectron2.

Importing the package registers its backbones and its embedded dataset with Detectron2.
"""

import logging
import warnings

# Detectron2 calls what torch and timm have since renamed. Its users can do nothing about these warnings.
warnings.filterwarnings("ignore", message="`torch.jit.script", category=FutureWarning)
warnings.filterwarnings("ignore", message="Importing from timm.models.layers", category=FutureWarning)
warnings.filterwarnings("ignore", message=".*broadcast_buffers.* is deprecated", category=FutureWarning)
warnings.filterwarnings("ignore", message="torch.meshgrid: in an upcoming release", category=UserWarning)
logging.getLogger("torch.fx._symbolic_trace").addFilter(lambda record: "is_fx_tracing" not in record.getMessage())
# On a machine with a CUDA compiler and no GPU; Detectron2's table of the environment says it better.
logging.getLogger("torch.utils.cpp_extension").addFilter(lambda record: "No CUDA" not in record.getMessage())

try:
    import detectron2  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "detectron2":
        raise
    raise ModuleNotFoundError(
        "karat_det needs Detectron2, which is not on PyPI. `make install` in the project's folder installs it, as does "
        "`python tools/install_detectron2.py`; or build it from source, as its own INSTALL.md says.",
        name="detectron2",
    ) from None

from .backbones import swin as _swin  # noqa: E402, F401  registers build_swin_karat_fpn_backbone
from .backbones import vitdet as _vitdet  # noqa: E402, F401  registers build_vitdet_karat_backbone
from .backbones.replace import replace_attention  # noqa: E402
from .config import add_karat_config  # noqa: E402
from .data.digits import register_digits  # noqa: E402

__all__ = ["add_karat_config", "replace_attention"]

register_digits()
