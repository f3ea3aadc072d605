"""The header of a safetensors file: tensors and offsets, once the library has validated the file."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from emloc_core.errors import EmlocError
from emloc_core.files.own import require_regular

#: torch's names of the dtypes that are read, by safetensors' names.
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "C64": "complex64", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
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
        with shard.open("rb") as file, safe_open(str(shard), framework="np"):
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length), object_pairs_hook=_unique)
            metadata = header.pop("__metadata__", None) or {}
            tensors = [_tensor(key, shard, entry, 8 + length) for key, entry in header.items()]
    except FileNotFoundError:
        raise EmlocError(
            f"{shard} does not exist, though the checkpoint's index names it.", _REMEDY, code="missing"
        ) from None
    except OSError as error:
        raise EmlocError(f"{shard} cannot be read ({error.strerror or error}).", _REMEDY, code="unavailable") from None
    except (SafetensorError, ValueError, TypeError) as error:  # the library reads a tensor's entry as a list too
        raise EmlocError(
            f"{shard} is not a safetensors file, or it is truncated or damaged: it has {size:,} bytes "
            f"({str(error)[:_FAULT]}).",
            _REMEDY,
            code="damaged",
        ) from None
    return {tensor.key: tensor for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.stop))}, metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its pairs, without duplicates: readers disagree on which of two equal keys counts."""
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("it names a key twice")
    return content


def _tensor(key: str, shard: Path, entry: dict[str, Any], start: int) -> TensorInfo:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{key!r} has dtype {entry['dtype']!r}; known are {', '.join(sorted(DTYPES))}")
    first, last = entry["data_offsets"]
    return TensorInfo(key, shard, entry["dtype"], tuple(entry["shape"]), start + first, start + last)
