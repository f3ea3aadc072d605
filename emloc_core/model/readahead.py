"""Reads tensors that are needed next into the system's page cache, while the processor is busy with others.

A thread reads them, since the kernel limits the read-ahead of ``posix_fadvise`` to about a megabyte. Nothing is kept:
the pages belong to the system, which can drop them, and do not count in this process's resident set.
"""

from collections.abc import Iterable
from contextlib import suppress

from emloc_core.errors import EmlocError
from emloc_core.files.header import TensorInfo
from emloc_core.files.shards import chunks

_CHUNK = 4 << 20  # bytes read at a time


def read(tensors: Iterable[TensorInfo]) -> int:
    """Read tensors and discard them; return the number of bytes read."""
    total = 0
    for tensor in sorted(tensors, key=lambda tensor: (tensor.shard, tensor.start)):
        with suppress(EmlocError):  # truncated meanwhile; loading the tensor will report it
            for part in chunks(tensor, _CHUNK):
                total += len(part)
    return total
