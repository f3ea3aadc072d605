"""The device that weights, activations and statistics are on."""

from typing import Any

import psutil
import torch

from emloc_core import devices
from emloc_core.errors import EmlocError, first_line
from emloc_core.processes.group import within_group


def choose_device(name: str = "auto") -> torch.device:
    """Return a device by its torch name; ``auto`` is the accelerator if there is one that factorises, or the CPU.

    Raises:
        EmlocError: the device does not exist or cannot be used.
    """
    if name == "auto":
        here = devices.accelerator()
        return torch.device(here if here and devices.has_fp64(here) else devices.CPU)
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    # torch asserts that it was built for CUDA, and lacks operations for what is not here
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = first_line(error).rstrip(".")
        raise EmlocError(
            f"The device {name!r} cannot be used: {reason}.", "Try --device auto.", code="unavailable"
        ) from None
    if device.type == "meta" or not devices.has_fp64(device):
        raise EmlocError(
            f"Weights cannot be factorised on {name!r}, which has no double precision.",
            "Try --device cpu.",
            code="unsupported",
        )
    return device


def free_memory(name: str = "auto") -> int:
    """Return the bytes that are free of a device: see :func:`free_of`."""
    return free_of(choose_device(name))


def free_of(device: torch.device) -> int:
    """Return the bytes that this process may still take of a device.

    An accelerator has what no process has taken, or what its cap leaves; what torch keeps of freed tensors is free for
    others of this process. The CPU, and an accelerator that does not count its memory, have what is free in this
    machine, or in the control group if that is less: see :func:`emloc_core.processes.group.within_group`.
    """
    own: Any = devices.interface(device) if devices.is_accelerator(device) else None
    if not hasattr(own, "mem_get_info"):
        memory = psutil.virtual_memory()
        return within_group(memory.available, memory.total)[0]
    index = own.current_device() if device.index is None else device.index  # which torch does not know everywhere
    free, total = own.mem_get_info(index)
    cap = int(own.get_per_process_memory_fraction(index) * total)
    reserved, allocated = own.memory_reserved(index), own.memory_allocated(index)
    return max(0, min(free + reserved - allocated, cap - allocated))
