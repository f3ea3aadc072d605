"""The Phi family: Phi-3, Phi-3.5 and Phi-4, whose config names them all ``phi3``.

Queries, keys and values are one Linear, and so are gate and up.
"""

from dataclasses import replace

from emloc_llama import LLAMA

from emloc_core.family import TINY, Family
from emloc_core.hookspecs import hookimpl

PHI = replace(
    LLAMA,
    name="phi",
    model_types=frozenset({"phi3"}),
    towers=[
        replace(
            LLAMA.towers[0],
            input_groups=[["self_attn.qkv_proj"], ["self_attn.o_proj"], ["mlp.gate_up_proj"], ["mlp.down_proj"]],
        )
    ],
    tiny_configs=[
        {"model_type": "phi3", **TINY, "sliding_window": 8},  # as in Phi-3-mini
        {"model_type": "phi3", **TINY, "partial_rotary_factor": 0.5, "tie_word_embeddings": True},  # as in Phi-4-mini
    ],
)


@hookimpl
def emloc_families() -> list[Family]:
    """Declare the family."""
    return [PHI]
