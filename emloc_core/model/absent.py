"""Parameters that are not loaded but still report the device that they will be loaded to."""

import torch
from torch import nn


class Absent(nn.Parameter):
    """A parameter without storage, on the meta device, that names the device it is loaded to as its own.

    Models ask a module for ``device``, that of its first parameter, to put their inputs there. While that module's
    weights are not loaded, the answer has to be where the work is done, and not ``meta``.
    """

    _loaded_to = torch.device("cpu")

    @classmethod
    def like(cls, parameter: torch.Tensor, device: torch.device) -> "Absent":
        """Return one with the shape, strides and dtype of ``parameter``, which is loaded to ``device``."""
        absent = cls(torch.empty_like(parameter, device="meta"), requires_grad=False)
        absent._loaded_to = device
        return absent

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The device that the parameter is loaded to."""
        return self._loaded_to
