"""The header of a safetensors file: tensors and offsets, validated as strictly as by the safetensors library.

The format is eight bytes of header length, a JSON header, and the tensors' bytes. The rules are those of the library's
``SafeTensors::read_metadata`` and ``Metadata::validate`` and of its description of the format, so that every file
accepted here is accepted, and read the same way, by other readers.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from emloc_core.errors import EmlocError
from emloc_core.files.own import require_regular

#: Bytes of a number by safetensors' name of its dtype.
ITEMSIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8, "I64": 8, "I32": 4, "I16": 2,
    "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
_METADATA = "__metadata__"
_LIMIT = 100_000_000  # bytes of a header, as in the library
_FAULT = 300  # characters of a message about a header, which may hold names of any length
_REMEDY = "Download or copy the file again."


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a shard: safetensors' name of its dtype, its shape, and its bytes in the file: [start, stop)."""

    key: str
    shard: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.stop - self.start

    def split(self) -> "list[TensorInfo]":
        """Return the parts along its first dimension."""
        count, *shape = self.shape
        size = self.nbytes // max(1, count)
        starts = (self.start + size * index for index in range(count))
        return [replace(self, shape=tuple(shape), start=start, stop=start + size) for start in starts]

    @property
    def is_floating_point(self) -> bool:
        """Whether its numbers are floats: weights are, indices and masks are not."""
        return self.dtype.startswith(("F", "BF"))


def read_header(shard: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Return the tensors of a shard in the order of their bytes, and the file's metadata.

    Raises:
        EmlocError: the file is missing, is not safetensors, or does not have the length that its header gives.
    """
    try:
        require_regular(shard)
        size = shard.stat().st_size
        with shard.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LIMIT):
                raise EmlocError(
                    f"{shard} is not a safetensors file, or is truncated ({size:,} bytes).", _REMEDY, code="damaged"
                )
            text = file.read(length)
    except FileNotFoundError:
        raise EmlocError(
            f"{shard} does not exist, though the checkpoint's index names it.", _REMEDY, code="missing"
        ) from None
    except OSError as error:
        raise EmlocError(f"{shard} cannot be read ({error.strerror}).", _REMEDY, code="unavailable") from None
    try:
        header = _parse(text)
        metadata = _metadata(header.pop(_METADATA, None))
        start = 8 + length
        found = sorted((_tensor(key, shard, entry, start) for key, entry in header.items()), key=_extent)
        stop = _require_contiguous(found, start)
    except (ValueError, RecursionError) as error:
        fault = str(error)[:_FAULT]
        raise EmlocError(
            f"{shard} is not a safetensors file: its header is damaged ({fault}).", _REMEDY, code="damaged"
        ) from None
    if size != stop:
        fault = "it is truncated" if size < stop else "there is data after its tensors"
        raise EmlocError(f"{shard} has {size:,} bytes and should have {stop:,}: {fault}.", _REMEDY, code="damaged")
    return {tensor.key: tensor for tensor in found}, metadata


def _parse(text: bytes) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise ValueError("it does not begin with an opening brace")
    header: dict[str, Any] = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its pairs, without duplicates: readers disagree on which of two equal keys counts."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"it names {key!r} twice")
        found[key] = value
    return found


def _metadata(content: Any) -> dict[str, str]:
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(value, str) for value in content.values()):
        raise ValueError(f"{_METADATA} does not map strings to strings")
    return content


def _tensor(key: str, shard: Path, entry: Any, start: int) -> TensorInfo:
    if not isinstance(entry, Mapping) or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{key!r} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEMSIZES:
        raise ValueError(f"{key!r} has dtype {dtype!r}; known are {', '.join(ITEMSIZES)}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{key!r} has shape {shape!r} and offsets {offsets!r}")
    nbytes = ITEMSIZES[dtype]
    for size in shape:
        nbytes *= size
        if nbytes >= 1 << 64:
            raise ValueError(f"{key!r} has shape {shape}, which is too large")
    if offsets[1] - offsets[0] != nbytes:
        raise ValueError(f"{key!r} of shape {shape} has {nbytes:,} bytes, but its offsets are {offsets}")
    return TensorInfo(key, shard, dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _are_sizes(value: Any) -> bool:
    """Return whether this is a list of unsigned 64-bit integers. True is an int in Python, not in JSON."""
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 64 for size in value)


def _extent(tensor: TensorInfo) -> tuple[int, int]:
    return tensor.start, tensor.stop


def _require_contiguous(tensors: list[TensorInfo], start: int) -> int:
    """Return where the last tensor ends. Each must begin where the previous one ends."""
    for tensor in tensors:
        if tensor.start != start:
            raise ValueError(f"{tensor.key!r} begins at byte {tensor.start:,}; the tensors before it end at {start:,}")
        start = tensor.stop
    return start
