"""EMLoC: fine-tune a large model in the memory that inference needs.

::

    import emloc_core as emloc

    tuned = emloc.tune("org/model", "train.jsonl", "tuned", memory="24GiB", steps=300)  # all of it; or stage by stage:

    emulator = emloc.compress("org/model", "train.jsonl", "emulator", memory="24GiB")
    adapter = emloc.train(emulator, "train.jsonl", "adapter", steps=300)
    corrected = emloc.correct(adapter)
    polished = emloc.polish(corrected, "train.jsonl")
    model = emloc.merge(polished, "merged").load()

Importing this package imports nothing heavy; a function imports what it needs when it is called. To load an emulator
with plain ``transformers`` needs no import where EMLoC is installed; see :mod:`emloc_core.compat.autoload`.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emloc_core.api import (
        chat,
        compress,
        convert_layout,
        correct,
        evaluate,
        export,
        load_family,
        merge,
        plan,
        polish,
        push,
        run,
        train,
        tune,
    )
    from emloc_core.errors import EmlocError
    from emloc_core.stages.progress import ProgressEvent
    from emloc_core.stages.result import Result, RunResult

try:
    __version__ = version("emloc")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

#: Modules of the public names that are not from ``api``.
_ELSEWHERE = {
    "EmlocError": "errors",
    "ProgressEvent": "stages.progress",
    "Result": "stages.result",
    "RunResult": "stages.result",
}

__all__ = [
    "EmlocError",
    "ProgressEvent",
    "Result",
    "RunResult",
    "chat",
    "compress",
    "convert_layout",
    "correct",
    "evaluate",
    "export",
    "load_family",
    "merge",
    "plan",
    "polish",
    "push",
    "run",
    "train",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ELSEWHERE.get(name, 'api')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
