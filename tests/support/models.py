"""Tiny models with seeded random weights, and a real tokenizer for them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from support.rows import example_rows
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
#: The same, with a thought before the last answer that the generation prompt lacks, as models that may think have.
THINKING_TEMPLATE = CHAT_TEMPLATE.replace(
    "{{ message['content'] }}",
    "{% if message['role'] == 'assistant' and loop.last %}<system>thought. {% endif %}{{ message['content'] }}",
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A BPE tokenizer of at most 128 tokens with a chat template: bos 1, eos 2, pad 0, as in the tiny config."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    special = ["<pad>", "<s>", "</s>", "<unk>", "<user>", "<assistant>", "<system>"]
    alphabet = list("abcdefghijklmnopqrstuvwxyz0123456789.,:?!")
    trainer = trainers.BpeTrainer(
        vocab_size=128, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([row["prompt"] + row["completion"] for row in example_rows()], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_in_four_bits(model: Path, directory: Path) -> Path:
    """Save a model as bitsandbytes packs it, NF4 with double quantisation, with its tokenizer."""
    packing = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    AutoModelForCausalLM.from_pretrained(model, quantization_config=packing).save_pretrained(directory)
    AutoTokenizer.from_pretrained(model).save_pretrained(directory)
    return directory


def save_tiny_model(settings: Mapping[str, Any], directory: Path) -> Path:
    """Save a model with its tokenizer, fp32 with seeded random weights, from arguments of ``AutoConfig.for_model``."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.float32)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory
