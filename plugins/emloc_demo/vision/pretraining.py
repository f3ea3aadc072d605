"""The demo's base model: a small InternVL that is trained here, from random weights, to read digits in pictures."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from emloc_demo.vision.conversations import NO_COLOUR, NO_DIGIT, Conversations, cell_labels
from emloc_demo.vision.pictures import SIDE, Digits
from emloc_demo.vision.processor import CONTEXT, IMAGE_TOKENS, PATCH, make_processor

if TYPE_CHECKING:
    import torch
    from transformers import InternVLForConditionalGeneration, PreTrainedTokenizerFast

STEPS, BATCH = 1200, 32
LEARNING_RATE, WARMUP, WEIGHT_DECAY = 2e-3, 100, 0.05
#: Where the two sorts of language model differ.
_DENSE = {"model_type": "qwen2", "intermediate_size": 384}
_EXPERTS = {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 192,
            "norm_topk_prob": True, "head_dim": 32}  # fmt: skip


def make_model(
    tokenizer: "PreTrainedTokenizerFast", seed: int = 0, *, experts: bool = False
) -> "InternVLForConditionalGeneration":
    """Return the model with random weights in fp32: a vision tower, a projector, and a language model.

    The language model is a Qwen2, or a Qwen3 with a mixture of experts.
    """
    import torch
    from transformers import AutoConfig, InternVLForConditionalGeneration

    config = AutoConfig.for_model(
        "internvl",
        image_token_id=tokenizer.convert_tokens_to_ids(CONTEXT),
        image_seq_length=IMAGE_TOKENS,
        vision_config={
            "image_size": [SIDE, SIDE],
            "patch_size": [PATCH, PATCH],
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "layer_scale_init_value": 1.0,
        },
        text_config={
            **(_EXPERTS if experts else _DENSE),
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
    )
    torch.manual_seed(seed)
    return InternVLForConditionalGeneration(config)


def pretrain(
    directory: Path,
    digits: Digits,
    seed: int = 0,
    steps: int = STEPS,
    advance: Callable[[str, int, int], None] = lambda *_: None,
    *,
    experts: bool = False,
) -> Path:
    """Train the model on random pictures of ``digits``, write it as an HF checkpoint, and return its directory.

    The directory is written under a temporary name and renamed when complete; an interrupted training starts again.

    Args:
        directory: where the checkpoint goes.
        digits: real digits, in all variants that training sees.
        seed: seed of the weights and the pictures: the same seed and versions give the same model.
        steps: optimiser steps.
        advance: called with the loss, the steps done, and ``steps``.
        experts: whether the language model is a mixture of experts.
    """
    import torch

    processor = make_processor()
    model = make_model(processor.tokenizer, seed, experts=experts)
    conversations = Conversations(processor.tokenizer, digits, seed)
    # The content of a cell is also predicted from its token directly: it shows the vision tower early what matters, and
    # saves most of the training. The layer that predicts is not part of the model.
    probe = torch.nn.Linear(model.config.text_config.hidden_size, NO_DIGIT + 1 + NO_COLOUR + 1)
    weights = [*model.parameters(), *probe.parameters()]
    optimizer = torch.optim.AdamW(weights, LEARNING_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, 1.0) * max(1 - step / steps, 0.02)
    )
    model.train()
    for step in range(steps):
        inputs, pictures = conversations.batch(BATCH)
        output = model(**inputs)
        predictions = probe(output.image_outputs.pooler_output).split([NO_DIGIT + 1, NO_COLOUR + 1], dim=-1)
        loss = output.loss + sum(
            _error(logits, labels) for logits, labels in zip(predictions, cell_labels(pictures), strict=True)
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        advance(f"loss {output.loss.item():.3f}", step + 1, steps)

    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.eval().save_pretrained(partial)
    processor.save_pretrained(partial)
    os.rename(partial, directory)
    return directory


def _error(logits: "torch.Tensor", labels: "torch.Tensor") -> "torch.Tensor":
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits.flatten(0, 1), labels.flatten())
