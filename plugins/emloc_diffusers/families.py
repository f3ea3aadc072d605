"""The transformers as data. Every class has its name in diffusers as its model type (``_class_name``)."""

from typing import Any

from emloc_core.family import Family, Tower

_ENDS = {
    "*embed*": "the entry of pictures, prompts and time: small, and read by every block",
    "norm_out*": "the last modulation, before the pictures leave",
    "proj_out": "writes the pictures",
}
#: The Linears of a block that keeps pictures and prompts apart, and joins them in its attention.
_JOINT_ATTENTION = [
    ["attn.to_q", "attn.to_k", "attn.to_v"],
    ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    ["attn.to_out.0"],
    ["attn.to_add_out"],
]
_FEED_FORWARDS = [["ff.net.0.proj"], ["ff.net.2"], ["ff_context.net.0.proj"], ["ff_context.net.2"]]
#: Ends of paths that diffusers' own scripts put a LoRA on, long enough to be found nowhere else.
_LORA = [
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
]
_LORA_FEED_FORWARDS = ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"]


def _family(name: str, class_name: str, towers: list[Tower], tiny: list[dict[str, Any]], **others: Any) -> Family:
    return Family(
        name=name,
        model_types={class_name},
        towers=towers,
        auto_class=class_name,
        modality="text-to-image",
        objective="flow",
        tiny_configs=[{"_class_name": class_name, **settings} for settings in tiny],
        **{"keep_dense": _ENDS, **others},
    )


_TINY_FLUX = {
    "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": 24, "pooled_projection_dim": 20, "axes_dims_rope": [4, 6, 6],
}  # fmt: skip
FLUX = _family(
    "flux",
    "FluxTransformer2DModel",
    [
        Tower(
            name="joint",
            blocks="transformer_blocks",
            input_groups=[["norm1.linear"], ["norm1_context.linear"], *_JOINT_ATTENTION, *_FEED_FORWARDS],
            lora_targets=[*_LORA, *_LORA_FEED_FORWARDS],
        ),
        Tower(
            name="single",
            blocks="single_transformer_blocks",
            input_groups=[["norm.linear"], ["proj_mlp", "attn.to_q", "attn.to_k", "attn.to_v"], ["proj_out"]],
            lora_targets=["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
        ),
    ],
    [_TINY_FLUX, {**_TINY_FLUX, "guidance_embeds": True}],
)

FAMILIES = [FLUX]
