"""What a model learns: all that the stages need to know about a model besides its blocks and Linears.

The core's objective is ``tokens`` (:mod:`emloc_core.tokens`). Plugins provide others by the hook ``emloc_objectives``,
and their families name them. Imports nothing heavy.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import Trainer, TrainingArguments

    from emloc_core.algorithms.lora import Lora
    from emloc_core.data.limits import Limits
    from emloc_core.data.row import Row
    from emloc_core.family import Family
    from emloc_core.files.checkpoint import Checkpoint
    from emloc_core.memory.model import MemoryModel, Need
    from emloc_core.model.opened import OpenModel
    from emloc_core.settings import StepSettings

#: What samples are for. Random values of a row, such as noise, are drawn again for each purpose.
Purpose = Literal["calibration", "selection", "evaluation"]


class Sample(Protocol):
    """The inputs and the labels of one forward pass."""

    @property
    def row(self) -> str:
        """The name of its row, for messages."""

    @property
    def others(self) -> "Mapping[str, torch.Tensor]":
        """Tensors that every forward pass of the sample gets unchanged."""

    @property
    def size(self) -> int:
        """Its number of positions, such as tokens."""

    def inputs(self, device: "torch.device | str") -> "dict[str, torch.Tensor]":
        """Return the model's input tensors."""

    def run(self, model: Any, device: "torch.device | str") -> Any:
        """Run the model on the sample, and return its output."""

    def loss(self, model: Any, device: "torch.device | str") -> "torch.Tensor":
        """Run the model on the sample; return the summed loss and the number of summands: (2,), fp64."""


class RowSize(NamedTuple):
    """The size of one row: its tokens, and the patches of its images in the vision tower."""

    tokens: int
    patches: int = 0


class Datasets(NamedTuple):
    """The data sets of a trainer.

    Attributes:
        train: the rows to train on.
        evaluated: the rows to evaluate; None without any.
        sizes: size of each row that is trained on; rows that cannot be are left out.
        processing: the trainer's ``processing_class``; None without one.
    """

    train: Any
    evaluated: Any
    sizes: list[RowSize]
    processing: Any


class Objective(Protocol):
    """What the stages ask for. Its class is called without arguments.

    Attributes:
        type_key: the key of ``config.json`` that names the architecture.
        dtype_key: the key of an emulator's ``config.json`` that names the dtype of its base.
        weights: how the names of weight files begin: ``model`` as in ``model.safetensors``.
        folder: this model's folder in a directory of several; empty if it has its own directory.
        keeps_rows: whether rows that an emulator is calibrated on, or that its correction is chosen on, are never tuned
            on. If not, the random values drawn for them differ.
        task: PEFT's name for it, if it has one.
        library: the hub's name of the library that loads models.
        scored_by: the command that compares systems.
    """

    type_key: str
    dtype_key: str
    weights: str
    folder: str
    keeps_rows: bool
    task: str | None
    library: str
    scored_by: str

    def config(self, path: "Path") -> Any:
        """Return the library's config for a ``config.json``; its ``dtype`` may be None."""

    def build(self, family: "Family", config: Any, dtype: "torch.dtype") -> Any:
        """Return the model of a config, with initial weights; called with parameters that take no memory."""

    def tensor_loader(self, model: Any, conversions: Sequence[Any]) -> Any:
        """Return what makes parameters from a checkpoint's tensors, with the methods of
        :class:`emloc_core.compat.transformers.TensorLoader`."""

    def require_rows(self, rows: "Sequence[Row]", family: "Family") -> None:
        """Refuse rows that the models of a family cannot learn from."""

    def samples(
        self, model: "OpenModel", rows: "Sequence[Row]", max_length: int | None, purpose: Purpose
    ) -> "Sequence[Sample]":
        """Return the samples of rows, in order; rows to evaluate that have no sample are left out."""

    def accompany(self, checkpoint: "Checkpoint", adapter: "Path") -> None:
        """Write what users of an adapter need besides it into its directory."""

    def foreign_tensors(self, model: "OpenModel", loras: "Mapping[str, Lora]") -> "dict[str, torch.Tensor]":
        """Return the tensors of a LoRA of scale 1, by the names that tools other than the hub's libraries use.

        Raises:
            EmlocError: there are no such tools, or they do not support the model.
        """

    def usage(self, kind: str, class_name: str, base: str) -> str | None:
        """Return Python code for the card of an output that loads ``DIRECTORY``; None for transformers' code.

        Args:
            kind: ``emulator``, ``checkpoint``, or an adapter, as in its manifest.
            base: the model that the output was made from.
        """

    def check(self, settings: "StepSettings") -> None:
        """Refuse settings that training cannot use."""

    def measure(
        self, model: "OpenModel", rows: "Sequence[Row]", evaluated: "Sequence[Row]", settings: "StepSettings"
    ) -> dict[str, Any]:
        """Return what a dry run reports about the rows to train on.

        Returns:
            ``longest_tokens`` and ``longest_row``, the positions of the longest row and its name, before anything is
            cut; ``cut_rows``, how many are longer than the settings' ``max_length``; ``dropped_rows``, how many have
            no answer left; ``duplicate_rows``, how many repeat an earlier one; ``examples``, the trainer's number of
            examples from the others.
        """

    def arguments(
        self, settings: "StepSettings", checkpoints: "Path", rows: "Sequence[Row]", *, exact: bool, **fixed: Any
    ) -> "TrainingArguments":
        """Return the trainer's arguments: the settings, and what the stage itself fixes."""

    def datasets(
        self,
        model: "OpenModel",
        rows: "Sequence[Row]",
        evaluated: "Sequence[Row]",
        settings: "StepSettings",
        arguments: "TrainingArguments",
    ) -> Datasets:
        """Return rows as the trainer takes them; sets the arguments that depend on them."""

    def trainer(
        self,
        model: "OpenModel",
        settings: "StepSettings",
        targets: Sequence[str],
        arguments: Any,
        *,
        adapter: "Path | None",
        **options: Any,
    ) -> "Trainer":
        """Return the trainer of a LoRA on the model in memory: an ``emloc_core.tuning.trainer.LoraSteps``.

        Args:
            model: an emulator, or an ordinary model.
            targets: ends of the paths of modules that get a LoRA.
            adapter: directory of the LoRA to train further; None for a new one.
            options: further keyword arguments of the trainer.
        """

    def exact_trainer(self) -> type[Any]:
        """Return the trainer class for exact steps: ``emloc_core.tuning.exact.Streamed`` mixed into a trainer."""

    def vocabulary(self, config: Any) -> int:
        """Return the number of logits per position; 0 without any."""

    def dtype(self, config_file: "Path") -> str | None:
        """Return the dtype of a checkpoint's weights if configs do not say it; None if they do."""

    def longest(
        self, config_file: "Path", family: "Family", rows: "Sequence[Row]", length: int | None, limits: "Limits"
    ) -> "Longest":
        """Return the shape of the largest row, for plans.

        Args:
            config_file: the model's config; what turns rows into inputs is near it.
            rows: the rows, with all answers that are trained on.
            length: the length that they are cut to.
        """

    def step(self, memory: "MemoryModel") -> "Step":
        """Return a step of a plan's workload."""

    def answers(
        self, base: str, adapter: "Path", rows: "Sequence[Row]", *, max_new_tokens: int, guidance: float | None
    ) -> "list[dict[str, str]]":
        """Return ``prompt`` and ``expected`` of every row, and the base's answers ``before`` and ``after`` tuning.

        Each is text, or a picture as a data URL (``data:image/png;base64,``).

        Args:
            max_new_tokens: limit for text.
            guidance: guidance scale for pictures; None for the pipeline's default.
        """

    def trial(self) -> "Trial":
        """Return what the conformance kit makes and runs tiny models with."""


class Longest(NamedTuple):
    """The largest row of some data.

    Attributes:
        length: its number of positions, as plans count them.
        images: its number of images.
        image_size: height and width of the largest image in pixels; None if the model takes only one size.
    """

    length: int
    images: int = 0
    image_size: tuple[int, int] | None = None


class Step(Protocol):
    """The rows of a step in a plan: shapes without contents.

    Attributes:
        inputs: all that the trace of a forward pass depends on, besides the model and its LoRA.
        row: the size of a row.
        logits: the number of logits of a row.
    """

    inputs: Mapping[str, Any]
    row: RowSize
    logits: int

    def positions(self, path: str) -> int:
        """Return the number of a row's positions that pass through a module."""

    def waiting(self, purpose: Purpose, rows: int) -> int:
        """Return the bytes of the samples of ``rows`` rows, or of all if fewer, while they wait at a block."""

    def before(self) -> "Sequence[Need]":
        """Return the memory that making samples needs before the model is in memory; empty if negligible."""

    def tracing(self, model: Any) -> AbstractContextManager[Any]:
        """Make all tensors fake while the context is active, and yield the mode."""

    def widths(self, model: Any) -> Sequence[int]:
        """Return the last dimensions by which logits are recognised among activations."""

    def prepare(self, lora: Any, *, checkpointing: bool) -> None:
        """Make a PEFT model compute as its trainer does."""

    def loss(self, lora: Any) -> "tuple[torch.Tensor, Any]":
        """Pass all rows through a PEFT model at once; return the loss, and what lives until the step is done."""

    def predict(self, model: Any, enter: "Callable[[torch.Tensor, str], None]") -> None:
        """Pass all rows through the base at once, as for its first answer; ``enter`` is told what tensors are."""


class Trial(Protocol):
    """What the conformance kit asks for: tiny models, and their samples."""

    def has_class(self, name: str) -> bool:
        """Return whether the library has the class that a family declares."""

    def config(self, settings: "Mapping[str, Any]") -> Any:
        """Return the library's config for the settings of a tiny one.

        Raises:
            EmlocError: the library refuses it.
        """

    def samples(self, family: "Family", config: Any) -> "Sequence[Sample]":
        """Return the samples that a tiny model is run on."""

    def rows(self, samples: Sequence[Any]) -> "list[Row]":
        """Return rows that stand in for the samples in a stage."""

    def save(self, model: Any, config: Any, directory: "Path") -> None:
        """Write a tiny model, with all files that the stages need."""

    def load(self, family: "Family", directory: "Path") -> Any:
        """Return the model or emulator in a directory, as its users load it."""

    def unpacked(self, model: Any) -> Any:
        """Return an emulator in memory with ordinary weights."""

    def loss(self, model: Any, sample: Any) -> "torch.Tensor":
        """Return a loss of the model's output, with its gradient."""
