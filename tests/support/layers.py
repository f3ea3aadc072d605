"""Layers of stand-ins, of every format, with random codes."""

import torch
from torch import nn

from emloc_core.standins import NF4, FourBitLowRank, LowRank, Trellis, TwoBitLowRank

FORMATS = [NF4(), Trellis(), FourBitLowRank(), TwoBitLowRank(), LowRank()]
M, N = 320, 576


def layer(format, dtype, device="cpu"):
    """The layer of the format with random codes, (M, N)."""
    model = nn.Sequential(nn.Linear(N, M, bias=False, dtype=dtype))
    format.replace(model, {"0": 64 if format.ratios else None})
    generator = torch.Generator().manual_seed(0)
    for part in model.parameters():
        if part.dtype == torch.uint8:
            part.data.random_(0, 256, generator=generator)
        else:
            part.data.uniform_(0.01, 0.05, generator=generator)
    return model[0].to(device)
