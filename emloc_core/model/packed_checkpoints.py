"""Checkpoints whose weights are packed, for a model that is loaded part by part.

In an emulator, stand-ins. In four bits as bitsandbytes writes them: its own layers hold a weight and its scales in one
object that is made on loading, whole; here they are ordinary parameters
(:class:`~emloc_core.standins.nf4.FourBitLinear`), which transformers' loader fills like any others. In MXFP4, stacks of
experts, which are unpacked as they are read: each is two tensors, 32 numbers a block, of four bits each, and an
exponent per block (OCP Microscaling Formats, 1.0); the model has the stack itself, in its own dtype.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.quantizers.quantizers_utils import should_convert_module

from emloc_core.errors import EmlocError
from emloc_core.files.quantised import BITSANDBYTES, MXFP4
from emloc_core.standins import nf4
from emloc_core.standins.layer import replace_linear
from emloc_core.standins.quantizer import METHOD, EmlocConfig

_READABLE = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
#: Fields of a packed weight's state.
_PACKED = {"quant_type": "nf4", "blocksize": nf4.BLOCK, "nested_blocksize": nf4.SCALES}
_STATE, _RANGES = "weight.quant_state.bitsandbytes__nf4", "weight.nested_absmax"

_BLOCKS, _SCALES, _STACK = "_proj_blocks", "_proj_scales", "_proj"
#: Blocks that are unpacked at a time: transformers' indices take 64 times the bytes of what is unpacked to bf16.
_AT_ONCE = 1 << 16


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
            "The only quantised models that can be planned and streamed are NF4 with double quantisation; this one "
            f"has {wrong[0]} {settings.get(wrong[0])!r}.",
            "Give the original model, or an emulator of the kind nf4.",
            code="unsupported",
        )
    skipped = settings.get("llm_int8_skip_modules") or ["lm_head"]
    linears = (path for path, module in model.named_modules() if isinstance(module, nn.Linear))
    return [path for path in linears if should_convert_module(path, skipped)]


def _as_emulated(model: nn.Module, settings: Mapping[str, Any]) -> list[Any]:
    EmlocConfig(**settings).replace(model)
    return []


def _in_four_bits(model: nn.Module, settings: Mapping[str, Any]) -> list[Any]:
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
        fields = json.loads(bytes(state.to(torch.uint8).tolist()))
        if wrong := [name for name, value in _PACKED.items() if fields[name] != value]:
            raise ValueError(f"{wrong[0]} is {fields[wrong[0]]!r}, not {_PACKED[wrong[0]]!r}")
        combined = torch.cat([ranges, ranges.new_tensor([fields["nested_offset"]])])
        if not bool(torch.isfinite(combined).all()):
            raise ValueError("scales are NaN or Inf")
        return {"weight_ranges": [combined]}


class _Unpack(ConversionOps):
    """Unpacks the matrices of a stack one by one, transposed if the model's are."""

    def convert(self, input_dict: dict[str, Any], *_: Any, **kwargs: Any) -> dict[str, list[torch.Tensor]]:
        if missing := [name for name in (_BLOCKS, _SCALES) if name not in input_dict]:
            raise ValueError(f"its tensor {missing[0].removeprefix('_proj_')} is missing")
        (blocks,), (scales,) = input_dict[_BLOCKS], input_dict[_SCALES]
        if blocks.shape[:-1] != scales.shape or blocks.shape[-1] != 16:
            raise ValueError(f"blocks of shape {tuple(blocks.shape)} have scales of shape {tuple(scales.shape)}")
        stack = kwargs["model"].get_parameter(kwargs["full_layer_name"])
        unpacked = torch.empty(stack.shape, dtype=stack.dtype, device=blocks.device)
        for expert in range(len(blocks)):
            index = slice(expert, expert + 1)
            unpacked[index] = convert_moe_packed_tensors(
                blocks[index], scales[index], dtype=stack.dtype, rows_per_chunk=_AT_ONCE
            )
        return {_STACK: [unpacked]}


#: By the method of a checkpoint's ``quantization_config``, its second argument: puts its layers into a model, in place
#: of ordinary ones, and returns what makes their parameters of its tensors, for transformers' loader.
PACKED = {
    METHOD: _as_emulated,
    BITSANDBYTES: _in_four_bits,
    MXFP4: lambda *_: [WeightConverter([_BLOCKS, _SCALES], _STACK, operations=[_Unpack()])],
}
