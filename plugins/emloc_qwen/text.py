"""Qwen's text models: their Linears stand where Llama's do.

Qwen2 and Qwen2.5 have biases on q/k/v, and windows on some layers alone; Qwen3 normalises queries and keys instead.
Qwen3-MoE has experts in the place of most MLPs: one tensor holds the weights of all of a layer's experts, so they are
no Linears. The MLPs of its dense layers (``mlp_only_layers``, ``decoder_sparse_step``) are ordinary.
"""

from dataclasses import replace

from emloc_llama import LLAMA, TINY

from emloc_core.family import Family

QWEN: Family = replace(
    LLAMA,
    name="qwen",
    model_types=frozenset({"qwen2", "qwen3", "qwen3_moe"}),
    keep_dense={
        **LLAMA.keep_dense,
        "model.layers.*.mlp.experts": "all experts of a layer are one tensor, and calibration rows reach some of them "
        "too seldom to fit factors to",
        "model.layers.*.mlp.gate": "small, and an error in it sends tokens to other experts",
    },
    tiny_configs=[
        {
            "model_type": "qwen2",
            **TINY,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 1,
        },
        {"model_type": "qwen2", **TINY, "tie_word_embeddings": False},
        {"model_type": "qwen3", **TINY, "head_dim": 8, "tie_word_embeddings": True},
        {
            "model_type": "qwen3_moe",
            **TINY,
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "mlp_only_layers": [0],
        },
    ],
)
