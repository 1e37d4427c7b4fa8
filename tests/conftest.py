import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

# GPUs are hidden from the tests and from all that they start, so that these are the same on every machine, and so that
# four processes of tests do not share one GPU's memory. A test that is marked `gpu` runs in a process of its own, which
# sees them: CUDA reads this variable once, and a GPU that a test has broken stays so until its process ends.
_SEES_GPUS = "KARAT_TEST_SEES_GPUS"
# The workers of pytest-xdist inherit it.
_VISIBLE = "KARAT_TEST_VISIBLE_DEVICES"
if _SEES_GPUS not in os.environ:
    os.environ.setdefault(_VISIBLE, os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# Small tensors gain nothing from several threads, and processes that the tests start would fight for the cores.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

import karat_det.quiet  # noqa: F401, E402  before Detectron2, whose imports warn of their own old calls

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    marker = item.get_closest_marker("gpu")
    if marker is None:
        return
    needed = marker.args[0] if marker.args else 1
    found = _num_gpus()
    if found < needed:
        gpus = "1 GPU" if needed == 1 else f"{needed} GPUs"
        # Named: pytest's summary would give this line for all of them.
        pytest.skip(f"{item.name} needs {gpus}, and PyTorch finds {found} on this machine")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if pyfuncitem.get_closest_marker("gpu") is None or _SEES_GPUS in os.environ:
        return None
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", pyfuncitem.nodeid]
    done = subprocess.run(
        command, cwd=pyfuncitem.config.rootpath, env=_environment_with_gpus(), capture_output=True, text=True
    )
    if done.returncode:
        pytest.fail(f"{' '.join(command)}\n{done.stdout}{done.stderr}", pytrace=False)
    return True


@lru_cache
def _num_gpus() -> int:
    if _SEES_GPUS in os.environ:
        return torch.cuda.device_count()
    count = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    done = subprocess.run(count, env=_environment_with_gpus(), capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def _environment_with_gpus() -> dict[str, str]:
    # Neither what hides them nor what would make the one test run in several processes.
    environment = {key: x for key, x in os.environ.items() if key not in ("CUDA_VISIBLE_DEVICES", "PYTEST_ADDOPTS")}
    environment[_SEES_GPUS] = "1"
    if os.environ[_VISIBLE] != "all":
        environment["CUDA_VISIBLE_DEVICES"] = os.environ[_VISIBLE]
    return environment


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


@pytest.fixture
def interpreted(monkeypatch):
    """The kernels run by Triton's interpreter, but for what it does not know: fast sines, and products of bfloat16."""
    triton = pytest.importorskip(
        "triton", reason="Triton comes with PyTorch's CUDA builds for Linux, and this is another"
    )
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    from karat_det.attention.backends import triton as kernels

    launched = ("_forward_kernel", "_query_gradient_kernel", "_key_gradient_kernel")
    for name, function in list(vars(kernels).items()):
        if isinstance(function, triton.JITFunction):
            inside = InterpretedFunction(function.fn)
            # Called by itself, a function that others use would prepare the interpreter anew each time: 20 ms.
            monkeypatch.setattr(kernels, name, inside if name in launched else inside.rewrite())
    # Looked up when called: the interpreter replaces the functions of the language while it runs.
    exact = SimpleNamespace(fast_sinf=lambda x: tl.sin(x), fast_cosf=lambda x: tl.cos(x))
    monkeypatch.setattr(kernels, "libdevice", exact)
    monkeypatch.setattr(kernels, "_dot", lambda a, b: tl.dot(a.to(tl.float32), b.to(tl.float32)))
