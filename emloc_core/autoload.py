"""Lets transformers load emulators without ``import emloc_core.lowrank``, by torch's entry point ``torch.backends``.

torch calls :func:`watch` when it has been imported, long before a model is loaded. Importing transformers then
would cost every program that uses torch a second, so its import is watched for. ``TORCH_DEVICE_BACKEND_AUTOLOAD=0``
switches all such entry points off.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

#: When this package has been imported, emulators can be registered with it.
_WATCHED = "transformers.quantizers"


def watch() -> None:
    """Register emulators with transformers as soon as its quantizers are imported."""
    if _WATCHED in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    import_module("emloc_core.lowrank")


class _Finder(MetaPathFinder):
    """Finds the one module that is watched for, where it is anyway, and loads it with :class:`_Loader`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Loads a module as its own loader does, and then registers emulators."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register()
