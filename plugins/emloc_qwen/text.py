"""Qwen's text models: their Linears have Llama's paths.

Qwen2 and Qwen2.5 have biases on q/k/v, and windows on only some layers; Qwen3 normalises queries and keys instead.
"""

from dataclasses import replace

from emloc_llama import LLAMA

from emloc_core.family import TINY, Family
from emloc_core.layout import Gguf

_WINDOWS = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}

#: How Qwen's tokenizers split text, from their tokenizer.json.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

QWEN: Family = replace(
    LLAMA,
    name="qwen",
    model_types=frozenset({"qwen2", "qwen3"}),
    tiny_configs=[
        {"model_type": "qwen2", **TINY, **_WINDOWS, "tie_word_embeddings": True},
        {"model_type": "qwen2", **TINY, "tie_word_embeddings": False},
        {"model_type": "qwen3", **TINY, "head_dim": 8, "tie_word_embeddings": True},
    ],
)

GGUF = Gguf({"qwen2": "qwen2", "qwen3": "qwen3"}, splits={"words": "gpt-2", SPLIT: "qwen2"})

#: Qwen3-MoE has experts instead of most MLPs; the MLPs of its dense layers (``mlp_only_layers``,
#: ``decoder_sparse_step``) are ordinary.
QWEN_MOE: Family = replace(
    LLAMA,
    name="qwen-moe",
    model_types=frozenset({"qwen3_moe"}),
    # For this model type, PEFT takes names of MLPs for experts, and would put the LoRA on the experts.
    towers=[replace(LLAMA.towers[0], experts=["mlp.experts"], lora_targets=["q_proj", "k_proj", "v_proj", "o_proj"])],
    keep_dense={
        "model.layers.*.mlp.gate": "small, and an error in it sends tokens to other experts",
    },
    tiny_configs=[
        {
            "model_type": "qwen3_moe",
            **TINY,
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "mlp_only_layers": [0],
        }
    ],
)
