"""Qwen-VL: Qwen2-VL, Qwen2.5-VL (attention within windows) and Qwen3-VL (DeepStack).

Queries, keys and values of the vision tower are one Linear, ``attn.qkv``. A merger turns patches into tokens of the
language model. DeepStack has another merger after some vision blocks, and adds its tokens to the outputs of the first
blocks of the language model.
"""

from dataclasses import replace
from typing import Any

from emloc_llama import LLAMA

from emloc_core.family import TINY, Family, Tower

_MERGER = "small, and everything that is seen passes through it"

#: Tokens that mark an image in the tiny models.
_MARKS = {"image_token_id": 127, "vision_end_token_id": 126, "vision_start_token_id": 125, "video_token_id": 124}
#: Rotary positions in time, height and width: how many of a head's four frequencies each has.
_TEXT = {**TINY, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
_VISION = {"depth": 3, "num_heads": 4, "patch_size": 2, "temporal_patch_size": 2, "spatial_merge_size": 2}


def _tiny(model_type: str, vision: dict[str, Any], *, tied: bool = False, **text: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        **_MARKS,
        "tie_word_embeddings": tied,
        "vision_config": {**_VISION, **vision},
        "text_config": {**_TEXT, **text},
    }


QWEN_VL = Family(
    name="qwen-vl",
    model_types=frozenset({"qwen2_vl", "qwen2_5_vl", "qwen3_vl"}),
    auto_class="AutoModelForImageTextToText",
    modality="image-text",
    towers=[
        Tower(
            name="vision",
            blocks="model.visual.blocks",
            input_groups=[
                ["attn.qkv"],
                ["attn.proj"],
                ["mlp.gate_proj", "mlp.up_proj"],  # Qwen2.5-VL
                ["mlp.down_proj"],
                ["mlp.fc1"],  # Qwen2-VL
                ["mlp.fc2"],
                ["mlp.linear_fc1"],  # Qwen3-VL
                ["mlp.linear_fc2"],
            ],
            # Longer than last parts, which the convolution before the blocks and the mergers behind them share.
            lora_targets=[
                "attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "mlp.fc1", "mlp.fc2",
                "mlp.linear_fc1", "mlp.linear_fc2",
            ],
        ),
        replace(LLAMA.towers[0], blocks="model.language_model.layers"),
    ],
    keep_dense={
        "model.visual.merger.*": _MERGER,
        "model.visual.deepstack_merger_list.*": _MERGER,
    },
    tiny_configs=[
        _tiny("qwen2_vl", {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2, "hidden_act": "quick_gelu"}),
        _tiny(
            "qwen2_5_vl",
            {
                "hidden_size": 32,
                "intermediate_size": 64,
                "out_hidden_size": 32,
                "window_size": 8,
                "fullatt_block_indexes": [1],
            },
        ),
        _tiny(
            "qwen3_vl",
            {
                "hidden_size": 32,
                "intermediate_size": 64,
                "out_hidden_size": 32,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0, 2],
            },
            tied=True,
            head_dim=8,
        ),
    ],
)  # fmt: skip
