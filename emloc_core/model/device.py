"""The device that weights, activations and statistics are on."""

import psutil
import torch

from emloc_core.errors import EmlocError, first_line
from emloc_core.processes.group import within_group


def choose_device(name: str = "auto") -> torch.device:
    """Return a device by its torch name; ``auto`` is the GPU if there is one, and the CPU otherwise.

    Raises:
        EmlocError: the device does not exist or cannot be used.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for CUDA
        reason = first_line(error).rstrip(".")
        raise EmlocError(
            f"The device {name!r} cannot be used: {reason}.", "Try --device auto.", code="unavailable"
        ) from None
    if device.type not in ("cpu", "cuda"):  # Apple's has no fp64, which some Linears need
        raise EmlocError(f"Weights cannot be factorised on {name!r}.", "Try --device cpu.", code="unsupported")
    return device


def free_memory(name: str = "auto") -> int:
    """Return the bytes that are free of a device: see :func:`free_of` for a GPU, and otherwise of this machine.

    It is less where the control group has less: see :func:`emloc_core.processes.group.within_group`.
    """
    device = choose_device(name)
    if device.type == "cuda":
        return free_of(device)
    memory = psutil.virtual_memory()
    return within_group(memory.available, memory.total)[0]


def free_of(gpu: torch.device | int) -> int:
    """Return the bytes that this process may still take of a GPU: what no process has, or what its cap leaves.

    What torch keeps of freed tensors is free for others of this process.
    """
    index = gpu if isinstance(gpu, int) else gpu.index
    if index is None:  # the current one, which torch does not know everywhere
        index = torch.cuda.current_device()
    free, total = torch.cuda.mem_get_info(index)
    cap = int(torch.cuda.get_per_process_memory_fraction(index) * total)
    reserved, allocated = torch.cuda.memory_reserved(index), torch.cuda.memory_allocated(index)
    return max(0, min(free + reserved - allocated, cap - allocated))
