"""Attacks on what Linears share: their inputs are equal, or look so, or are so at times."""

import torch
from torch import nn
from torch.nn import functional

from attacks.architecture import HIDDEN, WIDTH, Block, attack


@attack(right=True)
class Sequential(Block):
    """Attention, then the MLP."""


@attack(right=True)
class Parallel(Block):
    """Attention and MLP read one input."""

    def forward(self, hidden):
        x = self.first(hidden)
        return hidden + self.attend(x) + self.feed(x)


@attack(right=True)
class ParallelByIndex(Block):
    """Every second block is parallel."""

    def forward(self, hidden):
        if self.index % 2:
            return super().forward(hidden)
        x = self.first(hidden)
        return hidden + self.attend(x) + self.feed(x)


@attack(right=True)
class ShiftedValues(Block):
    """Values read the token before; keys read a view that is equal."""

    def attend(self, x):
        return self.attention(x, x.view_as(x), functional.pad(x, (0, 0, 1, -1)))


@attack(right=True)
class FirstTokenDiffers(Block):
    """Keys and values differ in a single token."""

    def attend(self, x):
        other = x.clone()
        other[:, 0] = 0
        return self.attention(x, x, other)


@attack()
class DiffersInLongRows(Block):
    """The MLP's second Linear reads something else beyond the 30th token."""

    def feed(self, x):
        other = torch.cat([x[:, :30], x[:, 30:].flip(-1)], dim=1)
        return self.mlp.down(functional.silu(self.mlp.gate(x)) * self.mlp.up(other))


@attack()
class DiffersInOneRow(Block):
    """The MLP's second Linear reads something else in the last row alone."""

    def feed(self, x):
        other = 3 * x.flip(-1) if x.shape[1] == 35 else x
        return self.mlp.down(functional.silu(self.mlp.gate(x)) * self.mlp.up(other))


@attack()
class DiffersWithContent(Block):
    """The MLP's second Linear reads noise where a token is large."""

    def feed(self, x):
        other = x.roll(1, 1) if bool((x.abs() > 3.2).any()) else x
        return self.mlp.down(functional.silu(self.mlp.gate(x)) * self.mlp.up(other))


@attack()
class ChangedInPlace(Block):
    """The tensor that two Linears read is changed between them: one tensor, two inputs."""

    def feed(self, x):
        gate = self.mlp.gate(x)
        x.mul_(torch.linspace(-1, 2, WIDTH))
        return self.mlp.down(functional.silu(gate) * self.mlp.up(x))


@attack(right=True)
class OutputChangedInPlace(Block):
    """What a Linear returns is changed in place, at once."""

    def feed(self, x):
        return self.mlp(x).mul_(0.5)


@attack()
class AlmostEqual(Block):
    """One Linear reads the input rounded to bfloat16."""

    def feed(self, x):
        return self.mlp.down(functional.silu(self.mlp.gate(x)) * self.mlp.up(x.bfloat16().float()))


@attack(right=True)
class OtherShape(Block):
    """One Linear reads the tokens of the same input as rows of a matrix, another a slice of it."""

    def __init__(self, index):
        super().__init__(index)
        self.part = nn.Linear(WIDTH // 2, HIDDEN)

    def feed(self, x):
        up = self.mlp.up(x.reshape(-1, WIDTH)).view(*x.shape[:2], HIDDEN)
        return self.mlp.down(functional.silu(self.mlp.gate(x)) * up + self.part(x[..., ::2]))


@attack(right=True)
class EvenTokens(Block):
    """A Linear reads every second token."""

    def feed(self, x):
        up = self.mlp.up(x[:, ::2]).repeat_interleave(2, 1)[:, : x.shape[1]]
        return self.mlp.down(functional.silu(self.mlp.gate(x)) * up)


@attack(right=True)
class FirstTokenAlone(Block):
    """Linears read one token of every row: fewer in all than their rank."""

    def __init__(self, index):
        super().__init__(index)
        self.pool = nn.Sequential(nn.Linear(WIDTH, 2 * HIDDEN), nn.Linear(2 * HIDDEN, 2 * HIDDEN))
        self.spread = nn.Linear(2 * HIDDEN, WIDTH)

    def feed(self, x):
        return self.mlp(x) + self.spread(torch.tanh(self.pool(x[:, :1])))


@attack()
class OrderByIndex(Block):
    """Every second block has its MLP first."""

    def forward(self, hidden):
        if self.index % 2:
            return super().forward(hidden)
        hidden = hidden + self.feed(self.second(hidden))
        return hidden + self.attend(self.first(hidden))
