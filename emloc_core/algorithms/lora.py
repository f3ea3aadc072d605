"""A LoRA on one Linear, or on a stack of experts, as tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Lora:
    """A LoRA on one Linear: it adds ``scale * b @ a @ x`` to the output; or one on each expert of a stack.

    Attributes:
        a: (r, n); of E experts (E, r, n).
        b: (m, r); of E experts (E, m, r).
        scale: ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` for rsLoRA.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    @property
    def is_stacked(self) -> bool:
        """Whether it is one on each expert of a stack."""
        return self.a.ndim == 3

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what it is added to: (m, n), or (E, m, n)."""
        return *self.b.shape[:-1], self.a.shape[-1]

    @property
    def rank(self) -> int:
        """Its rank; for experts, the rank of each."""
        return self.a.shape[-2]

    def parameter(self, path: str) -> str:
        """Return the name of the parameter that it is added to; ``path`` is its Linear's or stack's."""
        return path if self.is_stacked else f"{path}.weight"

    def experts(self) -> "list[Lora]":
        """Return the LoRA of each expert."""
        return [Lora(a, b, self.scale) for a, b in zip(self.a, self.b, strict=True)]

    @classmethod
    def stacked(cls, loras: "Sequence[Lora]") -> "Lora":
        """Return the LoRAs of all experts, which have one scale, as one."""
        return cls(torch.stack([lora.a for lora in loras]), torch.stack([lora.b for lora in loras]), loras[0].scale)

    def to(self, device: torch.device) -> "Lora":
        """Return it on a device."""
        return Lora(self.a.to(device), self.b.to(device), self.scale)

    def transposed(self) -> "Lora":
        """Return the LoRA that adds to the transposed weight what this one adds to the weight."""
        return Lora(self.b.mT, self.a.mT, self.scale)

    def scaled(self, factor: float) -> "Lora":
        """Return it with its output multiplied by a factor, on the same tensors."""
        return Lora(self.a, self.b, self.scale * factor)

    def with_scale(self, scale: float) -> "Lora":
        """Return it with another scale and the same output; with its own scale, itself."""
        return self if scale == self.scale else Lora(self.a, self.b * (self.scale / scale), scale)


def of_experts(a: torch.Tensor, b: torch.Tensor, scale: float, rank: int) -> Lora:
    """Return the LoRA of E experts that PEFT keeps as ``a``, (E r, n), and ``b``, (m, r E)."""
    return Lora(a.unflatten(0, (-1, rank)), b.unflatten(1, (rank, -1)).permute(2, 0, 1), scale)


def flattened(lora: Lora) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``a`` and ``b`` as :func:`of_experts` takes them."""
    return lora.a.flatten(0, 1).contiguous(), lora.b.permute(1, 2, 0).flatten(1).contiguous()
