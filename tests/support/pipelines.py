"""Tiny pipelines of diffusers on disk, with random weights, and rows of pictures for them."""

from pathlib import Path
from typing import Any

import diffusers
import numpy
import torch
from emloc_diffusers.families import FLUX
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

WORDS = ["<pad>", "<unk>", "</s>", "a", "photo", "of", "sks", "cat", "dog", "house"]


def tokenizer(length: int = 6) -> PreTrainedTokenizerFast:
    """Return a tokenizer of a few words, which pads to a length."""
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=length, **special)


def random(model: Any) -> Any:
    """Return a model with no weight that is zero or one, as those of norms would be."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def flux_pipeline(directory: Path, settings: dict[str, Any] | None = None, *, vae: bool = True) -> Path:
    """Write a FLUX.1 pipeline; without a VAE it makes the pixels themselves."""
    torch.manual_seed(0)
    config = {**(settings or FLUX.tiny_configs[0])}
    config.pop("model_type", None)
    width, pooled = config["joint_attention_dim"], config["pooled_projection_dim"]
    clip = CLIPTextConfig(vocab_size=16, hidden_size=pooled, intermediate_size=32, num_hidden_layers=1,
                          num_attention_heads=2, max_position_embeddings=8, eos_token_id=2)  # fmt: skip
    t5 = T5Config(vocab_size=16, d_model=width, d_ff=32, d_kv=8, num_layers=1, num_heads=2)
    autoencoder = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=config["in_channels"] // 4, norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.36, shift_factor=0.12,
    )  # fmt: skip
    diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=random(autoencoder) if vae else None,
        text_encoder=random(CLIPTextModel(clip)),
        tokenizer=tokenizer(),
        text_encoder_2=random(T5EncoderModel(t5)),
        tokenizer_2=tokenizer(),
        transformer=random(diffusers.FluxTransformer2DModel(**config)),
    ).save_pretrained(directory)
    return directory


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
