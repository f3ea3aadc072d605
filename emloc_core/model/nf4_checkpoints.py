"""Checkpoints in four bits as bitsandbytes writes them, for a model that is loaded part by part.

Its own layers hold a weight and its scales in one object that is made on loading, whole. Here they are ordinary
parameters (:class:`~emloc_core.standins.nf4.FourBitLinear`), which transformers' loader fills like any others.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.quantizers.quantizers_utils import should_convert_module

from emloc_core.errors import EmlocError
from emloc_core.standins import nf4
from emloc_core.standins.layer import replace_linear

_READABLE = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
#: What a packed weight says of itself.
_PACKED = {"quant_type": "nf4", "blocksize": nf4.BLOCK, "nested_blocksize": nf4.SCALES}
_STATE, _RANGES = "weight.quant_state.bitsandbytes__nf4", "weight.nested_absmax"


def packed_linears(model: nn.Module, settings: Mapping[str, Any]) -> list[str]:
    """Return the paths of the Linears that a checkpoint has in four bits.

    Args:
        model: as its config describes it, or an outline of that.
        settings: its ``quantization_config``.

    Raises:
        EmlocError: they are packed in another way than ``--kind nf4`` does it.
    """
    if wrong := [name for name, value in _READABLE.items() if settings.get(name) != value]:
        raise EmlocError(
            "Of quantised models, NF4 with double quantisation alone is planned and streamed; the model has "
            f"{wrong[0]} {settings.get(wrong[0])!r}.",
            "Give the original model, or an emulator of the kind nf4.",
            code="unsupported",
        )
    skipped = settings.get("llm_int8_skip_modules") or ["lm_head"]
    linears = (path for path, module in model.named_modules() if isinstance(module, nn.Linear))
    return [path for path in linears if should_convert_module(path, skipped)]


def replace_quantised(model: nn.Module, settings: Mapping[str, Any]) -> list[Any]:
    """Replace the Linears of :func:`packed_linears` by empty layers, in a model that is changed.

    Returns:
        What makes the parameters of these layers of the tensors of the checkpoint, for transformers' loader.
    """
    for path in packed_linears(model, settings):
        replace_linear(model, path, nf4.FourBitLinear)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  # as transformers marks it: TRL asks for it
    return [
        WeightRenaming("weight.absmax", "weight_scales"),
        WeightConverter([_RANGES, _STATE], "weight_ranges", operations=[_Ranges()]),
    ]


class _Ranges(ConversionOps):
    """Puts the mean of all scales, which bitsandbytes writes as JSON, behind the ranges of the scales."""

    def convert(self, input_dict: dict[str, Any], *_: Any, **__: Any) -> dict[str, list[torch.Tensor]]:
        (ranges,), (state,) = input_dict[_RANGES], input_dict[_STATE]
        said = json.loads(bytes(state.to(torch.uint8).tolist()))
        if wrong := [name for name, value in _PACKED.items() if said[name] != value]:
            raise ValueError(f"{wrong[0]} is {said[wrong[0]]!r}, not {_PACKED[wrong[0]]!r}")
        found = torch.cat([ranges, ranges.new_tensor([said["nested_offset"]])])
        if not bool(torch.isfinite(found).all()):
            raise ValueError("scales are NaN or Inf")
        return {"weight_ranges": [found]}
