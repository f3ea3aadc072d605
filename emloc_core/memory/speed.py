"""The speed of this machine at multiplying and at reading weights, measured in a second to estimate times."""

import fcntl
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from emloc_core import devices
from emloc_core.compat import halves
from emloc_core.errors import is_out_of_memory
from emloc_core.model.device import free_memory

_SECONDS = 0.1  # of each measurement
_SIDES = {True: 8192, False: 1024}  # of the matrices, on an accelerator or not: large enough for full speed
_CHUNK = 4 << 20  # bytes read at a time
_MOST = 512 << 20  # bytes read in all


@dataclass(frozen=True)
class Speed:
    """What a machine does in a second.

    Attributes:
        flops: operations of matrix products on the device that computes, in the dtype that it computes in.
        read: bytes of weights that reach that device; None if the weights are not on this machine.
    """

    flops: float
    read: float | None

    def seconds(self, flops: float, read_bytes: int) -> float | None:
        """Return how long it takes at least: reading overlaps with arithmetic. None if reading is not known."""
        arithmetic = flops / self.flops
        if not read_bytes:
            return arithmetic
        return None if self.read is None else max(arithmetic, read_bytes / self.read)


def measure(device: str, weights: Path, dtype: torch.dtype = torch.bfloat16) -> Speed | None:
    """Measure this machine.

    Args:
        device: its type.
        weights: directory with the model's shards, if they are here. They are read from the disk itself if they are
            larger than the free memory, which would not keep them from one step to the next.
        dtype: of products.

    Returns:
        The speed, or None if the machine has no such device, or no room on it.
    """
    accelerated = devices.is_accelerator(device)
    if accelerated and device != devices.accelerator():
        return None
    shards = [path for path in weights.glob("*.safetensors") if path.is_file() and path.stat().st_size]
    try:
        read = _reading(shards) if shards else None
        if read is not None and accelerated:
            read = min(read, _transfer(device))
        return Speed(_product(device, dtype), read)
    except Exception as error:
        if is_out_of_memory(error):
            return None
        raise


def _product(device: str, dtype: torch.dtype) -> float:
    halves.serve(dtype)
    accelerated = devices.is_accelerator(device)
    side = _SIDES[accelerated]
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))

    def multiply() -> int:
        torch.mm(left, right)
        if accelerated:
            torch.accelerator.synchronize()
        return 2 * side**3

    multiply()  # the first one also sets up the library
    return _rate(multiply)


def _transfer(device: str) -> float:
    pinned = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=devices.copies_alongside(device))

    def copy() -> int:
        pinned.to(device, non_blocking=True)
        torch.accelerator.synchronize()
        return pinned.nbytes

    copy()
    return _rate(copy)


def _reading(shards: Sequence[Path]) -> float:
    stays = sum(shard.stat().st_size for shard in shards) < free_memory("cpu")
    buffer = memoryview(bytearray(_CHUNK))
    with max(shards, key=lambda shard: shard.stat().st_size).open("rb", buffering=0) as file:
        size = min(os.fstat(file.fileno()).st_size, _MOST)

        def read() -> int:
            return file.readinto(buffer) or 0

        if stays:
            while file.tell() < size and read():
                pass
        else:
            _forget(file.fileno(), size)
        file.seek(0)
        return _rate(read, most=size)


def _forget(file: int, size: int) -> None:
    """Have the system forget what it keeps of a file; on macOS, not keep what is read of it from now on."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, 0, size, os.POSIX_FADV_DONTNEED)
    elif hasattr(fcntl, "F_NOCACHE"):
        fcntl.fcntl(file, fcntl.F_NOCACHE, 1)


def _rate(act: Callable[[], int], most: float = float("inf")) -> float:
    """Return the amount per second of what ``act`` does, for a while or until it has done ``most``."""
    done, started, seconds = 0, time.perf_counter(), 0.0
    while seconds < _SECONDS and done < most:
        done += act()
        seconds = time.perf_counter() - started
    return done / seconds
