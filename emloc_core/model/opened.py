"""A model that a job works with: opened once, and passed to whatever needs part of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel

from emloc_core.data.limits import Limits
from emloc_core.data.row import Row
from emloc_core.data.tokenize import Processing, load_processing
from emloc_core.family import Family
from emloc_core.files.checkpoint import Checkpoint, open_checkpoint
from emloc_core.model.device import choose_device
from emloc_core.model.skeleton import Skeleton, build_model
from emloc_core.objective import Objective, Purpose, Sample
from emloc_core.plugins.manager import plugin_manager

_CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class OpenModel:
    """A checkpoint, its family, and a device; everything else is read when it is first asked for.

    Attributes:
        checkpoint: an ordinary model, or an emulator.
        device: of weights and activations.
    """

    checkpoint: Checkpoint
    family: Family
    device: torch.device = _CPU

    @property
    def objective(self) -> Objective:
        """The objective that it is trained for."""
        return self.checkpoint.objective

    @cached_property
    def config(self) -> Any:
        """The config, as transformers or another library reads it.

        Raises:
            EmlocError: the library rejects it.
        """
        return self.objective.config(self.checkpoint.directory / "config.json")

    @cached_property
    def skeleton(self) -> Skeleton:
        """The model without weights, which are loaded on demand.

        Raises:
            EmlocError: the checkpoint lacks weights of the model, or does not fit its config.
        """
        return Skeleton(self.checkpoint, self.family, self.config, self.device)

    @cached_property
    def limits(self) -> Limits:
        """The limits that the config sets for rows."""
        return Limits.for_config(self.config)

    def build(self) -> PreTrainedModel:
        """Return another model of this config, fp32 on the meta device, whatever is in the checkpoint."""
        return build_model(self.config, self.family, torch.float32)

    def processing(self, rows: Sequence[Row]) -> Processing:
        """Return what turns rows into inputs: see :func:`emloc_core.data.tokenize.load_processing`."""
        return load_processing(self.checkpoint.directory, self.family, rows)

    def samples(
        self, rows: Sequence[Row], max_length: int | None, purpose: Purpose = "calibration"
    ) -> Sequence[Sample]:
        """Return the samples of rows; see :meth:`emloc_core.objective.Objective.samples`."""
        return self.objective.samples(self, rows, max_length, purpose) if rows else []


def open_model(name: str, device: str = "auto") -> OpenModel:
    """Open a model by its directory or hub id, for a device by its name.

    Raises:
        EmlocError: there is no such model or device, or no family declares it.
    """
    return _opened(open_checkpoint(name), device)


def open_original(name: str, device: str = "cpu", option: str = "") -> OpenModel:
    """Open an original, which is neither quantised nor an emulator; see :func:`open_model`.

    Args:
        option: the one that names another model, for the message.

    Raises:
        EmlocError: as there; or it is quantised, or an emulator.
    """
    checkpoint = open_checkpoint(name)
    checkpoint.require_unquantised(option)
    return _opened(checkpoint, device)


def _opened(checkpoint: Checkpoint, device: str) -> OpenModel:
    return OpenModel(checkpoint, plugin_manager().family_for(checkpoint.config), choose_device(device))
