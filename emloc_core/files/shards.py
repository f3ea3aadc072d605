"""safetensors files, tensor by tensor: copying raw bytes, and writing without holding a file in memory.

The library's own writer takes all tensors of a file at once, so that a 5 GB shard would need 5 GB.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import click
import torch

from emloc_core.errors import EmlocError
from emloc_core.files import header
from emloc_core.files.header import TensorInfo, read_header

#: torch's dtypes by safetensors' names.
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, dtype) for name, dtype in header.DTYPES.items()}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CHUNK = 16 << 20  # bytes copied at a time
_HASH = "emloc.sha256"  # key in the metadata: hash of everything else in the file
#: The kernel cannot copy between these two files by itself.
_NO_COPY_RANGE = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}


def row_chunks(tensor: TensorInfo, nbytes: int) -> Iterator[torch.Tensor]:
    """Yield a matrix some rows at a time, in its own dtype; each part is overwritten by the next.

    Unlike slices of a mapped file, they leave no pages behind that count as this process's memory.

    Args:
        tensor: a matrix of shape (m, n).
        nbytes: size of a part in bytes; at least one row is yielded at a time.
    """
    columns = tensor.shape[1]
    width = columns * DTYPES[tensor.dtype].itemsize
    for part in chunks(tensor, max(1, nbytes // width) * width):
        yield torch.frombuffer(part, dtype=DTYPES[tensor.dtype]).reshape(-1, columns)


def chunks(tensor: TensorInfo, nbytes: int) -> Iterator[memoryview]:
    """Yield the raw bytes of a tensor in the file; each part is overwritten by the next."""
    buffer = memoryview(bytearray(min(nbytes, tensor.nbytes)))
    with tensor.shard.open("rb", buffering=0) as file:
        file.seek(tensor.start)
        for remaining in range(tensor.nbytes, 0, -nbytes):
            part = buffer[: min(nbytes, remaining)]
            filled = 0
            while filled < len(part):
                count = file.readinto(part[filled:])
                if not count:
                    raise _ended_within(tensor)
                filled += count
            yield part


def _ended_within(tensor: TensorInfo) -> EmlocError:
    return EmlocError(f"{tensor.shard} ended within {tensor.key}.", "Download or copy the file again.", code="damaged")


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor, row-major, without a copy if it is contiguous on the CPU."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


class ShardWriter:
    """Writes a safetensors file, one tensor at a time, under a temporary name; renames it when it is complete.

    Args:
        tensors: key -> (safetensors dtype, shape) of every tensor, in the order in which they will be written.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
    ) -> None:
        self.path = path
        self._temporary = path.with_name(f".{path.name}.tmp")
        self._expected: list[tuple[str, int]] = []
        entries: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        offset = 0
        for key, (dtype, shape) in tensors.items():
            nbytes = DTYPES[dtype].itemsize * torch.Size(shape).numel()
            entries[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
            self._expected.append((key, nbytes))
            offset += nbytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        self._header = text + b" " * (-len(text) % 8)  # tensors start at a multiple of 8
        self._expected.reverse()

    def __enter__(self) -> "ShardWriter":
        self._file = self._temporary.open("wb", buffering=0)  # tensors are large, and some are copied by the kernel
        self._write_all(len(self._header).to_bytes(8, "little") + self._header)
        return self

    def write(self, key: str, content: Iterable[bytes | memoryview] | torch.Tensor) -> None:
        """Write the next tensor: a tensor, or its raw bytes in parts, where each part may overwrite the one before."""
        self._expect(key)
        parts = [tensor_bytes(content)] if isinstance(content, torch.Tensor) else content
        for part in parts:
            self._write_all(part)
        self._require_whole(key)

    def copy(self, key: str, tensor: TensorInfo) -> None:
        """Copy the next tensor from another file, without its bytes passing through this process.

        Raises:
            EmlocError: that file has been truncated since its header was read.
        """
        self._expect(key)
        if not self._copied_by_kernel(tensor):
            for part in chunks(tensor, _CHUNK):
                self._write_all(part)
        self._require_whole(key)

    def _copied_by_kernel(self, tensor: TensorInfo) -> bool:
        if not hasattr(os, "copy_file_range"):  # Linux has it
            return False
        with tensor.shard.open("rb") as source:
            offset = tensor.start
            while offset < tensor.stop:
                try:
                    count = os.copy_file_range(source.fileno(), self._file.fileno(), tensor.stop - offset, offset)
                except OSError as error:
                    if error.errno in _NO_COPY_RANGE and offset == tensor.start:
                        return False
                    raise
                if not count:
                    raise _ended_within(tensor)
                offset += count
        return True

    def _write_all(self, part: bytes | memoryview) -> None:
        remaining = memoryview(part).cast("B")
        while remaining:
            remaining = remaining[self._file.write(remaining) :]

    def _expect(self, key: str) -> None:
        expected, nbytes = self._expected.pop()
        if key != expected:
            raise ValueError(f"{key} was written where {expected} was expected")
        self._end = self._file.tell() + nbytes

    def _require_whole(self, key: str) -> None:
        if (offset := self._file.tell()) != self._end:
            raise ValueError(f"{key} ends at byte {offset}, not at {self._end} as the header says")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            with self._file:
                if kind is None:
                    if self._expected:
                        raise ValueError(f"{self.path} lacks {[key for key, _ in self._expected]}")
                    os.fsync(self._file.fileno())  # some file systems report a full disk here, or on closing
            if kind is None:
                os.replace(self._temporary, self.path)
        finally:
            self._temporary.unlink(missing_ok=True)


def write_shard(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors in memory as one safetensors file, which appears when it is complete.

    Its header holds a hash, by which :func:`is_intact` checks it.
    """
    layout = {key: (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for key, tensor in tensors.items()}
    entries = dict(metadata or {})
    digest = _hash(layout, entries, (tensor_bytes(tensor) for tensor in tensors.values()))
    with ShardWriter(path, layout, {**entries, _HASH: digest}) as writer:
        for key, tensor in tensors.items():
            writer.write(key, tensor)


def remove_damaged(shards: Iterable[Path]) -> None:
    """Remove files of :func:`write_shard` that are not what was written, and say so on stderr."""
    for shard in shards:
        if shard.exists() and not is_intact(shard):
            click.echo(f"emloc: {shard} is damaged and will be made again.", err=True)
            shard.unlink()


def is_intact(shard: Path) -> bool:
    """Return whether a file is what :func:`write_shard` wrote."""
    try:
        tensors, metadata = read_header(shard)
    except EmlocError:
        return False
    expected = metadata.pop(_HASH, None)
    metadata.pop("format", None)
    layout = {key: (tensor.dtype, tensor.shape) for key, tensor in tensors.items()}
    return expected == _hash(layout, metadata, (part for tensor in tensors.values() for part in chunks(tensor, _CHUNK)))


def _hash(
    layout: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str], parts: Iterable[memoryview]
) -> str:
    """Return the SHA-256 over a file's tensors and metadata, in hex."""
    total = hashlib.sha256(json.dumps([layout, metadata]).encode())
    for part in parts:
        total.update(part)
    return total.hexdigest()
