"""Refuses, in every process alike, what training cannot do with several processes or devices."""

import os
import re

import psutil
import torch

from emloc_core.errors import EmlocError
from emloc_core.model.device import free_of
from emloc_core.units import human_bytes

_REQUESTED = re.compile(r"--num[_-]processes[= ](\d+)")


def require_processes(started: int) -> None:
    """Refuse to train in fewer processes than requested: on a CPU, ``accelerate launch`` starts only one.

    The batch would be smaller than meant. Weights that FSDP splits over processes would be lost after the last step,
    since one process alone writes the adapter.

    Args:
        started: processes that train.

    Raises:
        EmlocError: ``accelerate launch`` was told to start more than one, and this one is alone; or to use FSDP.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in {"1", "true"}:
        raise EmlocError(
            "FSDP shards the weights over processes, but only one of them writes the adapter.",
            "Start the processes without FSDP: each then holds an emulator, which is small.",
            code="unsupported",
        )
    try:
        parent = psutil.Process().parent()
        command = " ".join(parent.cmdline()) if parent else ""
    except psutil.Error:
        return
    requested = _REQUESTED.search(command.partition("emloc_core")[0])
    if "accelerate" in command and requested and started == 1 < int(requested[1]):
        raise EmlocError(
            f"accelerate launch started one process, not {requested[1]}: on a CPU it needs mpirun for more.",
            f"ACCELERATE_USE_CPU=true torchrun --nproc_per_node {requested[1]} -m emloc_core ... starts them all.",
            code="unavailable",
        )


def require_room(nbytes: int, device: torch.device) -> None:
    """Refuse a model that one GPU has no room for: its layers are not placed on several.

    Args:
        device: the device that each process tunes on.
    """
    if device.type == "cuda" and nbytes > (free := free_of(device)):
        raise EmlocError(
            f"The model takes {human_bytes(nbytes)}, but the GPU has only {human_bytes(free)} free, and `emloc "
            "train` does not split a model over several GPUs.",
            "Take exact steps, which read it block by block (--exact), make a smaller emulator, or load it with "
            "device_map='auto' in a script of your own.",
            code="memory",
            resumable=True,
        )
