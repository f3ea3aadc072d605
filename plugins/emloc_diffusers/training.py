"""Trains a LoRA on pictures, by transformers' Trainer: on the model in memory, or by exact steps.

Noise and times are drawn within the step, from torch's global state, which the Trainer saves and restores.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch.utils.data import Dataset
from transformers import TrainingArguments, set_seed

from emloc_core.compat.transformers import recomputing_field, use_one_gpu
from emloc_core.exact.steps import ExactSteps
from emloc_core.files.pretrained import load_lora
from emloc_core.model.opened import OpenModel
from emloc_core.objective import RowSize
from emloc_core.settings import StepSettings, TrainSettings
from emloc_core.tuning.exact import Streamed
from emloc_core.tuning.trainer import SETTINGS, LoraSteps, refusing
from emloc_core.tuning.trl import lora_config, trainer_fields
from emloc_diffusers.calls import call_of
from emloc_diffusers.encoding import Encoded
from emloc_diffusers.flow import Drawn, Times, squared_error

#: The key of a batch's groups of pictures of one shape.
GROUPS = "groups"


class StreamedArguments(TrainingArguments):
    """Transformers' arguments for a model that is not moved: its weights are read when they are needed."""

    place_model_on_device = False


def arguments(settings: StepSettings, checkpoints: Path, *, exact: bool, **fixed: Any) -> TrainingArguments:
    """Return the trainer's arguments; see :meth:`emloc_core.objective.Objective.arguments`."""
    fields = trainer_fields(settings, checkpoints)
    fields |= {"use_cpu": not torch.accelerator.is_available(), "remove_unused_columns": False, **fixed}
    for name in ("max_length", recomputing_field()):  # of text, and by diffusers' own means
        fields.pop(name, None)
    options = (StreamedArguments if exact else TrainingArguments)(label_names=[GROUPS], **fields)
    use_one_gpu(options)
    return options


class Pictures(Dataset[Encoded | Drawn]):
    """Rows to learn from, or draws of rows to evaluate, whose noise and times stay the same.

    Args:
        rows: the rows, or draws.
        times: how the times of rows are drawn.
        class_name: class of the transformer.
    """

    def __init__(self, rows: Sequence[Encoded] | Sequence[Drawn], times: Times, class_name: str) -> None:
        self.rows, self.times, self.call = rows, times, call_of(class_name)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Encoded | Drawn:
        return self.rows[index]

    def collate(self, rows: Sequence[Encoded | Drawn], process: int = 0) -> dict[str, list[dict[str, Any]]]:
        """Return a batch: groups of rows of one shape, each with noise and times.

        Args:
            rows: rows of the batch.
            process: index of the process; the global state is the same in all.
        """
        together: dict[Any, list[Drawn]] = {}
        for row in rows:
            drawn = row if isinstance(row, Drawn) else self._drawn(row, process)
            together.setdefault(drawn.encoded.shape, []).append(drawn)
        return {GROUPS: [_batch(group) for group in together.values()]}

    def _drawn(self, row: Encoded, process: int) -> Drawn:
        """Draw noise and a time, by a seed from the global state."""
        numbers = torch.Generator().manual_seed(int(torch.randint(2**62, ())) + process)
        time, seed = torch.rand(1, generator=numbers), torch.randint(2**63 - 1, (), generator=numbers)
        return Drawn(row, self.call, float(self.times.shares(time)), int(seed))


def _batch(group: Sequence[Drawn]) -> dict[str, Any]:
    inputs = [sample.inputs("cpu") for sample in group]
    tensors = {name: torch.cat([sample[name] for sample in inputs]) for name in inputs[0]}
    drawn = {name: tensors.pop(name) for name in ("latents", "noise", "sigma")}
    return {**drawn, "prompt": tensors, "weight": torch.tensor([sample.encoded.weight for sample in group])}


def sizes(pictures: Pictures) -> list[RowSize]:
    """Return the size of every row: the patches of its picture, plus the longest sequence of its prompt."""
    rows = []
    for row in pictures.rows:
        encoded = row.encoded if isinstance(row, Drawn) else row
        _, height, width = encoded.latents.shape
        sequences = [
            len(tensor) for tensor in encoded.prompt.values() if tensor.ndim > 1
        ]  # pooled prompts have no sequence
        tokens = height * width // pictures.call.patch**2 + max(sequences)
        rows.append(RowSize(tokens, tokens))
    return rows


class FlowTrainer(LoraSteps):
    """Transformers' trainer for a LoRA that learns the velocity."""

    def __init__(self, model: Any, **options: Any) -> None:
        pictures: Pictures = options["train_dataset"]
        self.call = pictures.call
        self.collate = pictures.collate
        super().__init__(model, data_collator=_together, **options)
        self.model_accepts_loss_kwargs = False  # it counts no tokens

    def compute_loss(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,  # noqa: ARG002
    ) -> Any:
        """Return the mean loss of a batch's pictures."""
        collated: Any = self.collate(inputs[GROUPS], self.accelerator.process_index)
        groups = self._prepare_inputs(collated)[GROUPS]
        # Several processes average gradients where the wrapped model is called, so each must call it exactly once.
        called = chain([model], repeat(self.accelerator.unwrap_model(model)))
        loss = torch.cat([squared_error(next(called), self.call, **group) for group in groups]).mean()
        return (loss, {}) if return_outputs else loss


def _together(rows: Sequence[Encoded | Drawn]) -> dict[str, Sequence[Encoded | Drawn]]:
    """Return rows unchanged: loaders are a batch ahead of the step, and of the random state in a checkpoint."""
    return {GROUPS: rows}


class ExactFlow(ExactSteps):
    """Exact steps on the velocity: there is no head, so every unit is recomputed."""

    def head_units(self, paths: Sequence[str]) -> list[str]:  # noqa: ARG002
        """Return none."""
        self._call = call_of(type(self.model).__name__)
        return []

    def loss(self, batches: Iterable[Mapping[str, Any]], *, autocast: bool = False) -> torch.Tensor:
        """Add the gradients of a step's mean loss; every group of pictures of one shape is a micro-batch."""
        return super().loss([group for batch in batches for group in batch[GROUPS]], autocast=autocast)

    def count_tokens(self, batch: Mapping[str, Any]) -> int:
        """Return the number of pictures."""
        return len(batch["latents"])

    def forward(self, batch: Mapping[str, Any], weight: float) -> Callable[[], torch.Tensor]:
        """Return a forward of a group: its summed loss, times ``weight``."""

        def forward() -> torch.Tensor:
            with self.boundaries.keeping():
                return weight * squared_error(self.model, self._call, **self.moved(batch)).sum()

        return forward


class StreamedFlowTrainer(Streamed, FlowTrainer):
    """The same trainer, by exact steps."""

    engine = ExactFlow

    def attach(self, *arguments: Any) -> None:
        """Let the steps draw noise themselves; see :meth:`emloc_core.tuning.exact.Streamed.attach`."""
        self.data_collator = self.collate
        super().attach(*arguments)


def trainer(
    model: OpenModel,
    settings: StepSettings,
    targets: Sequence[str],
    arguments: TrainingArguments,
    *,
    adapter: Path | None,
    **options: Any,
) -> FlowTrainer:
    """Return the trainer of a LoRA; see :meth:`emloc_core.objective.Objective.trainer`."""
    assert isinstance(settings, TrainSettings)
    skeleton = model.skeleton
    skeleton.load_parameters([name for name, _ in skeleton.model.named_parameters()])
    transformer: Any = skeleton.model
    if settings.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    set_seed(arguments.seed)
    with refusing(SETTINGS):
        lora: Any
        if adapter:
            lora = load_lora(transformer, adapter, is_trainable=True)
        else:
            lora = get_peft_model(transformer, lora_config(settings, list(targets), None))
        return FlowTrainer(lora, args=arguments, **options)
