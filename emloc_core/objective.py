"""What a model learns: all that the stages need to know of a model besides its blocks and Linears.

The core's own objective is ``tokens`` (:mod:`emloc_core.tokens`). Plugins provide others by the hook
``emloc_objectives``, and their families name them. Imports nothing heavy.
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

#: What samples are for. Where something is drawn for a row, such as noise, it is drawn again for each.
Purpose = Literal["calibration", "selection", "evaluation"]


class Sample(Protocol):
    """One forward of a model, and what it should answer."""

    @property
    def row(self) -> str:
        """What messages call the row that it was made from."""

    @property
    def others(self) -> "Mapping[str, torch.Tensor]":
        """Tensors that every forward of the sample gets as they are."""

    @property
    def size(self) -> int:
        """How many positions it has: tokens, say."""

    def inputs(self, device: "torch.device | str") -> "dict[str, torch.Tensor]":
        """Return the tensors that the model gets."""

    def run(self, model: Any, device: "torch.device | str") -> Any:
        """Pass through the model, and return what it answers."""

    def loss(self, model: Any, device: "torch.device | str") -> "torch.Tensor":
        """Pass through the model; return the summed loss, and how many numbers of it are summed: (2,), fp64."""


class RowSize(NamedTuple):
    """The size of one row: its tokens, and the patches that its images are to the vision tower."""

    tokens: int
    patches: int = 0


class Datasets(NamedTuple):
    """What a trainer gets.

    Attributes:
        train: the rows to train on.
        evaluated: those to evaluate; None without any.
        sizes: of each row that is trained on; rows that cannot be are left out.
        processing: what the trainer calls its ``processing_class``; None without one.
    """

    train: Any
    evaluated: Any
    sizes: list[RowSize]
    processing: Any


class Objective(Protocol):
    """What the stages ask for. It is made without arguments.

    Attributes:
        type_key: the key of ``config.json`` that names the architecture.
        dtype_key: the key of an emulator's that names the dtype of its base.
        weights: how the names of files of weights begin: ``model`` as in ``model.safetensors``.
        folder: where this model is in a directory of several; empty if it has one of its own.
        keeps_rows: whether rows that an emulator is calibrated on, or that its correction is chosen on, are never tuned
            on. If not, what is drawn for them differs.
        task: PEFT's name for it, if it has one.
        library: the library that loads models, as the hub calls it.
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
        """Return the model of a config, with initial weights; called where parameters take no memory."""

    def tensor_loader(self, model: Any, conversions: Sequence[Any]) -> Any:
        """Return what makes parameters of a checkpoint's tensors, with the methods of
        :class:`emloc_core.compat.transformers.TensorLoader`."""

    def require_rows(self, rows: "Sequence[Row]", family: "Family") -> None:
        """Refuse rows that the models of a family cannot learn from."""

    def samples(
        self, model: "OpenModel", rows: "Sequence[Row]", max_length: int | None, purpose: Purpose
    ) -> "Sequence[Sample]":
        """Return the samples of rows, in the order of the rows; of rows to evaluate, those without any are left out."""

    def accompany(self, checkpoint: "Checkpoint", adapter: "Path") -> None:
        """Write into the directory of an adapter what its users need beside it."""

    def elsewhere(self, model: "OpenModel", loras: "Mapping[str, Lora]") -> "dict[str, torch.Tensor]":
        """Return a LoRA of scale 1 by the names that other tools than the hub's libraries have for its tensors.

        Raises:
            EmlocError: there are no such tools, or they have no such model.
        """

    def usage(self, kind: str, class_name: str, base: str) -> str | None:
        """Return Python that loads an output, ``DIRECTORY``, for its card; None: what the card says of transformers.

        Args:
            kind: ``emulator``, ``checkpoint``, or an adapter, as in its manifest.
            class_name: of the model.
            base: what the output was made from.
        """

    def check(self, settings: "StepSettings") -> None:
        """Refuse settings that training has no use for."""

    def measure(
        self, model: "OpenModel", rows: "Sequence[Row]", evaluated: "Sequence[Row]", settings: "StepSettings"
    ) -> dict[str, Any]:
        """Return what a dry run says of the rows to train on.

        Returns:
            ``longest_tokens`` and ``longest_row``, the positions of the longest row and its name, before anything is
            cut; ``cut_rows``, how many are longer than the settings' ``max_length``; ``dropped_rows``, of which no
            answer is left; ``duplicate_rows``, which occur before; ``examples``, how many the others are to the
            trainer.
        """

    def arguments(
        self, settings: "StepSettings", checkpoints: "Path", rows: "Sequence[Row]", *, exact: bool, **fixed: Any
    ) -> "TrainingArguments":
        """Return the trainer's arguments: the settings, and what the stage itself sets."""

    def datasets(
        self,
        model: "OpenModel",
        rows: "Sequence[Row]",
        evaluated: "Sequence[Row]",
        settings: "StepSettings",
        arguments: "TrainingArguments",
    ) -> Datasets:
        """Return rows as the trainer takes them; arguments that depend on them are set."""

    def trainer(
        self, model: "OpenModel", settings: "StepSettings", targets: Sequence[str], arguments: Any, **given: Any
    ) -> "Trainer":
        """Return the trainer of a new LoRA on the model in memory: an ``emloc_core.tuning.trainer.LoraSteps``.

        Args:
            model: an emulator, or an ordinary model.
            settings: how to train.
            targets: ends of the paths of modules that get a LoRA.
            arguments: the trainer's.
            given: what the trainer is given besides.
        """

    def exact_trainer(self) -> type[Any]:
        """Return the class of trainers of exact steps: ``emloc_core.tuning.exact.Streamed``, and one that trains."""

    def exact_steps(self) -> type[Any]:
        """Return what takes the gradients of exact steps: a subclass of ``emloc_core.exact.steps.ExactSteps``."""

    def vocabulary(self, config: Any) -> int:
        """Return how many logits a position has at once; 0 without any."""

    def dtype(self, config_file: "Path") -> str | None:
        """Return the dtype of a checkpoint's weights, where its config does not say; None if configs do."""

    def longest(
        self, config_file: "Path", family: "Family", rows: "Sequence[Row]", length: int | None, limits: "Limits"
    ) -> "Longest":
        """Return the shape of the largest row, for plans.

        Args:
            config_file: the model's; what rows are turned into inputs by is near it.
            family: of the model.
            rows: with every answer of theirs that is trained on.
            length: to which they are cut.
            limits: of the model.
        """

    def step(self, memory: "MemoryModel") -> "Step":
        """Return a step of the workload of a plan."""

    def answers(
        self, base: str, adapter: "Path", rows: "Sequence[Row]", *, max_new_tokens: int, guidance: float | None
    ) -> "list[dict[str, str]]":
        """Return ``prompt`` and ``expected`` of every row, and what the base answers ``before`` tuning and ``after``.

        Each is text, or a picture as a URL that holds it (``data:image/png;base64,``).

        Args:
            max_new_tokens: of text.
            guidance: of pictures; None: as the pipeline has it.
        """

    def trial(self) -> "Trial":
        """Return what the conformance kit makes tiny models with."""


class Longest(NamedTuple):
    """The largest row of some data.

    Attributes:
        length: its positions, as plans count the length of rows.
        images: how many images a model reads with it.
        image_size: height and width of the largest of them in pixels; None where they are of one size.
    """

    length: int
    images: int = 0
    image_size: tuple[int, int] | None = None


class Step(Protocol):
    """The rows of a step as plans know them: shapes without contents.

    Attributes:
        inputs: all that a trace of a forward depends on, besides the model and its LoRA.
        row: the positions of a row.
        logits: how many numbers are the logits of a row.
    """

    inputs: Mapping[str, Any]
    row: RowSize
    logits: int

    def positions(self, path: str) -> int:
        """Return how many positions of a row pass through a module."""

    def waiting(self, purpose: Purpose, rows: int) -> int:
        """Return the bytes of the samples of so many rows while they wait at a block; of fewer, if there are."""

    def before(self) -> "Sequence[Need]":
        """Return what is needed before the model is in memory, to make samples of rows; nothing, or next to it: ()."""

    def tracing(self, model: Any) -> AbstractContextManager[Any]:
        """Make all tensors fake while the context is active, and yield the mode."""

    def widths(self, model: Any) -> Sequence[int]:
        """Return the last dimensions that tell logits from other activations."""

    def prepare(self, lora: Any, *, checkpointing: bool) -> None:
        """Make a PEFT model compute as its trainer does."""

    def loss(self, lora: Any) -> "tuple[torch.Tensor, Any]":
        """Pass the rows at once through a PEFT model; return their loss, and what is there until the step is done."""

    def predict(self, model: Any, enter: "Callable[[torch.Tensor, str], None]") -> None:
        """Pass the rows at once through the base, as for its first answer; ``enter`` tells what tensors are."""


class Trial(Protocol):
    """What the conformance kit asks for: tiny models, and what they are run on."""

    def has_class(self, name: str) -> bool:
        """Return whether the library has the class that a family declares."""

    def config(self, settings: "Mapping[str, Any]") -> Any:
        """Return the library's config of a tiny config.

        Raises:
            EmlocError: the library refuses it.
        """

    def samples(self, family: "Family", config: Any) -> "Sequence[Sample]":
        """Return what a tiny model is run on."""

    def rows(self, samples: Sequence[Any]) -> "list[Row]":
        """Return rows that a stage can be given in their place."""

    def save(self, model: Any, config: Any, directory: "Path") -> None:
        """Write a tiny model, with all that the stages need beside it."""

    def load(self, family: "Family", directory: "Path") -> Any:
        """Return the model or emulator in a directory, as its users load it."""

    def unpacked(self, model: Any) -> Any:
        """Return an emulator in memory with ordinary weights."""

    def loss(self, model: Any, sample: Any) -> "torch.Tensor":
        """Return a loss of what a model answers, with its gradient."""
