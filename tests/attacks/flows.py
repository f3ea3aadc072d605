"""Attacks on the way through the blocks: in another order, twice, not at all, or past them."""

import torch
from torch import nn
from torch.nn import functional

from attacks.architecture import ATTACKS, WIDTH, Attack, Attention, Block, Mlp, attack, run_in_turn


def blocks(count: int) -> list[nn.Module]:
    """Return ordinary blocks."""
    return [Block(index) for index in range(count)]


@attack(right=True)
class MlpsByIndex(Block):
    """Some blocks have no MLP, others no attention."""

    def __init__(self, index):
        super().__init__(index)
        if index == 1:
            del self.mlp
        if index == 2:
            del self.attention

    def forward(self, hidden):
        if self.index != 2:
            hidden = hidden + self.attend(self.first(hidden))
        return hidden if self.index == 1 else hidden + self.feed(self.second(hidden))


@attack(right=True)
class Recurrent(Block):
    """Every second block has a recurrent state in place of attention."""

    def __init__(self, index):
        super().__init__(index)
        if index % 2:
            self.attention = None
            self.enter, self.step, self.leave = (
                nn.Linear(WIDTH, 2 * WIDTH),
                nn.Linear(WIDTH, WIDTH),
                nn.Linear(WIDTH, WIDTH),
            )

    def attend(self, x):
        if self.attention is not None:
            return super().attend(x)
        value, gate = self.enter(x).chunk(2, -1)
        decay = torch.sigmoid(self.step(value))
        state, states = torch.zeros_like(x[:, 0]), []
        for token in range(x.shape[1]):
            state = decay[:, token] * state + (1 - decay[:, token]) * value[:, token]
            states.append(state)
        return self.leave(torch.stack(states, 1) * functional.silu(gate))


@attack(right=True)
class CrossAttention(Block):
    """Keys and values come from a memory that is learned."""

    def __init__(self, index):
        super().__init__(index)
        self.memory = nn.Parameter(torch.randn(1, 7, WIDTH))
        self.across, self.third = Attention(), nn.LayerNorm(WIDTH)

    def attend(self, x):
        return self.attention(x) + self.across(self.third(x), self.memory, causal=False)


@attack(right=True)
class SharedAndRoutedExperts(Block):
    """Each token goes to one of four experts, in a list, and to one that all share."""

    def __init__(self, index):
        super().__init__(index)
        self.router, self.experts = nn.Linear(WIDTH, 4, bias=False), nn.ModuleList(Mlp() for _ in range(4))

    def feed(self, x):
        scores, chosen = self.router(x).softmax(-1).max(-1)
        routed = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            tokens = chosen == number
            if bool(tokens.any()):
                routed[tokens] = expert(x[tokens]) * scores[tokens][:, None]
        return self.mlp(x) + routed


@attack(right=True)
class ListOfHeads(Block):
    """Linears in a list inside the block."""

    def __init__(self, index):
        super().__init__(index)
        self.heads = nn.ModuleList(nn.Linear(WIDTH, WIDTH // 2) for _ in range(2))

    def feed(self, x):
        return self.mlp(x) + torch.cat([head(x) for head in self.heads], -1)


@attack()
class SkipsByChance(Block):
    """Stochastic depth, outside of training as well."""

    def forward(self, hidden):
        return hidden if bool(torch.rand(()) < 0.4) else super().forward(hidden)


@attack()
class DropsByChance(Block):
    """Dropout, outside of training as well."""

    def feed(self, x):
        return self.mlp(functional.dropout(x, 0.1, training=True))


@attack()
class SkipsByContent(Block):
    """The middle block leaves out rows of an even length."""

    def forward(self, hidden):
        return hidden if self.index == 1 and hidden.shape[1] % 2 == 0 else super().forward(hidden)


@attack(right=True)
class MixtureOfDepths(Block):
    """A router lets half of the tokens through the block."""

    def __init__(self, index):
        super().__init__(index)
        self.choose = nn.Linear(WIDTH, 1)

    def forward(self, hidden):
        scores = self.choose(hidden).squeeze(-1)
        tokens = scores.topk(max(1, hidden.shape[1] // 2), dim=1).indices.sort(1).values[0]
        through = super().forward(hidden[:, tokens]) * scores[:, tokens].sigmoid()[..., None]
        return hidden.index_copy(1, tokens, through)


def _reversed(layers, hidden):
    return run_in_turn(layers[::-1], hidden)


def _shuffled(layers, hidden):
    return run_in_turn([layers[index] for index in (0, 2, 1, 3)], hidden)


def _looped(layers, hidden):
    return run_in_turn([*layers, *layers], hidden)


def _one_again(layers, hidden):
    return run_in_turn([*layers, layers[1]], hidden)


def _last_left_out(layers, hidden):
    return run_in_turn(layers[:-1], hidden)


def _by_length(layers, hidden):
    return run_in_turn(layers if hidden.shape[1] % 2 else layers[::-1], hidden)


def _passed_on(layers, hidden):
    first = layers[0](hidden)
    return layers[3](run_in_turn(layers[1:3], first) + first.flip(-1))


def _by_forward(layers, hidden):
    for layer in layers:
        hidden = layer.forward(hidden)
    return hidden


def _middle_by_forward(layers, hidden):
    return layers[2](layers[1].forward(layers[0](hidden)))


ATTACKS["Reversed"] = Attack(blocks, _reversed)
ATTACKS["Shuffled"] = Attack(blocks, _shuffled, config={"num_hidden_layers": 4})
ATTACKS["Looped"] = Attack(blocks, _looped)
ATTACKS["OneBlockAgain"] = Attack(blocks, _one_again)
ATTACKS["LastLeftOut"] = Attack(blocks, _last_left_out)
ATTACKS["OrderByLength"] = Attack(blocks, _by_length)
ATTACKS["PassedOn"] = Attack(blocks, _passed_on, right=True, config={"num_hidden_layers": 4})
ATTACKS["BlocksByForward"] = Attack(blocks, _by_forward)
ATTACKS["MiddleBlockByForward"] = Attack(blocks, _middle_by_forward)


class _Notes:
    """What one block leaves for another."""

    hidden: torch.Tensor


NOTES = _Notes()


@attack()
class PassedOnAside(Block):
    """The first block leaves its residual where the last one finds it, past the hidden states."""

    def forward(self, hidden):
        if self.index == 0:
            NOTES.hidden = hidden
        return super().forward(hidden + NOTES.hidden.flip(-1) if self.index == 2 else hidden)


@attack()
class KeepsTheLastInput(Block):
    """Every block adds its input in the forward before."""

    last = None

    def forward(self, hidden):
        last, self.last = self.last, hidden.detach()
        return super().forward(hidden if last is None else hidden + last.mean((0, 1)))


def _two_decoders(first, second, hidden):
    return run_in_turn(first, hidden) + run_in_turn(second, hidden.flip(-1))


def _in_between(first, second, hidden):
    for one, other in zip(first, second, strict=True):
        hidden = other(one(hidden))
    return hidden


def _second_first(first, second, hidden):
    return run_in_turn(first, run_in_turn(second, hidden))


def _two_stacks(count):
    return {"one": blocks(count - 1), "other": blocks(count - 1)}


def _sharing_towers(count):
    shared = blocks(count)
    return {"encoder": shared, "decoder": shared}


ATTACKS["TwoDecoders"] = Attack(_two_stacks, _two_decoders, right=True)
ATTACKS["InBetween"] = Attack(_two_stacks, _in_between)
ATTACKS["SecondFirst"] = Attack(_two_stacks, _second_first, right=True)
ATTACKS["TowersThatShareBlocks"] = Attack(
    _sharing_towers, _second_first,
    tied={f"model.decoder.{name}": f"model.encoder.{name}" for index in range(3)
          for name in (f"{index}.{part}" for part, _ in Block(0).named_parameters())},
)  # fmt: skip
