"""Checkpoints whose experts are in MXFP4, for a model that is loaded part by part: they are unpacked as they are read.

A stack of experts is two tensors: 32 numbers a block, of four bits each, and an exponent per block (OCP Microscaling
Formats, 1.0). The model has the stack itself, in its own dtype.
"""

from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

_BLOCKS, _SCALES, _STACK = "_proj_blocks", "_proj_scales", "_proj"
#: Blocks that are unpacked at a time: transformers' indices take 64 times the bytes of what is unpacked to bf16.
_AT_ONCE = 1 << 16


def conversions() -> list[Any]:
    """Return what makes stacks of experts from the tensors of the checkpoint, for transformers' loader."""
    return [WeightConverter([_BLOCKS, _SCALES], _STACK, operations=[_Unpack()])]


class _Unpack(ConversionOps):
    """Unpacks the matrices of a stack one by one, transposed where those of the model are."""

    def convert(self, input_dict: dict[str, Any], *_: Any, **given: Any) -> dict[str, list[torch.Tensor]]:
        if missing := [name for name in (_BLOCKS, _SCALES) if name not in input_dict]:
            raise ValueError(f"its tensor {missing[0].removeprefix('_proj_')} is missing")
        (blocks,), (scales,) = input_dict[_BLOCKS], input_dict[_SCALES]
        if blocks.shape[:-1] != scales.shape or blocks.shape[-1] != 16:
            raise ValueError(f"blocks of shape {tuple(blocks.shape)} have scales of shape {tuple(scales.shape)}")
        stack = given["model"].get_parameter(given["full_layer_name"])
        found = torch.empty(stack.shape, dtype=stack.dtype, device=blocks.device)
        for expert in range(len(blocks)):
            of = slice(expert, expert + 1)
            found[of] = convert_moe_packed_tensors(blocks[of], scales[of], dtype=stack.dtype, rows_per_chunk=_AT_ONCE)
        return {_STACK: [found]}
