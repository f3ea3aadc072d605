"""Memory of a process besides the tensors that a plan counts: Python with the libraries, and torch on its device."""

#: Bytes of Python with torch, transformers, PEFT and TRL imported, measured on Linux; not on the GPU.
IMPORTS = {"cuda": 0, "cpu": 575_000_000}
#: Bytes that torch takes besides tensors, in inference and in tuning. cuda: the driver's context, kernels and cuBLAS
#: workspace; a typical figure, not measured. cpu: kernel code, threads and the trainer, measured with a tiny model.
_RUNTIME = {"cuda": (600 << 20, 600 << 20), "cpu": (30_000_000, 100_000_000)}


def overhead(device: str, *, tuning: bool) -> int:
    """Return the bytes that a process takes besides its tensors, on ``cuda`` or ``cpu``, in tuning or in inference."""
    return IMPORTS[device] + _RUNTIME[device][tuning]
