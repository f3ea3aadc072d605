"""Baselines from the literature: smaller or coarser stand-ins that a LoRA is tuned on, and what it becomes on the base.

- ``depth``: blocks left out, evenly between the first and the last (Offsite-Tuning, arXiv 2302.04870).
- ``pruned``: the least important heads and channels left out of every block, by first-order Taylor importance on the
  calibration rows (LLM-Pruner, arXiv 2305.11627); the LoRA gets zeros where they were (LoRAM, arXiv 2502.13533).
- ``pruned-nf4``: the same, with what is left in four bits (QLoRAM).
- ``hqq``: weights of two or three bits (https://github.com/dropbox/hqq), 64 numbers to a scale and a zero.

They are measured and not offered: a stand-in is an ordinary model, rounded where the method rounds, and its memory is
that of its files by formula. LoRAM also trains the pruned model on general text before it is published; nothing is
trained here that the user does not have.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

#: Bytes of a number in four bits, scales included, over those of bf16.
_FOUR_BITS = (0.5 + 1 / 64 + 4 / (64 * 256)) / 2
_GROUP, _ALIGNED = 64, 16
Features = dict[str, list[torch.Tensor]]
_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class StandIn:
    """What a LoRA is tuned on instead of the base.

    Attributes:
        model: an ordinary model.
        share: bytes of its block Linears over those of the base's.
        blocks: which blocks of the base its own are.
        outputs, inputs: for Linears with fewer features than the base's, by name: which ones each block has.
    """

    model: Any
    share: float
    blocks: Sequence[int]
    outputs: Features
    inputs: Features


def depth(base: Any, memory: float, _rows: Sequence[Any]) -> StandIn:
    """Leave out blocks until the others take ``memory`` of the bytes."""
    total = base.config.num_hidden_layers
    blocks = torch.linspace(0, total - 1, max(2, round(memory * total))).round().int().tolist()
    smaller = _build(base, num_hidden_layers=len(blocks))
    for index, block in enumerate(blocks):
        smaller.model.layers[index].load_state_dict(base.model.layers[block].state_dict())
    return StandIn(smaller, len(blocks) / total, blocks, {}, {})


def pruned(base: Any, memory: float, rows: Sequence[Any]) -> StandIn:
    """Leave out heads, with the queries that share their keys, and channels, in about equal parts."""
    config = base.config
    groups, head = config.num_key_value_heads, config.head_dim
    queries = config.num_attention_heads // groups
    heads = max(1, round(memory * groups))
    attention, channel = _numbers(base, ("q_proj", "k_proj", "v_proj", "o_proj")), 3 * config.hidden_size
    total = attention + channel * config.intermediate_size
    channels = round((memory * total - attention * heads / groups) / channel / _ALIGNED) * _ALIGNED
    channels = min(max(channels, _ALIGNED), config.intermediate_size)
    outputs: Features = defaultdict(list)
    inputs: Features = defaultdict(list)
    for scores in _importance(base, rows):
        by_group = scores["o_proj"].sum(0).view(groups, -1).sum(1)
        by_group = by_group + sum(
            scores[name].sum(1).view(groups, -1).sum(1) for name in ("q_proj", "k_proj", "v_proj")
        )
        best = by_group.topk(heads).indices.sort().values
        by_channel = scores["gate_proj"].sum(1) + scores["up_proj"].sum(1) + scores["down_proj"].sum(0)
        kept = by_channel.topk(channels).indices.sort().values
        keyed, queried = (_features(best, count * head) for count in (1, queries))
        of_block = {"q_proj": queried, "k_proj": keyed, "v_proj": keyed, "gate_proj": kept, "up_proj": kept}
        for name, features in of_block.items():
            outputs[name].append(features)
        inputs["o_proj"].append(queried)
        inputs["down_proj"].append(kept)
    smaller = _build(
        base, num_key_value_heads=heads, num_attention_heads=heads * queries, intermediate_size=channels, head_dim=head
    )
    weights = smaller.state_dict()
    for key, weight in base.state_dict().items():
        weights[key].copy_(_part(weight, key, outputs, inputs))
    share = _numbers(smaller, _LINEARS) / _numbers(base, _LINEARS)
    return StandIn(smaller, share, range(config.num_hidden_layers), outputs, inputs)


def _part(weight: torch.Tensor, key: str, outputs: Features, inputs: Features) -> torch.Tensor:
    """Return what is kept of a weight."""
    name = key.split(".")[-2]
    if name in outputs:
        return weight[outputs[name][int(key.split(".")[2])]]
    return weight[:, inputs[name][int(key.split(".")[2])]] if name in inputs else weight


def pruned_nf4(base: Any, memory: float, rows: Sequence[Any]) -> StandIn:
    """Leave out as many heads and channels as four bits do not save."""
    from emloc_core.standins import nf4

    stand_in = pruned(base, memory / _FOUR_BITS, rows)
    for weight in _weights(stand_in.model):
        weight.copy_(nf4.rounded(weight))
    return StandIn(stand_in.model, stand_in.share * _FOUR_BITS, stand_in.blocks, stand_in.outputs, stand_in.inputs)


def hqq(base: Any, memory: float, _rows: Sequence[Any]) -> StandIn:
    """Round all weights to as many bits as ``memory`` allows, two scales in 16 bits for every 64 numbers."""
    from hqq.core.quantize import Quantizer

    bits = int(16 * memory - 32 / _GROUP)
    for weight in _weights(base):
        rounded, meta = Quantizer.quantize(
            weight, nbits=bits, group_size=_GROUP, axis=1, device="cpu", compute_dtype=torch.float32
        )
        weight.copy_(Quantizer.dequantize(rounded, meta))
    return StandIn(base, (bits + 32 / _GROUP) / 16, range(base.config.num_hidden_layers), {}, {})


BASELINES: dict[str, Callable[[Any, float, Sequence[Any]], StandIn]] = {
    "depth": depth, "pruned": pruned, "pruned-nf4": pruned_nf4, "hqq": hqq,
}  # fmt: skip


def make(name: str, memory: float, base: Path, rows: Path, output: Path) -> StandIn:
    """Write a stand-in for a base, a Llama, as an ordinary checkpoint beside its tokenizer.

    Args:
        name: a key of :data:`BASELINES`.
        memory: share of the bytes of the base's block Linears that it may take.
        base: directory of the model.
        rows: the calibration rows.
        output: directory to write.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from emloc_core.data.rows import load_rows
    from emloc_core.data.tokenize import encode

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    samples = encode(load_rows(str(rows)), tokenizer)
    with torch.no_grad():
        stand_in = BASELINES[name](model, memory, samples)
    stand_in.model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)
    return stand_in


def on_the_base(adapter: Path, stand_in: StandIn, base: Path, output: Path) -> Path:
    """Write what an adapter of a stand-in is on the base, which has more blocks and features: zeros there.

    Its moments go with it, so that exact steps begin as from an emulator's LoRA.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from emloc_core.adapters.moments import FILE
    from emloc_core.files.shards import write_shard

    with torch.device("meta"):
        weights = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base)).state_dict()
    output.mkdir()
    lora = _widened(load_file(adapter / "adapter_model.safetensors"), stand_in, weights)
    save_file(lora, output / "adapter_model.safetensors", {"format": "pt"})
    write_shard(output / FILE, _widened(load_file(adapter / FILE), stand_in, weights))
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(base.absolute())
    (output / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return output


def _widened(
    tensors: dict[str, torch.Tensor], stand_in: StandIn, weights: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return tensors in the shapes of a LoRA, by its keys, as they are for the base's weights."""
    widened = {}
    for key, tensor in tensors.items():
        parts = key.split(".")
        name, position = parts[-3], parts.index("layers") + 1
        index = int(parts[position])
        parts[position] = str(stand_in.blocks[index])
        m, n = weights[".".join(parts[2:-2]) + ".weight"].shape
        kept_features, axis = (stand_in.inputs, 1) if parts[-2] == "lora_A" else (stand_in.outputs, 0)
        zeros = tensor.new_zeros((tensor.shape[0], n) if axis else (m, tensor.shape[1]))
        features = kept_features[name][index] if name in kept_features else torch.arange(tensor.shape[axis])
        widened[".".join(parts)] = zeros.index_copy(axis, features, tensor)
    return widened


def _build(base: Any, **changes: Any) -> Any:
    """Return a model like the base but for its sizes, with its weights outside the blocks."""
    config = type(base.config).from_dict({**base.config.to_dict(), **changes})
    smaller = type(base)(config).float().eval()
    outside = {key: value for key, value in base.state_dict().items() if ".layers." not in key}
    smaller.load_state_dict(outside, strict=False)
    return smaller


def _weights(model: Any) -> list[torch.Tensor]:
    return [parameter.data for name, parameter in model.named_parameters() if name.split(".")[-2] in _LINEARS]


def _numbers(model: Any, names: Sequence[str]) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if name.split(".")[-2] in names)


def _features(groups: torch.Tensor, size: int) -> torch.Tensor:
    """Return the features of groups of so many each."""
    return (groups[:, None] * size + torch.arange(size)).flatten()


def _importance(model: Any, samples: Sequence[Any]) -> list[dict[str, torch.Tensor]]:
    """Return ``|w dL/dw|`` of every block's weights, with L the loss of the rows' answers."""
    with torch.enable_grad():
        for sample in samples:
            inputs = sample.inputs("cpu")
            labels = inputs["input_ids"].clone()
            labels[0, ~torch.tensor(sample.completion_mask, dtype=torch.bool)] = -100
            (model(**inputs, labels=labels, use_cache=False).loss / len(samples)).backward()
    scores = [
        {
            name.split(".")[-2]: (parameter * parameter.grad).abs()
            for name, parameter in block.named_parameters()
            if name.split(".")[-2] in _LINEARS
        }
        for block in model.model.layers
    ]
    model.zero_grad(set_to_none=True)
    return scores
