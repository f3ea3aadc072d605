"""Lighter imports: what libraries do while they are imported, and few programs need, is put off until it is needed.

PEFT imports bitsandbytes wherever it is installed; with torch's compiler that was two of the six seconds before a first
step. ``-X importtime`` shows where the others go.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial, wraps
from importlib import import_module, metadata
from importlib.util import find_spec
from types import ModuleType
from typing import Any
from unittest import mock

from emloc_core.compat.imports import when_imported, while_imported


def lighten() -> None:
    """Have bitsandbytes, transformers and TRL do less where they are imported from now on."""
    while_imported("bitsandbytes", _compiling_when_called)
    when_imported("transformers.utils.import_utils", _reading_folders_once)
    while_imported("transformers.loss.loss_utils", _matching_when_called)
    while_imported("trl.import_utils", _listing_when_asked)


@contextmanager
def _compiling_when_called() -> Iterator[None]:
    """Have ``torch.compile`` import the compiler when a function is called, not when it is decorated."""
    import torch

    with mock.patch.object(torch, "compile", partial(_compiled_when_called, torch.compile)):
        yield


def _compiled_when_called(compiler: Any, function: Callable[..., Any] | None = None, **options: Any) -> Any:
    if function is None:
        return partial(_compiled_when_called, compiler, **options)
    compiled = cache(partial(compiler, function, **options))

    @wraps(function)
    def call(*args: Any, **named: Any) -> Any:
        return compiled()(*args, **named)

    return call


def _reading_folders_once() -> None:
    """Have transformers look for names in the files of all its models once; it names their folder in two ways."""
    module: Any = sys.modules["transformers.utils.import_utils"]
    read = cache(module.create_import_structure_from_path)

    def read_once(place: str | os.PathLike[str]) -> Any:
        name = os.fspath(place)
        return read(os.path.dirname(name) if name.endswith(".py") else name)

    module.create_import_structure_from_path = read_once


@contextmanager
def _matching_when_called() -> Iterator[None]:
    """Have the losses of object detection, which all models import, import scipy when they are computed."""
    name = "scipy.optimize"
    if name in sys.modules or find_spec("scipy") is None:
        yield
        return
    standing_in: Any = ModuleType(name)

    def linear_sum_assignment(*args: Any, **named: Any) -> Any:
        return import_module(name).linear_sum_assignment(*args, **named)

    standing_in.linear_sum_assignment = linear_sum_assignment
    sys.modules[name] = standing_in
    try:
        yield
    finally:
        del sys.modules[name]


@contextmanager
def _listing_when_asked() -> Iterator[None]:
    """Have TRL read the files of all installed packages when it asks what package a module is of."""
    with mock.patch.object(metadata, "packages_distributions", partial(_Packages, metadata.packages_distributions)):
        yield


class _Packages(dict[str, list[str]]):
    """Packages by the name of a module that they have: the one of the same name, without reading all others' files."""

    def __init__(self, read: Callable[[], Any]) -> None:
        self._read = cache(read)

    def __missing__(self, module: str) -> list[str]:
        try:
            return [metadata.metadata(module)["Name"]]
        except metadata.PackageNotFoundError:
            found: list[str] = self._read()[module]
            return found
