"""A mixture of experts for ``quality.py``: SmolLM2 upcycled, as in Sparse Upcycling (Komatsuzaki et al., 2023).

Every expert begins as a copy of the block's MLP, and a token gets the two experts that a random router likes best. So
the mixture computes what SmolLM2 computes, until experts and routers are tuned on sentences of all sorts, each expert
on what is sent to it.
"""

import random
import shutil
from pathlib import Path
from typing import Any

from emloc_demo.model import write_base
from quality_rows import general_text

EXPERTS, PER_TOKEN = 4, 2
#: Steps of the tuning, tokens in each, and the learning rate.
STEPS, TOKENS, RATE = 48, 256, 5e-4


def write_upcycled(directory: Path) -> Path:
    """Write the mixture as a checkpoint in fp32, and return the directory."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = write_base(directory.with_name(f"{directory.name}.smollm2"))
    torch.manual_seed(0)
    model = upcycled(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32))
    tokenizer = AutoTokenizer.from_pretrained(source)
    tune_apart(model, tokenizer, directory.parent)
    shutil.rmtree(source)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def upcycled(model: Any) -> Any:
    """Return a Mixtral that computes what a Llama computes."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    llama = model.config.to_dict()
    shared = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim",
              "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "bos_token_id",
              "eos_token_id", "pad_token_id", "tie_word_embeddings")  # fmt: skip
    config = MixtralConfig(**{name: llama[name] for name in shared}, sliding_window=None,
                           num_local_experts=EXPERTS, num_experts_per_tok=PER_TOKEN)  # fmt: skip
    mixture = MixtralForCausalLM(config)
    mixture.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        for layer, dense in zip(mixture.model.layers, model.model.layers, strict=True):
            mlp = dense.mlp
            layer.mlp.experts.gate_up_proj.copy_(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
            layer.mlp.experts.down_proj.copy_(mlp.down_proj.weight)
            torch.nn.init.normal_(layer.mlp.gate.weight, std=0.02)
    mixture.generation_config = model.generation_config
    return mixture


def tune_apart(model: Any, tokenizer: Any, archives: Path) -> None:
    """Tune routers and experts, in place, on sentences of all sorts."""
    import torch
    from transformers.optimization import Adafactor

    ids = torch.tensor(tokenizer("\n".join(general_text(archives)))["input_ids"])
    starts = random.Random(0).sample(range(0, len(ids) - TOKENS, TOKENS), STEPS)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".mlp." in name)
    tuned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = Adafactor(tuned, lr=RATE, relative_step=False, scale_parameter=False, warmup_init=False)
    model.train()
    for step, start in enumerate(starts):
        row = ids[start : start + TOKENS][None]
        loss = model(input_ids=row, labels=row, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"tuning experts apart: {step + 1} of {STEPS}, loss {float(loss.detach()):.3f}", flush=True)
    model.requires_grad_(True).eval()
