import os
from pathlib import Path

# Small tensors gain nothing from several threads, and processes that the tests start would fight for the cores.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

import karat_det  # noqa: F401  before any import of Detectron2, of whose old calls it silences the warnings

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def configs() -> Path:
    """The folder of the YAML configs."""
    return ROOT / "configs"


@pytest.fixture(scope="session")
def coco_tiny() -> Path:
    """A folder that holds coco/annotations, coco/train2017 and coco/val2017 with a few images of COCO."""
    folder = os.environ.get("KARAT_COCO_TINY")
    if not folder:
        pytest.skip("KARAT_COCO_TINY names no folder with a small sample of COCO (coco/annotations, coco/train2017, …)")
    return Path(folder)
