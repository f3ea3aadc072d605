"""The reference: what a whole model in memory computes, by ordinary forwards and the paper's formulas, in fp64.

Nothing here streams, and nothing is imported from EMLoC: where the two disagree, EMLoC is wrong.
"""

import copy
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes import functional
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

Inputs = Mapping[str, torch.Tensor]


def logits(model: Any, rows: Sequence[Inputs]) -> list[torch.Tensor]:
    """Return the logits of every row, (1, T, vocabulary)."""
    with torch.no_grad():
        return [model(**row, use_cache=False).logits.float() for row in rows]


def weight_of(linear: nn.Module) -> torch.Tensor:
    """Return the matrix that a Linear, or a Conv1D, multiplies by, (m, n): its weight, or a view of it."""
    return linear.weight.T if isinstance(linear, Conv1D) else linear.weight


def inputs_of(model: Any, rows: Sequence[Inputs], linears: Iterable[str]) -> dict[str, torch.Tensor]:
    """Return all inputs of Linears, (tokens, in_features), in fp64, by path; only of Linears that ran."""
    inputs: dict[str, list[torch.Tensor]] = defaultdict(list)

    def watching(path: str) -> Callable[..., None]:
        return lambda _module, args: inputs[path].append(args[0].detach().double().flatten(0, -2).clone())

    hooks = [model.get_submodule(path).register_forward_pre_hook(watching(path)) for path in linears]
    logits(model, rows)
    for hook in hooks:
        hook.remove()
    return {path: torch.cat(parts) for path, parts in inputs.items()}


def output_error(weight: torch.Tensor, stand_in: torch.Tensor, x: torch.Tensor, stand_in_inputs: torch.Tensor) -> float:
    """Return ``||W X - What X'|| / ||W X||`` for tokens x in the base and x' in the emulator, both (tokens, n)."""
    exact = x @ weight.double().T
    return float((exact - stand_in_inputs @ stand_in.double().T).norm() / exact.norm().clamp(min=1e-30))


def least_error(weight: torch.Tensor, x: torch.Tensor, rank: int) -> float:
    """Return the least output error of any matrix of a rank (Eckart and Young): what the paper's factors reach."""
    energies = torch.linalg.svdvals(x @ weight.double().T).square()
    return float((energies[rank:].sum() / energies.sum().clamp(min=1e-60)).sqrt())


def in_four_bits(weight: torch.Tensor) -> torch.Tensor:
    """Return the weight with every number rounded on its own to NF4, by bitsandbytes."""
    options = {"quant_type": "nf4", "blocksize": 64, "compress_statistics": True}
    return functional.dequantize_4bit(*functional.quantize_4bit(weight.float().contiguous(), **options)).view_as(weight)


def on_three_levels(weight: torch.Tensor) -> torch.Tensor:
    """Return the weight with every number rounded on its own to -s, 0 or s (Li and Liu, 2016, arXiv 1605.04711)."""
    large = weight.abs() > 0.7 * weight.abs().mean(1, keepdim=True)
    scale = (weight.abs() * large).sum(1, keepdim=True) / large.sum(1, keepdim=True).clamp(min=1)
    return scale * weight.sign() * large


def effective_weight(linear: nn.Linear) -> torch.Tensor:
    """Return the matrix that a Linear, or its stand-in, multiplies by, (m, n): its output for the identity."""
    with torch.no_grad():
        identity = torch.eye(linear.in_features)
        output: torch.Tensor = linear(identity).float()
        return (output if linear.bias is None else output - linear.bias.float()).T.contiguous()


def stacks(experts: Any) -> dict[str, torch.Tensor]:
    """Return the stacks of matrices that stand-ins of experts stand for, as the base keeps them, by name."""
    dense = experts.dense()
    return {name: dense.get_parameter(name).detach() for name in experts.ranks}


def with_weights(model: Any, weights: Mapping[str, torch.Tensor]) -> Any:
    """Return a copy of the model with these weights of Linears, by path, and stacks of experts, by name."""
    model = copy.deepcopy(model)
    names = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for path, weight in weights.items():
            if path in names:
                names[path].copy_(weight)
            else:
                weight_of(model.get_submodule(path)).copy_(weight)
    return model


def nudged(model: Any, seed: int) -> Any:
    """Return a copy of the model with every weight off by about as much as fp32 rounds."""
    model = copy.deepcopy(model)
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1 + 1e-6 * torch.randn(weight.shape, generator=noise))
    return model


@dataclass(frozen=True)
class Lora:
    """A LoRA of one Linear: ``scale * B A``."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    @property
    def delta(self) -> torch.Tensor:
        """What it adds to the weight, (m, n), in fp64."""
        return self.scale * self.b.double() @ self.a.double()

    def corrected(self, weight: torch.Tensor, stand_in: torch.Tensor) -> torch.Tensor:
        """Return what the corrected LoRA adds to the base's weight, unclamped (paper, section 3.4).

        It takes off, on the LoRA's input subspace, what the base answers and the emulator did not.
        """
        q = torch.linalg.svd(self.a.double(), full_matrices=False).Vh.T  # (n, r)
        return self.delta - (weight.double() - stand_in.double()) @ q @ q.T


def loras(directory: Path) -> dict[str, Lora]:
    """Return the LoRAs of a directory that PEFT, or a stage, has written, by path of the Linear."""
    config = json.loads((directory / "adapter_config.json").read_text())
    tensors = load_file(directory / "adapter_model.safetensors")
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    by_path = {}
    for name, a in tensors.items():
        path, is_a, _ = name.removeprefix("base_model.model.").partition(".lora_A.weight")
        if is_a:
            by_path[path] = Lora(a, tensors[name.replace(".lora_A.", ".lora_B.")], scale)
    return by_path
