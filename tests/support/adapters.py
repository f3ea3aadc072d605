"""Emulators and adapters of tiny models, and what is in a directory."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_adapter(model, output, *, size=0.05, **options):
    """An adapter as PEFT saves it, with random halves as training would leave them."""
    config = LoraConfig(**{"target_modules": TARGETS, "r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **options})
    peft_model = get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype="auto"), config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name or "trainable_tokens_delta" in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    peft_model.save_pretrained(output)
    return output


def delta(lora):
    """Return what a LoRA adds to the weight, in fp32 at least."""
    dtype = torch.promote_types(lora.a.dtype, torch.float32)
    return lora.scale * (lora.b.to(dtype) @ lora.a.to(dtype))


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "timing.json"}
