"""Refuses, in every process alike, what training cannot do with several processes or devices."""

import os

import torch

from emloc_core import devices
from emloc_core.errors import EmlocError
from emloc_core.model.device import free_of
from emloc_core.units import human_bytes


def require_whole_weights() -> None:
    """Refuse FSDP: weights that it splits over processes would be lost, since one process alone writes the adapter.

    Raises:
        EmlocError: ``accelerate launch`` was told to use it.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in {"1", "true"}:
        raise EmlocError(
            "FSDP shards the weights over processes, but only one of them writes the adapter.",
            "Start the processes without FSDP: each then holds an emulator, which is small.",
            code="unsupported",
        )


def require_room(nbytes: int, device: torch.device) -> None:
    """Refuse a model that one GPU has no room for: its layers are not placed on several.

    Args:
        device: the device that each process tunes on.
    """
    if devices.is_accelerator(device) and nbytes > (free := free_of(device)):
        raise EmlocError(
            f"The model takes {human_bytes(nbytes)}, but the GPU has only {human_bytes(free)} free, and `emloc "
            "train` does not split a model over several GPUs.",
            "Take exact steps, which read it block by block (--exact), make a smaller emulator, or load it with "
            "device_map='auto' in a script of your own.",
            code="memory",
            resumable=True,
        )
