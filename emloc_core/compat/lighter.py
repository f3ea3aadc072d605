"""Lighter imports: work that libraries do on import, and few programs need, is put off until it is needed.

PEFT imports bitsandbytes wherever it is installed; with torch's compiler that was two of the six seconds before a first
step. ``-X importtime`` shows where the others go.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial, wraps
from importlib import metadata
from typing import Any
from unittest import mock

from emloc_core.compat.imports import imported_when_used, when_imported, while_imported

#: Imports that modules hardly use: for losses of object detection, which come with every model, and for types in
#: signatures.
_RARELY_USED = {
    "transformers.loss.loss_utils": ("scipy.optimize",),
    "trl.trainer.utils": ("pandas", "datasets"),
}


def lighten() -> None:
    """Have bitsandbytes, transformers and TRL do less where they are imported from now on."""
    while_imported("bitsandbytes", _compiling_when_called)
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_news)
    when_imported("transformers.utils.import_utils", _reading_folders_once)
    for name, used in _RARELY_USED.items():
        while_imported(name, partial(imported_when_used, *used))
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
    def call(*args: Any, **kwargs: Any) -> Any:
        return compiled()(*args, **kwargs)

    return call


def _is_news(record: logging.LogRecord) -> bool:
    """Return False for the warning that a kernel for some CPUs is missing: bitsandbytes uses its own instead."""
    return not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward")


def _reading_folders_once() -> None:
    """Have transformers look for names in the files of all its models once; it names their folder in two ways."""
    module: Any = sys.modules["transformers.utils.import_utils"]
    read = cache(module.create_import_structure_from_path)

    def read_once(path: str | os.PathLike[str]) -> Any:
        name = os.fspath(path)
        return read(os.path.dirname(name) if name.endswith(".py") else name)

    module.create_import_structure_from_path = read_once


@contextmanager
def _listing_when_asked() -> Iterator[None]:
    """Have TRL read the files of all installed packages when it asks for a module's package."""
    with mock.patch.object(metadata, "packages_distributions", partial(_Packages, metadata.packages_distributions)):
        yield


class _Packages(dict[str, list[str]]):
    """Packages by the name of a module in them: the one of the same name, without reading all other packages' files."""

    def __init__(self, read: Callable[[], Any]) -> None:
        self._read = cache(read)

    def __missing__(self, module: str) -> list[str]:
        try:
            return [metadata.metadata(module)["Name"]]
        except metadata.PackageNotFoundError:
            return self._read()[module]
