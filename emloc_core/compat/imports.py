"""Python's import system: does something while or as soon as a module is imported, at no cost where it never is.

The standard library has no hook for this (PEP 369, which proposed one, was withdrawn). ``sys.meta_path`` is public.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


def when_imported(name: str, action: Callable[[], object]) -> None:
    """Call ``action`` when a module has been imported: now, if it has been."""
    if name in sys.modules:
        action()
        return

    @contextmanager
    def then_act() -> Iterator[None]:
        yield
        action()

    while_imported(name, then_act)


def is_being_imported(name: str) -> bool:
    """Return whether the import of a module has begun and not ended."""
    return bool(getattr(getattr(sys.modules.get(name), "__spec__", None), "_initializing", False))


def while_imported(name: str, around: Callable[[], AbstractContextManager[None]]) -> None:
    """Be in the context that ``around`` makes while a module is imported; nothing is done if it has been."""
    watched = any(isinstance(finder, _Finder) and finder.name == name for finder in sys.meta_path)
    if name not in sys.modules and not watched:
        sys.meta_path.insert(0, _Finder(name, around))


class _Finder(MetaPathFinder):
    """Finds the one module that is watched for, where it is anyway, and loads it with :class:`_Loader`."""

    def __init__(self, name: str, around: Callable[[], AbstractContextManager[None]]) -> None:
        self.name, self._around = name, around

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._around)
        return spec


class _Loader(Loader):
    """Loads a module as its own loader does, in the context that it was watched for."""

    def __init__(self, loader: Loader, around: Callable[[], AbstractContextManager[None]]) -> None:
        self._loader, self._around = loader, around

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        with self._around():
            self._loader.exec_module(module)
