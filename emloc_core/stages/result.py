"""A stage's finished output: a path-like object that reads its manifest and loads its content."""

import os
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Literal, NotRequired, TypedDict, TypeVar

from emloc_core.files.documents import read_json
from emloc_core.files.manifest import MANIFEST
from emloc_core.files.output import TIMING

Content = TypeVar("Content")


class LinearResult(TypedDict):
    """A Linear of an emulator: its rank, or the reason why it stayed dense, and its relative output error."""

    path: str
    block: str
    group: list[str]
    tap: str
    in_features: int
    out_features: int
    rank: int | None
    reason: str | None
    relative_error: float | None


class VocabularyResult(TypedDict):
    """A packed matrix of the vocabulary: the layers that have it, how it is packed, and its relative output error."""

    path: str
    layers: list[str]
    packing: str
    rows: int
    features: int
    relative_error: float


class EmulatorResult(TypedDict):
    """What ``compress`` found. ``tokens`` counts the calibration rows' tokens."""

    family: str
    base: str
    bytes: dict[Literal["base", "emulator"], int]
    parameters: dict[str, int]
    coverage: dict[str, Any]
    tokens: int
    linears: list[LinearResult]
    vocabulary: list[VocabularyResult]
    sha256: str


class AdapterResult(TypedDict):
    """What ``train`` and ``polish`` found. Losses are in nats per token; evaluation losses are the kept step's."""

    steps: int
    train_loss: float | None
    rows: int
    dropped_rows: int
    longest_tokens: int
    excluded_rows: int
    trainable_parameters: int
    target_modules: list[str]
    sha256: str
    eval_rows: NotRequired[int]
    best_step: NotRequired[int]
    eval_loss: NotRequired[float]
    eval_base_loss: NotRequired[float]


class CandidateResult(TypedDict):
    """A way to carry a LoRA over: its loss per token on the held-out rows, and its gain over none in nats per row."""

    clamp: float | Literal["none"]
    scale: float
    nll: float
    gain: float | None
    gain_stderr: float | None
    rows: int


class CorrectionResult(TypedDict):
    """What ``correct`` chose, and with ``clamp="auto"`` what it compared."""

    clamp: float | Literal["none"]
    scale: float
    linears: int
    sha256: str
    nll: NotRequired[float]
    candidates: NotRequired[list[CandidateResult]]


class MergeResult(TypedDict):
    """What ``merge`` wrote."""

    merged_linears: int
    replaced: list[str]
    untied: list[str]
    bytes: int


class ExportResult(TypedDict, total=False):
    """What ``export`` wrote: of an adapter its Linears and rank, of GGUF the number of tensors."""

    linears: int
    rank: int
    warnings: list[str]
    tensors: int
    sha256: str


class ImportResult(TypedDict):
    """What ``convert_layout`` read and wrote."""

    layout: str
    model_type: str
    tensors: int
    split: int
    bytes: int


#: What ``evaluate`` found: by system, its metrics.
EvaluationResult = dict[str, dict[str, float]]


class RunSummary(TypedDict):
    """What ``run`` found: timings by stage, the directory of the last output, and with an emulator its size."""

    stages: dict[str, dict[str, float]]
    final: str
    compression: NotRequired[dict[str, dict[str, int]]]
    correction: NotRequired[CorrectionResult]
    systems: NotRequired[EvaluationResult]
    stderr: NotRequired[dict[str, dict[str, float | None]]]
    metrics: NotRequired[dict[str, dict[str, Any]]]
    tasks: NotRequired[dict[str, dict[str, Any]]]
    answers: NotRequired[list[dict[str, str]]]
    pushed: NotRequired[str]


class _Directory(os.PathLike[str]):
    """A directory, ``path``. Every function of the Python API accepts it as a path."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)


class RunResult(_Directory):
    """The directory of a finished run."""

    def __repr__(self) -> str:
        return f"<run at {self.path}>"

    @cached_property
    def result(self) -> RunSummary:
        """The content of ``results.json``."""
        return read_json(self.path / "results.json")

    @property
    def final(self) -> "Result[Any]":
        """The last output: the merged model, or the last adapter."""
        return Result(self.path / self.result["final"])


class Result(_Directory, Generic[Content]):
    """A finished output directory of one stage."""

    def __repr__(self) -> str:
        return f"<{self.kind} at {self.path}>"

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The content of ``emloc.json``: kind, request, result, versions."""
        return read_json(self.path / MANIFEST)

    @property
    def kind(self) -> str:
        """The kind of output: emulator, adapter, corrected-adapter, checkpoint, evaluation."""
        return str(self.manifest["kind"])

    @property
    def result(self) -> Content:
        """What the stage measured: the error of every Linear, losses, metrics."""
        return self.manifest["result"]

    @property
    def timing(self) -> dict[str, Any]:
        """What varies from run to run: ``seconds``, ``peak_rss_bytes``."""
        return read_json(self.path / TIMING)

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
        from emloc_core.evaluation.loading import load_system

        if "adapter" not in self.kind:
            return load_system(self.path, None)[0]
        from emloc_core.adapters.adapter import Adapter
        from emloc_core.files.checkpoint import open_checkpoint

        return load_system(open_checkpoint(Adapter(self.path).model_name).directory, self.path)[0]
