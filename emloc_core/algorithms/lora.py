"""A LoRA on one Linear, as tensors."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Lora:
    """A LoRA on one Linear: it adds ``scale * b @ a @ x`` to the output.

    Attributes:
        a: (r, n).
        b: (m, r).
        scale: ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` for rsLoRA.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    def to(self, device: torch.device) -> "Lora":
        """Return it on a device."""
        return Lora(self.a.to(device), self.b.to(device), self.scale)

    def transposed(self) -> "Lora":
        """Return the LoRA that adds to the transposed weight what this one adds to the weight."""
        return Lora(self.b.T, self.a.T, self.scale)

    def scaled(self, factor: float) -> "Lora":
        """Return it with its output multiplied, on the same tensors."""
        return Lora(self.a, self.b, self.scale * factor)

    def with_scale(self, scale: float) -> "Lora":
        """Return it with another scale and the same output; with its own scale, itself."""
        return self if scale == self.scale else Lora(self.a, self.b * (self.scale / scale), scale)
