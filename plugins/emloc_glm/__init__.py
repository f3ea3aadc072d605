"""The GLM family: GLM-4 in transformers' own layout (``glm``) and GLM-4-0414 (``glm4``). Gate and up are one Linear."""

from dataclasses import replace

from emloc_llama import LLAMA

from emloc_core.family import TINY, Family
from emloc_core.hookspecs import hookimpl

GLM = replace(
    LLAMA,
    name="glm",
    model_types=frozenset({"glm", "glm4"}),
    towers=[
        replace(
            LLAMA.towers[0],
            input_groups=[
                ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
                ["self_attn.o_proj"],
                ["mlp.gate_up_proj"],
                ["mlp.down_proj"],
            ],
        )
    ],
    tiny_configs=[
        {"model_type": "glm", **TINY, "head_dim": 8, "attention_bias": True},
        {"model_type": "glm4", **TINY, "head_dim": 8, "attention_bias": False},
    ],
)


@hookimpl
def emloc_families() -> list[Family]:
    """Declare the family."""
    return [GLM]
