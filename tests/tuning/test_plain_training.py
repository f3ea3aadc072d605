"""With stock libraries alone, an emulator loads and trains, and its adapter loads onto the base, whatever is tied."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from support.jobs import compress_job
from support.models import tiny_tokenizer
from support.rows import example_rows
from support.run import PLAIN_TRAINING
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import emloc_core.standins.quantizer  # noqa: F401  registers the emulator's loader
from emloc_core.data.rows import load_rows
from emloc_core.family import TINY
from emloc_core.settings import CompressSettings

CONFIGS = {
    "tied": {"model_type": "llama", **TINY, "tie_word_embeddings": True},
    "biases": {"model_type": "llama", **TINY, "attention_bias": True, "mlp_bias": True},
    "tied, with biases": {"model_type": "qwen2", **TINY, "tie_word_embeddings": True},
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "tied, with biases" else pytest.mark.thorough) for name in CONFIGS],
)
def test_an_emulator_trains_and_its_adapter_loads_onto_the_base(name: str, rows_file: Path, tmp_path: Path):
    settings = dict(CONFIGS[name])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings))
    for parameter, value in model.named_parameters():
        if parameter.endswith("bias"):
            torch.nn.init.normal_(value, std=0.1)
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    compress_settings = CompressSettings(samples=12, selection=6, ratio=0.6)
    rows = load_rows(str(rows_file))
    directory = compress_job(tmp_path / "base", rows, tmp_path / "emulator", compress_settings).run()

    emulator = AutoModelForCausalLM.from_pretrained(directory)
    tied = "tied" in name
    assert (emulator.lm_head.weight is emulator.model.embed_tokens.weight) == tied
    biases = {key: value for key, value in model.state_dict().items() if key.endswith("bias")}
    assert bool(biases) == ("biases" in name)
    assert all(torch.equal(emulator.state_dict()[key], value) for key, value in biases.items())
    trainer = SFTTrainer(
        emulator,
        args=SFTConfig(output_dir=str(tmp_path / "run"), **PLAIN_TRAINING),
        train_dataset=Dataset.from_list(example_rows()[:24]),
        processing_class=AutoTokenizer.from_pretrained(directory),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.model.save_pretrained(tmp_path / "adapter")

    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(saved) == 2 * 7 * TINY["num_hidden_layers"]
    base = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    loaded = base.state_dict()
    assert sum(".lora_" in key for key in loaded) == len(saved)
    assert all(torch.equal(loaded[key.replace(".weight", ".default.weight")], value) for key, value in saved.items())
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert not torch.allclose(base(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-3)
