"""The declarations of the transformers. The model type is the name of the class in diffusers (``_class_name``)."""

from typing import Any

from emloc_core.family import Family, Tower

_EMBEDDING = "the entry of pictures, prompts or time: small, and read by every block"
_ENDS = {
    "*embed*": _EMBEDDING,
    "norm_out*": "the last modulation, before the pictures leave",
    "proj_out": "writes the pictures",
}
#: The Linears of a block that keeps pictures and prompts apart, and joins them in its attention.
_READS = [["attn.to_q", "attn.to_k", "attn.to_v"], ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"]]
_JOINT_ATTENTION = [*_READS, ["attn.to_out.0"], ["attn.to_add_out"]]
#: The same, for blocks where prompts leave first.
_PROMPTS_FIRST = [*_READS, ["attn.to_add_out"], ["attn.to_out.0"]]
_FEED_FORWARDS = [["ff.net.0.proj"], ["ff.net.2"], ["ff_context.net.0.proj"], ["ff_context.net.2"]]
#: Ends of paths that diffusers' scripts put a LoRA on, long enough to be unambiguous.
_LORA = [
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
]
_LORA_FEED_FORWARDS = ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"]


def _family(name: str, class_name: str, towers: list[Tower], tiny: list[dict[str, Any]], **options: Any) -> Family:
    return Family(
        name=name,
        model_types={class_name},
        towers=towers,
        auto_class=class_name,
        modality="text-to-image",
        objective="flow",
        tiny_configs=[{"model_type": class_name, **settings} for settings in tiny],
        **{"keep_dense": _ENDS, **options},
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
            input_groups=[["norm1.linear", "norm1_context.linear"], *_JOINT_ATTENTION, *_FEED_FORWARDS],
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

_TINY_FLUX2 = {
    "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": 24, "timestep_guidance_channels": 16, "axes_dims_rope": [4, 4, 4, 4],
}  # fmt: skip
FLUX2 = _family(
    "flux2",
    "Flux2Transformer2DModel",
    [
        Tower(
            name="joint",
            blocks="transformer_blocks",
            input_groups=[
                *_PROMPTS_FIRST,
                *(["ff.linear_in"], ["ff.linear_out"], ["ff_context.linear_in"], ["ff_context.linear_out"]),
            ],
            lora_targets=_LORA,
        ),
        Tower(
            name="single",
            blocks="single_transformer_blocks",
            input_groups=[["attn.to_qkv_mlp_proj"], ["attn.to_out"]],
            lora_targets=["attn.to_qkv_mlp_proj"],
        ),
    ],
    [_TINY_FLUX2, {**_TINY_FLUX2, "guidance_embeds": False}],
    keep_dense={**_ENDS, "*_modulation*": "shared by all blocks, so that there are few"},
)

_TINY_SD3 = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 3, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 24, "caption_projection_dim": 32, "pooled_projection_dim": 20,
    "pos_embed_max_size": 8, "qk_norm": "rms_norm",
}  # fmt: skip
SD3 = _family(
    "sd3",
    "SD3Transformer2DModel",
    [
        Tower(
            name="joint",
            blocks="transformer_blocks",
            input_groups=[
                ["norm1.linear", "norm1_context.linear"],
                *_PROMPTS_FIRST,
                ["attn2.to_q", "attn2.to_k", "attn2.to_v"],
                ["attn2.to_out.0"],
                *_FEED_FORWARDS,
            ],
            lora_targets=_LORA,
        )
    ],
    [_TINY_SD3, {**_TINY_SD3, "dual_attention_layers": [0]}],
)

_TINY_QWEN = {
    "in_channels": 16, "out_channels": 4, "num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": 24, "axes_dims_rope": [4, 6, 6],
}  # fmt: skip
QWEN_IMAGE = _family(
    "qwen-image",
    "QwenImageTransformer2DModel",
    [
        Tower(
            name="joint",
            blocks="transformer_blocks",
            input_groups=[
                ["img_mod.1", "txt_mod.1"],
                *_JOINT_ATTENTION,
                *(["img_mlp.net.0.proj"], ["img_mlp.net.2"], ["txt_mlp.net.0.proj"], ["txt_mlp.net.2"]),
            ],
            lora_targets=_LORA,
        )
    ],
    [_TINY_QWEN],
    keep_dense={**_ENDS, "img_in": _EMBEDDING, "txt_in": _EMBEDDING},
)

_ALONE = [
    ["attention.to_q", "attention.to_k", "attention.to_v"],
    ["attention.to_out.0"],
    ["feed_forward.w1", "feed_forward.w3"],
    ["feed_forward.w2"],
]
_LORA_ALONE = ["attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0",
               "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]  # fmt: skip
_MODULATED = [["adaLN_modulation.0"], *_ALONE]
Z_IMAGE = _family(
    "z-image",
    "ZImageTransformer2DModel",
    [
        Tower(name="pictures", blocks="noise_refiner", input_groups=_MODULATED, lora_targets=_LORA_ALONE),
        Tower(name="prompts", blocks="context_refiner", input_groups=_ALONE, lora_targets=_LORA_ALONE),
        Tower(name="joint", blocks="layers", input_groups=_MODULATED, lora_targets=_LORA_ALONE),
    ],
    [
        {
            "in_channels": 4, "dim": 48, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 3, "n_kv_heads": 3,
            "cap_feat_dim": 24, "axes_dims": [4, 6, 6], "axes_lens": [64, 16, 16],
        }
    ],
    keep_dense={"*embedder*": _EMBEDDING, "all_final_layer*": "writes the pictures"},
)  # fmt: skip

FAMILIES = [FLUX, FLUX2, SD3, QWEN_IMAGE, Z_IMAGE]
