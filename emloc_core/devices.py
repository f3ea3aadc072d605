"""What a device can do, asked of torch: a device is a name, and whatever is not the CPU is an accelerator.

CUDA, ROCm (which torch calls ``cuda``) and Intel's XPU have one interface, ``torch.get_device_module``; of others, what
is missing is done without: copies then wait, and no memory is counted.
"""

from typing import TYPE_CHECKING, Any

from emloc_core.errors import EmlocError

if TYPE_CHECKING:
    import torch

CPU = "cpu"


def type_of(name: str) -> str:
    """Return the type of the device of this name, which need not be here.

    Raises:
        EmlocError: torch knows no such device.
    """
    import torch

    try:
        return torch.device(name).type
    except RuntimeError:
        raise EmlocError(
            f"{name!r} is not a device.", "Give cpu, cuda, xpu, or another that torch knows.", code="unavailable"
        ) from None


def is_accelerator(device: "torch.device | str") -> bool:
    """Return whether a device is not the CPU, given by its name or its type."""
    return str(getattr(device, "type", device)).partition(":")[0] != CPU


def accelerator() -> str | None:
    """Return the type of the accelerator that is here, if there is one."""
    import torch

    here = torch.accelerator.current_accelerator(check_available=True)
    return here.type if here else None


def count() -> int:
    """Return how many accelerators there are."""
    import torch

    return torch.accelerator.device_count() if accelerator() else 0


def interface(device: "torch.device | str") -> Any:
    """Return torch's module for a type of device: ``torch.cuda``, ``torch.xpu``, or an extension's."""
    import torch

    return torch.get_device_module(device)


def has_fp64(device: "torch.device | str") -> bool:
    """Return whether a device computes in double precision, as factorising does; Apple's do not."""
    import torch

    try:
        torch.ones(1, dtype=torch.float64, device=device).sum()
    except (RuntimeError, TypeError):
        return False
    return True


def copies_alongside(device: "torch.device | str") -> bool:
    """Return whether a device copies from pinned memory on a stream of its own, while it computes."""
    return is_accelerator(device) and hasattr(interface(device), "Stream")
