"""What a row holds inside a block by formula, beside the peak that is measured."""

import pytest
import torch
from emloc_llama import LLAMA
from emloc_qwen import QWEN_MOE
from support.allocated import peak_of
from transformers import AutoConfig, AutoModelForCausalLM

from emloc_core.model.inside import inside

TOKENS = 256
#: Wide MLPs, as real models have them.
SIZES = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 32, "moe_intermediate_size": 256}  # fmt: skip


@pytest.mark.parametrize("family", [LLAMA, QWEN_MOE], ids=lambda family: family.name)
def test_a_block_holds_no_more_than_is_planned(family):
    config = AutoConfig.for_model(**{**family.tiny_configs[0], **SIZES})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").requires_grad_(False)
    (held,) = inside(model, family).values()
    block, hidden = model.model.layers[0], torch.randn(1, TOKENS, config.hidden_size)
    rotary = model.model.rotary_emb(hidden, torch.arange(TOKENS)[None])

    def forward(hidden):
        output = block(hidden, position_embeddings=rotary)
        return output[0] if isinstance(output, tuple) else output

    def back():
        forward(hidden.clone().requires_grad_()).sum().backward()

    with torch.no_grad():
        passing = peak_of(lambda: forward(hidden))
    assert passing <= held.forward * TOKENS * 4 <= 3 * passing
    assert (peak := peak_of(back)) <= held.backward * TOKENS * 4 <= 3 * peak
