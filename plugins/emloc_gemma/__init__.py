"""The Gemma families: Gemma 3's text models, alone and with a vision tower (SigLIP)."""

from dataclasses import replace

from emloc_llama import LLAMA

from emloc_core.family import TINY, Family, Tower
from emloc_core.hookspecs import hookimpl

#: Most layers attend only within a window.
_TEXT = {**TINY, "head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]}

GEMMA = replace(
    LLAMA,
    name="gemma",
    model_types=frozenset({"gemma3_text"}),
    tiny_configs=[{"model_type": "gemma3_text", **_TEXT}],
)

GEMMA_VL = Family(
    name="gemma-vl",
    model_types=frozenset({"gemma3"}),
    auto_class="AutoModelForImageTextToText",
    modality="image-text",
    towers=[
        Tower(
            name="vision",
            blocks="model.vision_tower.encoder.layers",
            input_groups=[
                ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
                ["self_attn.out_proj"],
                ["mlp.fc1"],
                ["mlp.fc2"],
            ],
        ),
    ],
    keep_dense={"model.multi_modal_projector": "small, and everything that is seen passes through it"},
    nested={"text_config": "model.language_model"},
    tiny_configs=[
        {
            "model_type": "gemma3",
            "image_token_index": 127,
            "boi_token_index": 126,
            "eoi_token_index": 125,
            "mm_tokens_per_image": 4,
            "text_config": {"model_type": "gemma3_text", **_TEXT},
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": 8,
                "patch_size": 2,
                "vision_use_head": False,
            },
        }
    ],
)


@hookimpl
def emloc_families() -> list[Family]:
    """Declare the families."""
    return [GEMMA, GEMMA_VL]
