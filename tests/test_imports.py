"""What importing the package does, each time in a process that has imported nothing else of it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import karat_det

FOREIGN = {"detectron2", "timm", "torchvision", "fvcore"}
CHECK = f"import sys\nassert not {FOREIGN} & sys.modules.keys()\n"
# Where karat_det has been imported but for these lines, Detectron2 finds what it registers.
REGISTERED = """
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import BACKBONE_REGISTRY
for name in ("build_vitdet_karat_backbone", "build_swin_karat_fpn_backbone"):
    assert callable(BACKBONE_REGISTRY.get(name))
assert "digits_train" in DatasetCatalog and len(MetadataCatalog.get("digits_val").thing_classes) == 10
"""


def run(code: str, *arguments: str, **options) -> None:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr


def test_the_attention_imports_torch_and_nothing_else():
    run("import karat_det.attention\n" + CHECK)


def test_the_attention_works_where_it_is_copied(tmp_path):
    shutil.copytree(Path(karat_det.__file__).parent / "attention", tmp_path / "copied")
    code = """
import torch
from copied import KArAtAttention, KArAtConfig, KArAtOperator
attention = KArAtAttention(8, 2, KArAtOperator(2, 4, KArAtConfig(rank=2)))
attention(torch.randn(1, 4, 8)).sum().backward()
assert attention.operator.coefficients.grad.any()
import sys
assert "karat_det" not in sys.modules
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    run(code + CHECK, cwd=tmp_path, env=environment)


def test_the_package_sets_no_filters_of_warnings():
    run("import torch, warnings\nbefore = list(warnings.filters)\nimport karat_det\nassert warnings.filters == before")


FIRST = (
    "import karat_det",
    "import detectron2.modeling, detectron2.data, karat_det",
    "import karat_det.attention, detectron2.config",
    "from karat_det import add_karat_config",
    "from karat_det import replace_attention",
    "import karat_det.backbones.classifiers",
    "import karat_det.data.coco_datasets",
    "import karat_det.engine.trainer",
)
# What both packages import takes most of the time: it is imported once, and each statement has a fork.
FORKS = """
import os, sys, traceback
import cv2, fvcore.common.config, matplotlib.pyplot, timm, torchvision
assert not {"detectron2", "karat_det"} & sys.modules.keys()
failed = False
for code in sys.argv[1:]:
    child = os.fork()
    if not child:
        try:
            exec(code, {})
        except BaseException:
            print(code, traceback.format_exc(), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    failed |= os.waitpid(child, 0)[1] != 0
sys.exit(failed)
"""


def test_detectron2_finds_backbones_and_dataset_whatever_is_imported_first():
    run(FORKS, *(first + REGISTERED for first in FIRST))


def test_a_name_that_needs_detectron2_says_how_to_install_it():
    code = """
import sys
class NotInstalled:
    def find_spec(name, path=None, target=None):
        if name == "detectron2":
            raise ModuleNotFoundError("No module named 'detectron2'", name=name)
sys.meta_path.insert(0, NotInstalled)
import karat_det.attention
try:
    from karat_det import add_karat_config
except ModuleNotFoundError as error:
    assert "make install" in str(error) and error.name == "detectron2", error
else:
    raise AssertionError
"""
    run(code)
