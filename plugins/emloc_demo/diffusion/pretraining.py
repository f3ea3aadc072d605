"""The demo's base: a FLUX.1 pipeline of half a million parameters, trained here from random weights to draw digits.

It has no VAE, so it draws pixels. Its text encoders have no layers and keep their random weights, so they are tables
of words: the word of a style is the same beside every digit, so a style can carry over to digits that were not shown.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from emloc_demo.diffusion.digits import STYLE, WORDS, load

STEPS, BATCH, LEARNING_RATE, WARMUP = 2400, 64, 2e-3, 50
#: Tokens of a prompt.
LENGTH = 3
_WIDTH = 64


def new_pipeline(seed: int = 0) -> Any:
    """Return the pipeline with random weights."""
    import diffusers
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

    torch.manual_seed(seed)
    words = {word: index for index, word in enumerate(["<pad>", "<unk>", "</s>", STYLE, *WORDS])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=LENGTH, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    )
    clip = CLIPTextConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=32, num_hidden_layers=0, num_attention_heads=2,
        max_position_embeddings=LENGTH, bos_token_id=0, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    t5 = T5Config(vocab_size=len(words), d_model=_WIDTH, d_ff=_WIDTH, d_kv=16, num_layers=0, num_heads=4)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=2, num_single_layers=4, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=_WIDTH, pooled_projection_dim=32, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=CLIPTextModel(clip),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=tokenizer,
        transformer=transformer,
    )


def pretrain(
    directory: Path, steps: int = STEPS, advance: Callable[[str, int, int], None] = lambda *_: None, seed: int = 0
) -> Path:
    """Train the transformer, write the pipeline, and return its directory.

    It is written under a temporary name and renamed when complete; an interrupted training starts again.

    Args:
        directory: where the pipeline goes.
        steps: optimiser steps.
        advance: called with the loss, the steps done, and ``steps``.
        seed: seed of weights and noise: the same seed and versions give the same model.
    """
    import torch
    from emloc_diffusers.calls import call_of
    from emloc_diffusers.flow import squared_error

    pipe = new_pipeline(seed)
    model, call = pipe.transformer.train(), call_of("FluxTransformer2DModel")
    pictures, digits = load()
    latents = torch.from_numpy(pictures).float()[:, None] * 2 - 1
    with torch.no_grad():
        prompts = [call.prompt(pipe, word) for word in WORDS]
    table = {name: torch.stack([prompt[name] for prompt in prompts]) for name in prompts[0]}
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, 1.0) * max(1 - step / steps, 0.02)
    )
    for step in range(steps):
        batch = torch.randint(len(latents), (BATCH,))
        prompt = {name: tensor[torch.from_numpy(digits)[batch]] for name, tensor in table.items()}
        drawn, sigma = latents[batch], torch.rand(BATCH)
        loss = squared_error(model, call, drawn, torch.randn_like(drawn), sigma, prompt, torch.ones(BATCH)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        advance(f"loss {loss.item():.3f}", step + 1, steps)
    model.eval()
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipe.save_pretrained(partial)
    os.rename(partial, directory)
    return directory
