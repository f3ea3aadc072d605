"""Checkpoints with random weights at the shapes of real models, written tensor by tensor; and LoRAs for them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from emloc_core.adapters.adapter import write_adapter
from emloc_core.algorithms.lora import Lora
from emloc_core.emulator.declared import find_linears
from emloc_core.emulator.ranks import allocated
from emloc_core.files.checkpoint import INDEX, Checkpoint
from emloc_core.files.documents import write_json
from emloc_core.files.header import TensorInfo
from emloc_core.files.inputs import Inputs
from emloc_core.files.output import Output
from emloc_core.files.shards import ShardWriter
from emloc_core.model.opened import open_model
from emloc_core.plugins.manager import plugin_manager

_LLAMA = {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0}
#: Llama-3.2-1B and Llama-3.1-8B; the caller chooses `num_hidden_layers`.
LLAMA_1B = {**_LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True}  # fmt: skip
LLAMA_8B = {**_LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False}  # fmt: skip
BLOCKS_8B = 32
_VALUES = (4 << 20) - 3  # values drawn for a tensor: not a multiple of a row


def llama(shape: dict[str, Any], blocks: int) -> PreTrainedConfig:
    """Return the config of a Llama of one of the shapes above."""
    settings = {**shape, "num_hidden_layers": blocks, "dtype": "bfloat16"}
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def layout(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Return key -> shape of every tensor that a checkpoint of this config holds."""
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    tied = getattr(model, "all_tied_weights_keys", {})
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if name not in tied}


def nbytes(config: PreTrainedConfig) -> int:
    """Return the size of a checkpoint of this config in bf16."""
    return sum(2 * torch.Size(shape).numel() for shape in layout(config).values())


def write_checkpoint(directory: Path, config: PreTrainedConfig) -> Checkpoint:
    """Write a checkpoint in bf16, one shard per block and one each for embedding and head."""
    directory.mkdir(parents=True)
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, shape in layout(config).items():
        part = key.split(".")[2] if ".layers." in key else key.split(".")[-2]
        shards.setdefault(f"model-{part}.safetensors", {})[key] = shape
    generator = torch.Generator().manual_seed(0)
    for name, tensors in shards.items():
        with ShardWriter(directory / name, {key: ("BF16", shape) for key, shape in tensors.items()}) as writer:
            for key, shape in tensors.items():
                writer.write(key, _values(shape, generator))
    weight_map = {key: name for name, tensors in shards.items() for key in tensors}
    write_json(directory / INDEX, {"metadata": {"total_size": nbytes(config)}, "weight_map": weight_map})
    (directory / "config.json").write_text(config.to_json_string(), encoding="utf-8")
    return Checkpoint(directory)


def _values(shape: tuple[int, ...], generator: torch.Generator) -> Iterator[bytes]:
    """Yield a norm's ones, or normal values of the size that keeps activations as large as they are, in bf16."""
    drawn = torch.ones(_VALUES) if len(shape) == 1 else torch.randn(_VALUES, generator=generator) / shape[-1] ** 0.5
    pool = drawn.bfloat16()
    remaining = torch.Size(shape).numel()
    while remaining:
        # Drawing every value would take longer than what is measured: the pool is reused, from a random start.
        values = pool.roll(int(torch.randint(_VALUES, (1,), generator=generator)))[:remaining]
        yield bytes(values.view(torch.uint8).numpy())
        remaining -= len(values)


def write_emulator(directory: Path, base: Checkpoint, ratio: float) -> Checkpoint:
    """Write the factors that an emulator of ``base`` would have, with random values."""
    model = open_model(str(base.directory), "cpu")
    plan = allocated(find_linears(model.skeleton.model, model.family), ratio)
    tensors: dict[str, tuple[int, ...]] = {}
    for linear in plan.linears:
        if linear.rank is not None:
            tensors[f"{linear.path}.weight"] = (linear.out_features, linear.rank)
            tensors[f"{linear.path}.V"] = (linear.rank, linear.in_features)
    settings = {"max_length": None}
    request = {"base": base.fingerprint(Inputs(directory.resolve().parent)), "settings": settings}
    generator = torch.Generator().manual_seed(1)
    with Output(directory, "emulator", request).build() as staging:
        with ShardWriter(
            staging / "model.safetensors", {key: ("BF16", shape) for key, shape in tensors.items()}
        ) as file:
            for key, shape in tensors.items():
                file.write(key, _values(shape, generator))
        write_json(staging / "config.json", {**base.config, "quantization_config": {"quant_method": "emloc"}})
    return Checkpoint(directory)


def write_lora(directory: Path, base: Checkpoint, trained_on: Path, rank: int) -> Path:
    """Write a LoRA on every Linear of the blocks, as PEFT saves it, with random values."""
    directory.mkdir()
    family = plugin_manager().family_for(base.config)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=family.lora_targets(), task_type="CAUSAL_LM")
    config.base_model_name_or_path = str(trained_on.absolute())
    config.save_pretrained(str(directory))
    generator = torch.Generator().manual_seed(2)

    def lora(tensor: TensorInfo) -> Lora:
        m, n = tensor.shape
        a, b = torch.randn(rank, n, generator=generator), torch.randn(m, rank, generator=generator)
        return Lora(a / n**0.5, 0.01 * b, 2.0)

    targets = {
        key.removesuffix(".weight"): lora(tensor)
        for key, tensor in base.tensors.items()
        if key.split(".")[-2] in family.lora_targets()
    }
    write_adapter(directory, json.loads((directory / "adapter_config.json").read_text(encoding="utf-8")), targets)
    return directory
