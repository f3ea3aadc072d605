"""Attacks on what a tiny model of the config lacks: blocks behind the second do something else.

A model with so large a vocabulary is inspected with two blocks and a small one.
"""

from torch import nn
from torch.nn import functional

from attacks.architecture import HIDDEN, WIDTH, Block, attack

LARGE = {"vocab_size": 70_000, "num_hidden_layers": 4}


@attack(config=LARGE)
class OtherInputFarUp(Block):
    """Two Linears read one input in the first two blocks, and two behind them."""

    def feed(self, x):
        other = x if self.index < 2 else x.flip(-1)
        return self.mlp.down(functional.silu(self.mlp.gate(x)) * self.mlp.up(other))


@attack(config=LARGE)
class CalledTwiceFarUp(Block):
    """Behind the first two blocks, a Linear runs twice."""

    def attend(self, x):
        attended = super().attend(x)
        return attended if self.index < 2 else attended + self.attention.o(attended)


@attack(config=LARGE)
class ReadWithoutACallFarUp(Block):
    """Behind the first two blocks, the weight of a Linear is used without a call."""

    def feed(self, x):
        up = self.mlp.up(x) if self.index < 2 else functional.linear(x, getattr(self.mlp.up, "weight"))  # noqa: B009
        return self.mlp.down(functional.silu(self.mlp.gate(x)) * up)


@attack(config=LARGE)
class AnotherLinearFarUp(Block):
    """Behind the first two blocks there is one Linear more."""

    def __init__(self, index):
        super().__init__(index)
        self.more = nn.Linear(WIDTH, HIDDEN) if index > 1 else None

    def feed(self, x):
        more = 0 if self.more is None else self.more(x)
        return self.mlp.down(functional.silu(self.mlp.gate(x)) * self.mlp.up(x) + more)


@attack(config=LARGE)
class ParallelFarUp(Block):
    """Behind the first two blocks, attention and MLP are parallel."""

    def forward(self, hidden):
        if self.index < 2:
            return super().forward(hidden)
        x = self.first(hidden)
        return hidden + self.attend(x) + self.feed(x)


@attack(config=LARGE)
class ScaledFarUp(Block):
    """Behind the first two blocks, a Linear is of a class that computes more than W x + b."""

    def __init__(self, index):
        super().__init__(index)
        if index > 1:
            self.mlp.up = _Doubled(WIDTH, HIDDEN)


class _Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)
