"""Memory of a process besides the tensors that a plan counts: Python with the libraries, and torch on its device."""

from emloc_core import devices

#: Bytes of Python with torch, transformers, PEFT and TRL imported, measured on Linux.
IMPORTS = 575_000_000
#: Bytes that torch takes besides tensors on an accelerator: the driver's context, kernels and libraries' workspaces; a
#: typical figure, not measured.
_CONTEXT = 600 << 20
#: The same on the CPU, in inference and in tuning: kernel code, threads and the trainer, measured with a tiny model.
_RUNTIME = (30_000_000, 100_000_000)


def overhead(device: str, *, tuning: bool) -> int:
    """Return the bytes that a process takes besides its tensors, on a type of device, in tuning or in inference."""
    return _CONTEXT if devices.is_accelerator(device) else IMPORTS + _RUNTIME[tuning]
