"""Tiny models of transformers' classes, for tokens."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from emloc_core.conformance.inputs import number_tokenizer, text_rows, tiny_samples
from emloc_core.data.row import Row
from emloc_core.data.tokenize import Sample
from emloc_core.errors import EmlocError, first_line
from emloc_core.family import Family
from emloc_core.files.pretrained import auto_class, load_model


class TokenTrial:
    """See :class:`emloc_core.objective.Trial`."""

    def has_class(self, name: str) -> bool:
        """Return whether transformers has a class that builds models from configs."""
        return hasattr(auto_class(name), "from_config")

    def config(self, settings: Mapping[str, Any]) -> Any:
        """Return transformers' config."""
        from transformers import CONFIG_MAPPING, AutoConfig

        if (name := settings.get("model_type")) not in CONFIG_MAPPING:
            raise EmlocError(
                f"transformers has no model type {name!r}.",
                "Declare the model_type that config.json has (model_types).",
            )
        try:
            return AutoConfig.for_model(**copy.deepcopy(dict(settings)))
        except Exception as error:  # whatever transformers' own checks of a config raise
            raise EmlocError(
                f"transformers refuses the tiny config of {label(settings)!r} ({first_line(error)}).",
                "Correct that entry of tiny_configs: its keys are those of the model's config class.",
            ) from error

    def samples(self, family: Family, config: Any) -> list[Sample]:
        """Return samples of text, and samples with images if the family has any."""
        return tiny_samples(family, config)

    def rows(self, samples: Sequence[Any]) -> list[Row]:
        """Return the samples of text as rows, for the tokenizer of numbers."""
        return text_rows(list(samples))

    def save(self, model: Any, config: Any, directory: Path) -> None:
        """Write the model with a tokenizer of numbers."""
        model.save_pretrained(directory)
        number_tokenizer(config).save_pretrained(directory)

    def load(self, family: Family, directory: Path) -> Any:
        """Return a model loaded by transformers' ``from_pretrained``."""
        return load_model(family.auto_class, directory)

    def unpacked(self, model: Any) -> Any:
        """Return the emulator as transformers unpacks it."""
        return model.dequantize()

    def loss(self, model: Any, sample: Any) -> torch.Tensor:
        """Return the mean cross entropy of the next token."""
        inputs = sample.inputs("cpu")
        return cross_entropy(sample.run(model, "cpu").logits[0, :-1].float(), inputs["input_ids"][0, 1:])


def label(config: Mapping[str, Any]) -> str:
    """Return a readable name for a tiny config: the model types in it."""
    if not isinstance(config, Mapping):
        return "no-mapping"
    sections = [section for section in config.values() if isinstance(section, Mapping)]
    inner = [section["model_type"] for section in sections if "model_type" in section]
    return "+".join(str(name) for name in [config.get("model_type"), *inner])
