"""Tiny pipelines of diffusers on disk, with random weights, and rows of pictures for them."""

from pathlib import Path
from typing import Any

import diffusers
import numpy
import torch
from emloc_diffusers.families import FLUX, FLUX2, QWEN_IMAGE, SD3, Z_IMAGE
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from emloc_core.family import Family

#: FLUX.1 with one block of each kind.
SHALLOW = {**FLUX.tiny_configs[0], "num_layers": 1, "num_single_layers": 1}
WORDS = ["<pad>", "<unk>", "</s>", "a", "photo", "of", "sks", "cat", "dog", "house"]


def tokenizer(length: int = 6) -> PreTrainedTokenizerFast:
    """Return a tokenizer of a few words, which pads to a length."""
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=length, **special)


def random(model: Any) -> Any:
    """Return a model in which no weight is zero or one, as norms' weights would be."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def flux_pipeline(directory: Path, settings: dict[str, Any] = SHALLOW, *, vae: bool = True) -> Path:
    """Write a FLUX.1 pipeline; without a VAE it makes the pixels themselves."""
    torch.manual_seed(0)
    config = _config(FLUX, settings)
    width, pooled = config["joint_attention_dim"], config["pooled_projection_dim"]
    clip = CLIPTextConfig(vocab_size=16, hidden_size=pooled, intermediate_size=32, num_hidden_layers=1,
                          num_attention_heads=2, max_position_embeddings=8, eos_token_id=2)  # fmt: skip
    diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=_autoencoder(config["in_channels"] // 4) if vae else None,
        text_encoder=random(CLIPTextModel(clip)),
        tokenizer=tokenizer(),
        text_encoder_2=_t5(width),
        tokenizer_2=tokenizer(),
        transformer=random(diffusers.FluxTransformer2DModel(**config)),
    ).save_pretrained(directory)
    return directory


def flux2_pipeline(directory: Path) -> Path:
    """Write a FLUX.2 klein pipeline, distilled."""
    torch.manual_seed(0)
    config = _config(FLUX2, FLUX2.tiny_configs[1]) | {"joint_attention_dim": 3 * 24}  # of three layers
    autoencoder = diffusers.AutoencoderKLFlux2(**_VAE, latent_channels=4)
    diffusers.Flux2KleinPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=random(autoencoder),
        text_encoder=random(Qwen3ForCausalLM(Qwen3Config(**_QWEN, num_hidden_layers=27, head_dim=12))),
        tokenizer=_chat(),
        transformer=random(diffusers.Flux2Transformer2DModel(**config)),
        is_distilled=True,
    ).save_pretrained(directory)
    return directory


def sd3_pipeline(directory: Path, *, t5: bool = True) -> Path:
    """Write a Stable Diffusion 3 pipeline."""
    torch.manual_seed(0)
    config = _config(SD3)
    clip = CLIPTextConfig(vocab_size=16, hidden_size=config["joint_attention_dim"] // 2, intermediate_size=16,
                          num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=8, eos_token_id=2,
                          projection_dim=config["pooled_projection_dim"] // 2)  # fmt: skip
    diffusers.StableDiffusion3Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_autoencoder(config["in_channels"]),
        text_encoder=random(CLIPTextModelWithProjection(clip)),
        tokenizer=tokenizer(),
        text_encoder_2=random(CLIPTextModelWithProjection(clip)),
        tokenizer_2=tokenizer(),
        text_encoder_3=_t5(config["joint_attention_dim"]) if t5 else None,
        tokenizer_3=tokenizer() if t5 else None,
        transformer=random(diffusers.SD3Transformer2DModel(**config)),
    ).save_pretrained(directory)
    return directory


def qwen_image_pipeline(directory: Path) -> Path:
    """Write a Qwen-Image pipeline."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 24}
    reader = Qwen2_5_VLConfig(
        text_config={**_QWEN, "num_hidden_layers": 2, "rope_parameters": rope},
        vision_config={**vision, "patch_size": 14, "fullatt_block_indexes": [0]},
        vision_start_token_id=12, vision_end_token_id=13, image_token_id=14, video_token_id=15,
    )  # fmt: skip
    autoencoder = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.1] * 4, latents_std=[2.0] * 4,
    )  # fmt: skip
    diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=random(autoencoder),
        text_encoder=random(Qwen2_5_VLForConditionalGeneration(reader)),
        tokenizer=tokenizer(64),  # the pipeline drops the first 34 tokens of its template
        transformer=random(diffusers.QwenImageTransformer2DModel(**_config(QWEN_IMAGE))),
    ).save_pretrained(directory)
    return directory


def z_image_pipeline(directory: Path) -> Path:
    """Write a Z-Image pipeline."""
    torch.manual_seed(0)
    config = _config(Z_IMAGE)
    diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_autoencoder(config["in_channels"]),
        text_encoder=random(Qwen3Model(Qwen3Config(**_QWEN, num_hidden_layers=2, head_dim=12))),
        tokenizer=_chat(),
        transformer=random(diffusers.ZImageTransformer2DModel(**config)),
    ).save_pretrained(directory)
    return directory


_VAE = {
    "block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip
_QWEN = {
    "vocab_size": 16, "hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip


def _config(family: Family, settings: dict[str, Any] | None = None) -> dict[str, Any]:
    return {name: value for name, value in (settings or family.tiny_configs[0]).items() if name != "model_type"}


def _autoencoder(channels: int) -> Any:
    return random(diffusers.AutoencoderKL(
        **_VAE, latent_channels=channels, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.36,
        shift_factor=0.12,
    ))  # fmt: skip


def _t5(width: int) -> Any:
    return random(T5EncoderModel(T5Config(vocab_size=16, d_model=width, d_ff=32, d_kv=8, num_layers=1, num_heads=2)))


def _chat() -> PreTrainedTokenizerFast:
    chat_tokenizer = tokenizer()
    chat_tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    return chat_tokenizer


def picture_rows(directory: Path, count: int = 6, side: int = 8) -> list[dict[str, Any]]:
    """Return rows of random pictures, written into a directory, and prompts."""
    directory.mkdir(parents=True, exist_ok=True)
    numbers = numpy.random.default_rng(0)
    rows = []
    for index in range(count):
        path = directory / f"{index}.png"
        Image.fromarray(numbers.integers(0, 256, (side, side, 3), dtype=numpy.uint8)).save(path)
        prompt = f"a photo of {'sks' if index % 2 else 'house'} {WORDS[7 + index % 2]}"
        rows.append({"prompt": prompt, "image": str(path), "weight": 1.0 if index % 2 else 0.5})
    return rows
