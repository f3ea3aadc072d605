"""Reads tensors that are needed next into the system's page cache, while the processor is busy with others.

A thread reads them, since the kernel limits the read-ahead of ``posix_fadvise`` to about a megabyte. Nothing is kept:
the pages belong to the system, which can drop them, and do not count in this process's resident set.
"""

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from emloc_core.errors import EmlocError
from emloc_core.files.header import TensorInfo
from emloc_core.files.shards import chunks

_CHUNK = 4 << 20  # bytes read at a time


class ReadAhead:
    """A thread that reads tensors and discards them."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")

    def want(self, tensors: Iterable[TensorInfo]) -> Future[int]:
        """Read tensors in the background; the result is the number of bytes read."""
        return self._pool.submit(_read, sorted(tensors, key=lambda tensor: (tensor.shard, tensor.start)))


def _read(tensors: list[TensorInfo]) -> int:
    total = 0
    for tensor in tensors:
        with suppress(EmlocError):  # truncated meanwhile; loading the tensor will report it
            for part in chunks(tensor, _CHUNK):
                total += len(part)
    return total
