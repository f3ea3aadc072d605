"""The Qwen family: the dense text models Qwen2, Qwen2.5 and Qwen3.

Their Linears stand where Llama's do; q/k/v have biases in Qwen2, and Qwen3 normalises queries and keys instead.
"""

from emloc_core.family import Family, Tower
from emloc_core.hookspecs import hookimpl

#: The language tower, for other families that hold a Qwen language model.
LANGUAGE = Tower(
    name="language",
    blocks="model.layers",
    input_groups=[
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ],
)

QWEN = Family(
    name="qwen",
    model_types=frozenset({"qwen2", "qwen3"}),
    towers=[LANGUAGE],
    keep_dense={"lm_head": "often tied to the embedding, and each of its outputs is a token's logit"},
    tiny_config={
        "model_type": "qwen2",
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
)


@hookimpl
def emloc_families() -> list[Family]:
    """Declare the family."""
    return [QWEN]
