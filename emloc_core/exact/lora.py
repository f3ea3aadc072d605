"""A base with a LoRA and no frozen parameters in memory: only the LoRA takes room."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from emloc_core.files.pretrained import load_lora
from emloc_core.model.absent import Absent
from emloc_core.model.skeleton import Skeleton


def lora_on(skeleton: Skeleton, lora: LoraConfig | Path, device: torch.device | str = "cpu") -> PeftModel:
    """Return the skeleton's model with a LoRA, by PEFT; the skeleton is not changed.

    Args:
        skeleton: of the base.
        lora: a new LoRA of this config, drawn from the global generator as on a model in memory, or the directory of
            one to start from.
        device: where the LoRA and the model's buffers are.

    Raises:
        ValueError: PEFT refuses the config.
    """
    model = copy.deepcopy(skeleton.model)
    with _in_appearance(model, skeleton.dtype):
        adapted: Any
        if isinstance(lora, LoraConfig):
            adapted = get_peft_model(model, lora)
        else:
            adapted = load_lora(model, lora, is_trainable=True)
    for module in adapted.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    for parameter in adapted.parameters():
        if isinstance(parameter, Absent):
            parameter.loaded_to = torch.device(device)
        elif parameter.requires_grad:
            parameter.data = parameter.data.to(device)
    return adapted


@contextmanager
def _in_appearance(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Let frozen parameters look as if they were on the CPU; each takes the memory of a single number.

    PEFT makes a LoRA on the device of its weight. On the meta device it would have no initial values.
    """
    nothing = torch.full((), torch.nan, dtype=dtype)
    meta = {id(parameter): parameter for parameter in model.parameters()}
    stood_for = {}  # by id; the stand-ins are kept, so that no other object gets theirs
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            stand_in = nn.Parameter(nothing.to(parameter.dtype).expand(parameter.shape), requires_grad=False)
            stood_for[id(stand_in)] = stand_in, meta[id(parameter)]
            setattr(module, name, stand_in)
    try:
        yield
    finally:
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if id(parameter) in stood_for:
                    setattr(module, name, stood_for[id(parameter)][1])
