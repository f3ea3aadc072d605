"""A small language model whose blocks, and the way in which they run, come from an attack.

An attack is a name in :data:`ATTACKS`. Its blocks are built from the config, and ``flow`` runs them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

WIDTH, HIDDEN, HEADS, VOCABULARY, POSITIONS = 32, 48, 4, 96, 96
Blocks = Sequence[nn.Module]


def run_in_turn(blocks: Blocks, hidden: torch.Tensor) -> torch.Tensor:
    """Run the blocks one after the other."""
    for block in blocks:
        hidden = block(hidden)
    return hidden


@dataclass(frozen=True)
class Attack:
    """A model that looks like another.

    Attributes:
        blocks: makes as many blocks as asked for; several lists where there are several stacks.
        flow: runs them: takes the blocks of every stack and the embedded tokens.
        tied: ``_tied_weights_keys`` of the model.
        right: whether it has to be compressed; if not, it may be refused.
        config: further fields of the config.
    """

    blocks: Callable[[int], Blocks | dict[str, Blocks]]
    flow: Callable[..., torch.Tensor] = run_in_turn
    tied: dict[str, str] = field(default_factory=dict)
    right: bool = False
    config: dict[str, int] = field(default_factory=dict)


ATTACKS: dict[str, Attack] = {}


def attack(**options: Any) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Return a decorator that adds a class of blocks as an attack: they run in turn, numbered from 0."""

    def decorate(kind: type[nn.Module]) -> type[nn.Module]:
        ATTACKS[kind.__name__] = Attack(lambda count: [kind(index) for index in range(count)], **options)
        return kind

    return decorate


class Attention(nn.Module):
    """Causal attention; what its Linears read may be changed."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in "qkvo")

    def forward(self, x: torch.Tensor, keys: Any = None, values: Any = None, *, causal: bool = True) -> torch.Tensor:
        """Attend to the inputs ``keys`` and ``values``, or to x itself."""
        keys = x if keys is None else keys
        values = keys if values is None else values
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2)
                   for part in (self.q(x), self.k(keys), self.v(values)))  # fmt: skip
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.o(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """A gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (
            nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., WIDTH) to the same."""
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """An ordinary block, with the MLP after the attention; attacks change parts of it.

    Args:
        index: of the block.
    """

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.mlp = Attention(), Mlp()

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        """Return the attention's output for x."""
        return self.attention(x)

    def feed(self, x: torch.Tensor) -> torch.Tensor:
        """Return the MLP's output for x."""
        return self.mlp(x)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map (1, T, WIDTH) to the same."""
        hidden = hidden + self.attend(self.first(hidden))
        return hidden + self.feed(self.second(hidden))


class OddConfig(PreTrainedConfig):
    """The config of an attack."""

    model_type = "odd"

    def __init__(self, attack: str = "Sequential", **others: Any) -> None:
        self.attack = attack
        sizes = {"hidden_size": WIDTH, "vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS}
        super().__init__(**{**sizes, "num_hidden_layers": 3, "num_attention_heads": HEADS, **others})


class OddModel(nn.Module):
    """An attack's model without its head."""

    def __init__(self, config: OddConfig) -> None:
        super().__init__()
        self.attack = ATTACKS[config.attack]
        blocks = self.attack.blocks(config.num_hidden_layers)
        stacks = blocks if isinstance(blocks, dict) else {"layers": blocks}
        self.embed, self.position = nn.Embedding(config.vocab_size, WIDTH), nn.Embedding(POSITIONS, WIDTH)
        self.stacks = list(stacks)
        for name, stack in stacks.items():
            setattr(self, name, nn.ModuleList(stack))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> BaseModelOutput:
        """Return hidden states, (1, T, WIDTH)."""
        hidden = self.embed(input_ids) + self.position(torch.arange(input_ids.shape[1]))[None]
        hidden = self.attack.flow(*(list(getattr(self, name)) for name in self.stacks), hidden)
        return BaseModelOutput(self.norm(hidden))


class OddForCausalLM(PreTrainedModel, GenerationMixin):
    """The model of an attack."""

    config_class = OddConfig
    base_model_prefix = "model"
    _supports_sdpa = True

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        self._tied_weights_keys = ATTACKS[config.attack].tied
        self.model = OddModel(config)
        self.lm_head = nn.Linear(WIDTH, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding of tokens."""
        return self.model.embed

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.lm_head

    def forward(self, input_ids: torch.Tensor, labels: Any = None, **_: Any) -> CausalLMOutput:
        """Return logits, (1, T, vocabulary)."""
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        loss = None
        if labels is not None:
            loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)


AutoConfig.register("odd", OddConfig, exist_ok=True)
AutoModelForCausalLM.register(OddConfig, OddForCausalLM, exist_ok=True)
