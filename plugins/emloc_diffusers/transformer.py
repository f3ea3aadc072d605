"""Diffusers' transformers without weights, and the tensors of their checkpoints, whose keys are module names."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from emloc_core.files.checkpoint import read_config_json


class Config(dict[str, Any]):
    """A transformer's ``config.json``."""

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype that an emulator's config has; other configs have none."""
        name = self.get("_dtype")
        dtype = getattr(torch, name, None) if isinstance(name, str) else None
        return dtype if isinstance(dtype, torch.dtype) else None

    @property
    def model_type(self) -> str:
        """The name of the class."""
        return str(self.get("model_type") or self["_class_name"])

    def to_dict(self) -> dict[str, Any]:
        """Return it as a dictionary."""
        return {**self, "model_type": self.model_type}


def read_config(path: Path) -> Config:
    """Return the config of a transformer."""
    return Config(read_config_json(path))


class TensorsByName:
    """Puts tensors where their keys say; see :class:`emloc_core.compat.transformers.TensorLoader`."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def sources(self, keys: Iterable[str]) -> dict[str, list[str]]:
        """Return the keys by the names of parameters and buffers, which are the same."""
        return {key: [key] for key in keys}

    def load(
        self, tensors: Mapping[str, Any], _dtype: torch.dtype, device: torch.device
    ) -> tuple[dict[str, str], list[tuple[str, Any, Any]]]:
        """Load tensors into the model, each in the dtype that its parameter has.

        Args:
            tensors: slices of safetensors, by key.
            device: the target device.

        Returns:
            An empty mapping, and (name, shape, the model's shape) of tensors whose shape differs.
        """
        mismatched = []
        for name, piece in tensors.items():
            owner, _, attribute = name.rpartition(".")
            module = self._model.get_submodule(owner)
            before = getattr(module, attribute)
            tensor = piece[...]
            if tensor.shape != before.shape:
                mismatched.append((name, tensor.shape, before.shape))
                continue
            tensor = tensor.to(device, before.dtype)
            is_parameter = isinstance(before, nn.Parameter)
            setattr(module, attribute, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)
        return {}, mismatched
