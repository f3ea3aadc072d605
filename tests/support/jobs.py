"""Jobs from what tests have: directories, rows and settings."""

from pathlib import Path
from typing import Any

from emloc_core.adapters.as_trained import AsTrained
from emloc_core.adapters.correct import Correct, prepare
from emloc_core.adapters.merge import Merge
from emloc_core.emulator.compress import Compress
from emloc_core.model.importing import Import
from emloc_core.requests import (
    CompressRequest,
    CorrectRequest,
    ImportRequest,
    MergeRequest,
    PolishRequest,
    TrainRequest,
)
from emloc_core.settings import CompressSettings, CorrectSettings, PolishSettings, TrainSettings
from emloc_core.tuning.exact import prepare as prepare_tuning
from emloc_core.tuning.train import Train


def compress_job(
    model: Any, data: Any, output: Path, settings: CompressSettings | None = None, **more: Any
) -> Compress:
    """Stage 1 on the CPU."""
    arguments = {"model": _directory(model), "output": output, "device": "cpu", **more}
    return Compress(CompressRequest(**arguments, data=_source(data), settings=settings or CompressSettings()))


def train_job(model: Any, data: Any, output: Path, settings: TrainSettings, **more: Any) -> Train:
    """Stage 2 by ordinary steps."""
    request = TrainRequest(model=_directory(model), data=_source(data), output=output, settings=settings, **more)
    return prepare_tuning(request)


def exact_job(model: Any, data: Any, output: Path, settings: TrainSettings, **more: Any) -> Train:
    """Stage 2 by exact steps."""
    arguments = {"model": _directory(model), "output": output}
    return prepare_tuning(TrainRequest(**arguments, data=_source(data), exact=True, settings=settings, **more))


def polish_job(adapter: Any, base: Any, data: Any, output: Path, settings: PolishSettings, **more: Any) -> Train:
    """Exact steps from an adapter."""
    arguments = {"adapter": _directory(adapter), "base": _directory(base), "output": output}
    return prepare_tuning(PolishRequest(**arguments, data=_source(data), settings=settings, **more))


def correct_job(adapter: Any, base: Any, output: Path, settings: CorrectSettings, **more: Any) -> Correct | AsTrained:
    """Stage 3 on the CPU."""
    arguments = {"adapter": _directory(adapter), "base": _directory(base), "output": output, "device": "cpu"}
    return prepare(CorrectRequest(**arguments, settings=settings, **more))


def merge_job(adapter: Any, base: Any, output: Path, **more: Any) -> Merge:
    """A merge."""
    return Merge(MergeRequest(adapter=_directory(adapter), base=_directory(base), output=output, **more))


def import_job(source: Any, output: Path) -> Import:
    """An import."""
    return Import(ImportRequest(source=_directory(source), output=output))


def _directory(source: Any) -> Any:
    """Return the directory of a model, an adapter or spectra, open or not; None for None."""
    return source and str(getattr(source, "directory", source))


def _source(data: Any) -> Any:
    return str(data) if isinstance(data, Path) else data
