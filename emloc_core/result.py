"""A stage's finished output: a path-like object that reads its manifest and loads its content."""

import os
from functools import cached_property
from pathlib import Path
from typing import Any

from emloc_core.files.documents import read_json
from emloc_core.files.output import MANIFEST, TIMING


class Result(os.PathLike[str]):
    """A finished output directory. Every function of the Python API accepts it as a path.

    Attributes:
        path: the directory.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"<{self.kind} at {self.path}>"

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The content of ``emloc.json``: kind, request, result, versions."""
        content: dict[str, Any] = read_json(self.path / MANIFEST)
        return content

    @property
    def kind(self) -> str:
        """What the directory holds: emulator, adapter, corrected-adapter, checkpoint, evaluation."""
        return str(self.manifest["kind"])

    @property
    def result(self) -> dict[str, Any]:
        """What the stage measured: the error of every Linear, losses, metrics."""
        found: dict[str, Any] = self.manifest["result"]
        return found

    @property
    def timing(self) -> dict[str, Any]:
        """What varies from run to run: ``seconds``, ``peak_rss_bytes``."""
        content: dict[str, Any] = read_json(self.path / TIMING)
        return content

    def load(self) -> Any:
        """Load what the directory holds, on the GPU if there is one.

        Returns:
            For an emulator or a checkpoint, the transformers model; for an adapter, a ``PeftModel`` on the model that
            the adapter names; for an evaluation, its results as a dict.

        Raises:
            EmlocError: it cannot be loaded, or an adapter's model is not where the adapter says.
        """
        if self.kind == "evaluation":
            return read_json(self.path / "results.json")
        from emloc_core.evaluation.system import load_system

        if "adapter" not in self.kind:
            return load_system(self.path, None)[0]
        from emloc_core.adapters.adapter import Adapter
        from emloc_core.files.checkpoint import open_checkpoint

        return load_system(open_checkpoint(Adapter(self.path).model_name).directory, self.path)[0]
