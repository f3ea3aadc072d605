"""Weights that a module's code hands on, instead of calling the Linear, are found in its source."""

import torch
from torch import nn

from emloc_core.model.weight_reads import read_without_call


class Mixer(nn.Module):
    """Uses its Linears in every way; a kernel for training alone takes a weight, and inputs are cast to another."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.asked, self.cast, self.fused = (nn.Linear(4, 4) for _ in range(4))
        self.inner = nn.ModuleDict({"deep": nn.Linear(4, 4)})
        self.norm = nn.LayerNorm(4)
        nn.init.zeros_(self.called.weight)

    def kernel(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.fused.weight.T + x @ self.inner.deep.weight.T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.asked.weight, nn.Parameter) and self.asked.weight.dtype != torch.int8:
            x = self.cast(x.to(self.cast.weight.dtype)) * self.norm.weight
        return self.kernel(x) if self.training else self.fused(self.asked(self.called(x)))


def test_what_is_read_is_told_from_what_is_called():
    model = nn.Sequential(Mixer(), nn.Linear(4, 4))
    assert read_without_call(model) == {"0.cast": "Mixer", "0.fused": "Mixer", "0.inner.deep": "Mixer"}


def test_torchs_own_attention_is_seen_through():
    assert read_without_call(nn.MultiheadAttention(8, 2)) == {"out_proj": "MultiheadAttention"}
