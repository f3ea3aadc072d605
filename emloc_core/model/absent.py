"""Parameters that are not loaded but still report the device that they will be loaded to."""

from typing import Any

import torch
from torch import nn


class Absent(nn.Parameter):
    """A parameter without storage, on the meta device, that names the device it is loaded to as its own.

    Models put their inputs on a module's ``device``, which is its first parameter's. While the module's weights are not
    loaded, that must be the device that computes, not ``meta``.
    """

    loaded_to = torch.device("cpu")

    @classmethod
    def like(cls, parameter: torch.Tensor, device: torch.device) -> "Absent":
        """Return one with the shape, strides and dtype of ``parameter``, which is loaded to ``device``."""
        absent = cls(torch.empty_like(parameter, device="meta"), requires_grad=False)
        absent.loaded_to = device
        return absent

    def __deepcopy__(self, memo: dict[int, Any]) -> "Absent":
        """Return one of the same device; a parameter's own copy would forget it."""
        memo[id(self)] = copied = Absent.like(self, self.loaded_to)
        return copied

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The device that the parameter is loaded to."""
        return self.loaded_to
