"""Imports Detectron2 without the warnings of its own old calls, and keeps them quiet for the whole process.

For commands, which import it before Detectron2; the rest of the package leaves warnings to whoever uses it.
"""

import logging
import warnings

# Detectron2 calls what torch and timm have since renamed. Its users can do nothing about these warnings.
warnings.filterwarnings("ignore", message="`torch.jit.script", category=FutureWarning)
warnings.filterwarnings("ignore", message="Importing from timm.models.layers", category=FutureWarning)
warnings.filterwarnings("ignore", message=".*broadcast_buffers.* is deprecated", category=FutureWarning)
warnings.filterwarnings("ignore", message="torch.meshgrid: in an upcoming release", category=UserWarning)
logging.getLogger("torch.fx._symbolic_trace").addFilter(lambda record: "is_fx_tracing" not in record.getMessage())
# Where one of several processes has failed; the run's last line gives the reason.
logging.getLogger("torch.multiprocessing.spawn").addFilter(lambda record: "Terminating" not in record.getMessage())
# On a machine with a CUDA compiler and no GPU; Detectron2's table of the environment shows both.
logging.getLogger("torch.utils.cpp_extension").addFilter(lambda record: "No CUDA" not in record.getMessage())

from . import add_karat_config  # noqa: E402, F401  says what to do where there is no Detectron2
