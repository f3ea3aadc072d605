"""Brings tensors that will be wanted next into the system's page cache, while the processor is busy with others.

Reading in a thread, since the kernel bounds what ``posix_fadvise`` reads ahead to about a megabyte. Nothing is kept:
the pages are the system's, to give away when memory is short, and no part of this process's resident set.
"""

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from emloc_core.files.header import TensorInfo

_CHUNK = 4 << 20  # bytes read at a time


class ReadAhead:
    """A thread that reads what it is asked for, and forgets it."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")

    def want(self, tensors: Iterable[TensorInfo]) -> Future[int]:
        """Read tensors in the background; the result is the number of bytes that were read."""
        return self._pool.submit(_read, sorted(tensors, key=lambda tensor: (tensor.shard, tensor.start)))


def _read(tensors: list[TensorInfo]) -> int:
    buffer = memoryview(bytearray(_CHUNK))
    total = 0
    for tensor in tensors:
        with tensor.shard.open("rb", buffering=0) as file:
            file.seek(tensor.start)
            left = tensor.nbytes
            while left > 0:
                read = file.readinto(buffer[: min(left, _CHUNK)])
                if not read:  # truncated meanwhile; whoever wants the tensor will say so
                    break
                left -= read
                total += read
    return total
