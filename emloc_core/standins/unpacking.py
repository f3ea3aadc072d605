"""Whether what is packed is unpacked in one pass, by a kernel or in C, or by torch's operations."""

from functools import partial

import torch

from emloc_core.algorithms import feedback, native
from emloc_core.compat.imports import when_imported


def is_compiled(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> bool:
    """Return whether one pass does it all; so it is planned too, by tensors without contents."""
    known = scales.dtype == torch.bfloat16 and dtype in (torch.float32, torch.bfloat16)
    return (feedback.takes_triton(codes.device) or known) and compiles_for(codes.device.type)


def compiles_for(device: str) -> bool:
    """Return whether what unpacks in one pass can be compiled for a type of device; a constant in torch's graphs."""
    if feedback.takes_triton(device):
        return feedback.compiles_kernels()
    return device == "cpu" and native.compiler() is not None


# They look for a compiler, which torch cannot trace.
when_imported("torch._dynamo", partial(torch.compiler.assume_constant_result, compiles_for))
