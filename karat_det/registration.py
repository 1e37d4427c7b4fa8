"""Registers the backbones and the embedded dataset with Detectron2, as soon as Detectron2 is imported.

`import karat_det` must do so: a spawned process may import nothing else of the package, and build the model of a config
that comes pickled. But it must not import Detectron2, for `import karat_det.attention`, which needs torch alone, runs
it too. No import statement does both; so Python's import system is made to import ours after what it registers with,
whoever imports that.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# Detectron2's packages with a registry, and ours whose import registers there.
_REGISTERED_IN = {"detectron2.modeling": "karat_det.backbones", "detectron2.data": "karat_det.data"}


def begin() -> None:
    """Registers now where Detectron2 is imported, else when it will be."""
    sys.meta_path.insert(0, _ImportOursAfterTheirs())
    for theirs, ours in _REGISTERED_IN.items():
        if theirs in sys.modules:
            import_module(ours)


class _ImportOursAfterTheirs(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _REGISTERED_IN:
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, found), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_both(module: ModuleType) -> None:
                execute(module)
                import_module(_REGISTERED_IN[name])

            spec.loader.exec_module = execute_both
        return spec
