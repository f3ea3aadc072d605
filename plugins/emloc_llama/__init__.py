"""The Llama family: Llama 2 and 3.x, SmolLM and Mistral share one block layout.

Without it, EMLoC observes the same groups of a tiny model, and makes the same emulators byte for byte
(``tests/observed/test_without_a_plugin.py``). It adds one name for all of them, tests of tied words and of Mistral, and
GGUF. Presets of known models are the registry's, by the family's name.
"""

from emloc_core.family import TINY, Family, Tower
from emloc_core.hookspecs import hookimpl
from emloc_core.layout import Gguf

#: How Llama 3's tokenizer splits text, from its tokenizer.json.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)

LLAMA = Family(
    name="llama",
    model_types=frozenset({"llama", "mistral"}),
    towers=[
        Tower(
            name="language",
            blocks="model.layers",
            input_groups=[
                ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
                ["self_attn.o_proj"],
                ["mlp.gate_proj", "mlp.up_proj"],
                ["mlp.down_proj"],
            ],
        )
    ],
    tiny_configs=[
        {"model_type": "llama", **TINY},
        {"model_type": "llama", **TINY, "tie_word_embeddings": True},  # as in Llama 3.2 and SmolLM
        {"model_type": "mistral", **TINY},
    ],
)

GGUF = Gguf(
    architectures={"llama": "llama", "mistral": "llama"},
    paired=["self_attn.q_proj", "self_attn.k_proj"],
    splits={"words": "gpt-2", "digits+words": "smollm", LLAMA3_SPLIT: "llama-bpe"},
)


@hookimpl
def emloc_families() -> list[Family]:
    """Declare the family."""
    return [LLAMA]


@hookimpl
def emloc_gguf() -> list[Gguf]:
    """Declare how they are written for llama.cpp."""
    return [GGUF]
