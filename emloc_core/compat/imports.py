"""Python's import system: acts while or as soon as a module is imported, at no cost if it never is.

The standard library has no hook for this (PEP 369, which proposed one, was withdrawn). ``sys.meta_path`` is public.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


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
    """Enter the context that ``around`` makes while a module is imported; do nothing if it has been imported."""
    if name not in sys.modules:
        sys.meta_path.insert(0, _Finder(name, around))


@contextmanager
def imported_when_used(*names: str) -> Iterator[None]:
    """Delay importing modules until something that is imported from them in this context is used."""
    standing_in = {name: _StandIn(name) for name in names if name not in sys.modules and find_spec(name)}
    sys.modules.update(standing_in)
    try:
        yield
    finally:
        for name in standing_in:
            del sys.modules[name]


class _StandIn(ModuleType):
    """Stands in for a module; names imported from it need not exist until they are used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Later(lambda: getattr(import_module(self.__name__), name))


class _Later:
    """A function or class of a module that is not imported before it is used."""

    def __init__(self, find: Callable[[], Any]) -> None:
        self._find = find

    def __getattr__(self, name: str) -> Any:
        return getattr(self._find(), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._find()(*args, **kwargs)

    def __instancecheck__(self, instance: Any) -> bool:
        return isinstance(instance, self._find())


class _Finder(MetaPathFinder):
    """Finds the one module that is watched for, as other finders do, and loads it with :class:`_Loader`."""

    def __init__(self, name: str, around: Callable[[], AbstractContextManager[None]]) -> None:
        self.name, self._around = name, around

    def find_spec(self, fullname: str, *_: Any) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)  # which others may watch for too
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
