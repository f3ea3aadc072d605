"""Attacks on weights: shared, tied, parametrised, read without a call, cast to, changed by every forward."""

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from attacks.architecture import ATTACKS, HIDDEN, WIDTH, Attack, Block, attack, run_in_turn


@attack(tied={f"model.layers.{index}.mlp.up.weight": f"model.layers.{index}.mlp.gate.weight" for index in range(3)})
class TiedWithinABlock(Block):
    """Two Linears of a block have one weight, and different inputs."""

    def __init__(self, index):
        super().__init__(index)
        self.mlp.up.weight = self.mlp.gate.weight

    def feed(self, x):
        return self.mlp.down(functional.silu(self.mlp.gate(x)) * self.mlp.up(x.flip(-1)))


def _with_one_linear(count):
    blocks = [Block(index) for index in range(count)]
    for block in blocks[1:]:
        block.mlp.down = blocks[0].mlp.down
    return blocks


def _with_one_weight(count):
    blocks = [Block(index) for index in range(count)]
    for block in blocks[1:]:
        block.mlp.down.weight = blocks[0].mlp.down.weight
    return blocks


def _with_halved_weights(stack, hidden):
    """Halve weights before the first block runs, as models for inference in half precision do."""
    for block in stack[1:]:
        if not block.mlp.halved:
            with torch.no_grad():
                block.mlp.down.weight.div_(2)
            block.mlp.halved = True
    return run_in_turn(stack, hidden)


def _not_halved(count):
    blocks = [Block(index) for index in range(count)]
    for block in blocks:
        block.mlp.halved = False
    return blocks


ATTACKS["HalvesWeights"] = Attack(_not_halved, _with_halved_weights)


_TIED = {f"model.layers.{index}.mlp.down.{part}": f"model.layers.0.mlp.down.{part}"
         for index in (1, 2) for part in ("weight", "bias")}  # fmt: skip
ATTACKS["OneLinearInAllBlocks"] = Attack(_with_one_linear, tied=_TIED)
ATTACKS["OneWeightInAllBlocks"] = Attack(
    _with_one_weight, tied={name: source for name, source in _TIED.items() if name.endswith("weight")}
)


@attack(right=True)
class CalledTwice(Block):
    """A Linear runs twice in a forward, on its own result."""

    def attend(self, x):
        attended = super().attend(x)
        return attended + self.attention.o(attended)


@attack()
class CalledTwiceAtTheEnd(Block):
    """Only the last block calls a Linear twice."""

    def feed(self, x):
        return self.mlp(self.mlp(x)) if self.index == 2 else self.mlp(x)


@attack(right=True)
class ReadWithoutACall(Block):
    """The weight of a Linear is used, and the Linear never called."""

    def feed(self, x):
        up = functional.linear(x, self.mlp.up.weight, self.mlp.up.bias)
        return self.mlp.down(functional.silu(self.mlp.gate(x)) * up)


@attack()
class CalledAndReadByAnotherName(Block):
    """A square Linear is called, and its weight also read by a name that no source of the block shows."""

    def attend(self, x):
        attended = super().attend(x)
        square = getattr(self.attention, "o")  # noqa: B009
        return attended + functional.linear(attended, getattr(square, "weight").T)  # noqa: B009


@attack()
class CastToADtypeByAnotherName(Block):
    """The input is cast to the dtype of the weight, which packed weights do not have."""

    def feed(self, x):
        weight = getattr(self.mlp.up, "weight")  # noqa: B009
        return self.mlp.down(functional.silu(self.mlp.gate(x)) * self.mlp.up((8 * x).to(weight.dtype)))


@attack(right=True)
class CastToADtype(Block):
    """The same, by the name that transformers uses."""

    def __init__(self, index):
        super().__init__(index)
        self.scores = nn.Linear(WIDTH, HIDDEN)

    def feed(self, x):
        return self.mlp.down(functional.silu(self.scores((8 * x).to(self.scores.weight.dtype))) * self.mlp.up(x))


@attack(right=True)
class CalledByItsForward(Block):
    """A Linear's forward is called directly, so hooks see nothing of it."""

    def feed(self, x):
        return self.mlp.down(functional.silu(self.mlp.gate.forward(x)) * self.mlp.up(x))


@attack()
class CalledByItsForwardAtTheEnd(Block):
    """Hooks see the Linear in all blocks but the last."""

    def feed(self, x):
        gate = self.mlp.gate.forward(x) if self.index == 2 else self.mlp.gate(x)
        return self.mlp.down(functional.silu(gate) * self.mlp.up(x))


@attack(right=True)
class CalledByKeyword(Block):
    """Hooks see no positional argument."""

    def feed(self, x):
        return self.mlp.down(input=functional.silu(self.mlp.gate(x)) * self.mlp.up(input=x))


@attack()
class WithWeightNorm(Block):
    """The weight is computed from two parameters."""

    def __init__(self, index):
        super().__init__(index)
        weight_norm(self.mlp.down)


class _Scaled(nn.Linear):
    """A Linear that scales its result by its input."""

    def forward(self, input):
        return super().forward(input) * input.mean(-1, keepdim=True)


@attack(right=True)
class ScaledByItsInput(Block):
    """A subclass of Linear computes more than W x + b."""

    def __init__(self, index):
        super().__init__(index)
        self.mlp.up = _Scaled(WIDTH, HIDDEN)


@attack(right=True)
class ScaledBehind(Block):
    """What a Linear returns is scaled by its input, outside of it."""

    def feed(self, x):
        return self.mlp(x) * x.mean(-1, keepdim=True)


@attack()
class WithAdapters(Block):
    """Adapters with the names of PEFT's are part of the block."""

    def __init__(self, index):
        super().__init__(index)
        self.mlp.lora_A, self.mlp.lora_B = nn.Linear(WIDTH, 4, bias=False), nn.Linear(4, WIDTH, bias=False)

    def feed(self, x):
        return self.mlp(x) + self.mlp.lora_B(self.mlp.lora_A(x))


@attack(right=True)
class NamedLikeAWeight(Block):
    """A Linear's name ends like that of its weight, and readers of packed checkpoints take it for a weight's."""

    def __init__(self, index):
        super().__init__(index)
        self.gate_weight = nn.Linear(WIDTH, WIDTH)

    def feed(self, x):
        return self.mlp(x) * self.gate_weight(x).sigmoid()


@attack()
class PartlyUnread(Block):
    """Half of what a Linear returns is thrown away."""

    def __init__(self, index):
        super().__init__(index)
        self.wide = nn.Linear(WIDTH, 2 * HIDDEN)

    def feed(self, x):
        return self.mlp.down(self.wide(x)[..., :HIDDEN] * self.mlp.up(x))


@attack()
class KeepsAMean(Block):
    """Every forward changes a buffer, which the next one reads."""

    def __init__(self, index):
        super().__init__(index)
        self.register_buffer("mean", torch.zeros(WIDTH))

    def feed(self, x):
        output = self.mlp(x - self.mean)
        self.mean.mul_(0.5).add_(x.detach().mean((0, 1)), alpha=0.5)
        return output


@attack()
class CountsItsCalls(Block):
    """From the 40th forward on, one Linear reads another input."""

    calls = 0

    def feed(self, x):
        self.calls += 1
        other = x.flip(-1) if self.calls > 40 else x
        return self.mlp.down(functional.silu(self.mlp.gate(x)) * self.mlp.up(other))


@attack()
class CachesAConstant(Block):
    """What a Linear reads is computed by the first forward, and kept for all."""

    kept = None

    def __init__(self, index):
        super().__init__(index)
        self.constant = nn.Linear(WIDTH, WIDTH)

    def feed(self, x):
        if self.kept is None:
            self.kept = torch.linspace(-9, 9, 7 * WIDTH).view(1, 7, WIDTH).cos()
        return self.mlp(x) + self.constant(self.kept).mean(1, keepdim=True)
