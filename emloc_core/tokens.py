"""The core's objective: tokens, each predicted from the ones before it, by transformers' models.

Everything is imported where it is used, because every command asks for a model's objective.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emloc_core.objective import Datasets, Longest, Purpose, Sample, Step, Trial

if TYPE_CHECKING:
    import torch
    from transformers import TrainingArguments

    from emloc_core.algorithms.lora import Lora
    from emloc_core.data.limits import Limits
    from emloc_core.data.row import Row
    from emloc_core.family import Family
    from emloc_core.files.checkpoint import Checkpoint
    from emloc_core.memory.model import MemoryModel
    from emloc_core.model.opened import OpenModel
    from emloc_core.settings import StepSettings
    from emloc_core.tuning.trainer import LoraSteps


class TokenObjective:
    """See :class:`emloc_core.objective.Objective`."""

    type_key, dtype_key, weights, folder = "model_type", "dtype", "model", ""
    keeps_rows = True
    task = "CAUSAL_LM"
    library = "transformers"
    scored_by = "eval"

    def config(self, path: Path) -> Any:
        """Return transformers' config."""
        from emloc_core.files.pretrained import load_config

        return load_config(path)

    def build(self, family: "Family", config: Any, dtype: "torch.dtype") -> Any:
        """Return one of transformers' models.

        Raises:
            EmlocError: transformers does not have the class that the family declares, or cannot build it.
        """
        from emloc_core.errors import EmlocError
        from emloc_core.files.pretrained import auto_class, new_model

        if auto_class(family.auto_class) is None:
            raise EmlocError(
                f"The family {family.name!r} declares the class {family.auto_class}, which transformers does not have.",
                "Correct auto_class in its plugin, or uninstall the plugin.",
                code="plugin",
            )
        return new_model(family.auto_class, config, dtype)

    def tensor_loader(self, model: Any, conversions: Sequence[Any]) -> Any:
        """Return a loader that maps and converts tensors as ``from_pretrained`` does."""
        from emloc_core.compat.transformers import TensorLoader

        return TensorLoader(model, conversions)

    def require_rows(self, rows: "Sequence[Row]", family: "Family") -> None:
        """Refuse pictures if the models read only text."""
        from emloc_core.data.tokenize import require_readable

        require_readable(rows, family)

    def samples(
        self, model: "OpenModel", rows: "Sequence[Row]", max_length: int | None, purpose: Purpose
    ) -> Sequence[Sample]:
        """Return a sample per row; rows to evaluate whose answer is cut away are left out."""
        from emloc_core.data.tokenize import encode, tokenized

        how = (model.processing(rows), max_length, model.limits, model.skeleton.dtype)
        if purpose == "evaluation":
            return [sample for sample in tokenized(rows, *how) if any(sample.completion_mask)]
        return encode(rows, *how)

    def accompany(self, checkpoint: "Checkpoint", adapter: Path) -> None:
        """Copy the tokenizer."""
        checkpoint.copy_processing(adapter)

    def foreign_tensors(self, model: "OpenModel", loras: "Mapping[str, Lora]") -> "dict[str, torch.Tensor]":
        """Refuse: tools with other names read GGUF."""
        from emloc_core.errors import EmlocError

        raise EmlocError(
            "ComfyUI draws pictures, but the model writes text.", "Leave out --comfyui.", code="unsupported"
        )

    def usage(self, kind: str, class_name: str, base: str) -> str | None:
        """Return None, for transformers' code."""
        return None

    def check(self, settings: "StepSettings") -> None:
        """Refuse ``extra`` fields that are not TRL's."""
        from emloc_core.tuning.trl import check_extra

        check_extra(settings)

    def measure(
        self, model: "OpenModel", rows: "Sequence[Row]", evaluated: "Sequence[Row]", settings: "StepSettings"
    ) -> dict[str, Any]:
        """Return the lengths of rows; see :func:`emloc_core.tuning.dataset.measure`."""
        from emloc_core.tuning.dataset import measure

        return measure(rows, model.processing([*rows, *evaluated]), settings, model.config)

    def arguments(
        self, settings: "StepSettings", checkpoints: Path, rows: "Sequence[Row]", *, exact: bool, **fixed: Any
    ) -> "TrainingArguments":
        """Return TRL's config."""
        import torch

        from emloc_core.tuning.exact import StreamedConfig
        from emloc_core.tuning.trl import trainer_config

        return trainer_config(
            settings,
            checkpoints,
            completion_only=rows[0].form != "text",
            use_cpu=not torch.accelerator.is_available(),
            kind=StreamedConfig if exact else None,
            **fixed,
        )

    def datasets(
        self,
        model: "OpenModel",
        rows: "Sequence[Row]",
        evaluated: "Sequence[Row]",
        settings: "StepSettings",
        arguments: "TrainingArguments",
    ) -> Datasets:
        """Return tokenized rows; with images, rows for TRL's collator."""
        from contextlib import nullcontext
        from functools import partial

        from transformers import ProcessorMixin

        from emloc_core.processes.environment import without_collections
        from emloc_core.tuning.dataset import make_dataset
        from emloc_core.tuning.preferences import preference_dataset

        processing = model.processing([*rows, *evaluated])
        how = (processing, settings.max_length, model.config)
        sft = partial(make_dataset, completion_only=getattr(arguments, "completion_only_loss", True))
        preferences = partial(preference_dataset, settings=settings)
        pictured = isinstance(processing, ProcessorMixin)
        with nullcontext() if pictured else without_collections():
            train, sizes = (preferences if settings.learns_preferences else sft)(rows, *how)
            held_out = sft(evaluated, *how)[0] if evaluated else None
        if pictured:  # the collator makes all inputs of the model
            arguments.remove_unused_columns = False
        return Datasets(train, held_out, sizes, processing)

    def trainer(
        self,
        model: "OpenModel",
        settings: "StepSettings",
        targets: Sequence[str],
        arguments: Any,
        *,
        adapter: Path | None,
        **options: Any,
    ) -> "LoraSteps":
        """Return TRL's trainer.

        Raises:
            EmlocError: the model cannot be loaded, or the settings conflict.
        """
        from emloc_core.files.pretrained import load_lora, load_model
        from emloc_core.processes.heap import give_back
        from emloc_core.settings import TrainSettings
        from emloc_core.tuning.trainer import SETTINGS, TRAINERS, balance_no_experts, refusing
        from emloc_core.tuning.trl import lora_config

        assert isinstance(settings, TrainSettings)
        directory = model.checkpoint.directory.absolute()
        with refusing(f"{directory} cannot be loaded", resumable=True):
            loaded = load_model(model.family.auto_class, directory)
        balance_no_experts(loaded.config)
        with refusing(SETTINGS):
            if adapter:
                loaded = load_lora(loaded, adapter, is_trainable=True)
            else:
                options["peft_config"] = lora_config(settings, list(targets), self.task, loaded)
            trainer = TRAINERS[settings.objective](loaded, args=arguments, **options)
        if arguments.use_cpu:  # the loss follows, with the peak
            backbone: Any = trainer.lora.get_base_model().base_model
            backbone.register_forward_hook(give_back)
        return trainer

    def exact_trainer(self) -> type[Any]:
        """Return TRL's trainer with streamed blocks."""
        from emloc_core.tuning.exact import StreamedTrainer

        return StreamedTrainer

    def vocabulary(self, config: Any) -> int:
        """Return the vocabulary's size."""
        return config.get_text_config().vocab_size

    def dtype(self, config_file: Path) -> str | None:
        """Return None: configs name the dtype."""
        return None

    def longest(
        self, config_file: Path, family: "Family", rows: "Sequence[Row]", length: int | None, limits: "Limits"
    ) -> Longest:
        """Return the length of the longest row, and the images of the row with most."""
        from emloc_core.memory.planned_model import planned_model
        from emloc_core.memory.tokens import longest

        return longest(config_file, family, planned_model(config_file).outline.config, rows, length, limits)

    def step(self, memory: "MemoryModel") -> Step:
        """Return a step of token rows."""
        from emloc_core.memory.tokens import TokenStep

        return TokenStep(memory)

    def answers(
        self, base: str, adapter: Path, rows: "Sequence[Row]", *, max_new_tokens: int, guidance: float | None
    ) -> list[dict[str, str]]:
        """Return the model's greedy answers."""
        from emloc_core.evaluation.answers import answers

        return answers(base, adapter, rows, max_new_tokens)

    def trial(self) -> Trial:
        """Return the trial of transformers' tiny models."""
        from emloc_core.conformance.trial import TokenTrial

        return TokenTrial()
