"""Rounds and unpacks weights on a CPU in C, compiled for this processor when a process first does so.

Where there is no compiler, torch's operations do the same in many times as many steps; but trellis codes are searched
for here alone. ``CC`` names another one.
"""

import ctypes
import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from shutil import which
from tempfile import TemporaryDirectory
from typing import Any

import torch

from emloc_core.algorithms.grid import Grid

GRID, TRELLIS, UNPACKING = "grid", "trellis", "unpacking"
#: That a block has at most.
COLUMNS = 64
#: That a number of a trellis code sees.
STATE_BITS = 12
#: Numbers of a column after which the bits of a trellis code begin with zeros again, so that parts of a column can be
#: searched at the same time; a multiple of those in a byte. The first few have fewer values: the error is 2 % larger.
SEGMENT = 960
#: Numbers to unpack that are worth a thread, which is made for them.
_PER_THREAD = 1 << 22
#: Bytes from which glibc takes every block from the system, and gives it back.
_LARGE = 32 << 20
#: Without the second, gcc does not vectorise the choice of a least cost: a search takes five times as long.
_FLAGS = (
    *("-O3", "-fno-trapping-math", "-march=native", "-shared", "-fPIC"),
    *(f"-DCOLUMNS={COLUMNS}", f"-DSTATE_BITS={STATE_BITS}", f"-DSEGMENT={SEGMENT}"),
)


@dataclass(frozen=True)
class Codes:
    """What numbers of a matrix, (m, n), may be rounded to in a trellis code.

    Attributes:
        scales: of the groups of a row, (ceil(n / width), m), fp32, on the CPU.
        values: of every state, (states,), fp32, on the CPU.
        states: those of the values that numbers were rounded to last, (n, m), int16, on the CPU.
        width: numbers of a row that share a scale.
    """

    scales: torch.Tensor
    values: torch.Tensor
    states: torch.Tensor
    width: int


class _Grid(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("levels", "middles", "scales", "kept", "originals")),
        *((name, ctypes.c_int64) for name in ("count", "width")),
    )


class _Codes(ctypes.Structure):
    _fields_ = (*((name, ctypes.c_void_p) for name in ("scales", "values", "states")), ("width", ctypes.c_int64))


def compiler() -> str | None:
    """Return the command of the C compiler, if there is one."""
    return os.environ.get("CC") or _installed()


@cache
def _installed() -> str | None:
    return which("gcc") or which("clang")  # asked for every product with a packed weight: the search takes longer


@cache
def library(name: str) -> Any:
    """Return the compiled functions of a source beside this module; None where they cannot be compiled."""
    command = compiler()
    if command is None:
        return None
    try:
        with TemporaryDirectory() as directory:
            source, file = Path(__file__).with_name(f"{name}.c"), Path(directory, f"{name}.so")
            subprocess.run([*command.split(), *_FLAGS, "-o", file, source], check=True, capture_output=True)
            return ctypes.CDLL(str(file))
    except (OSError, subprocess.CalledProcessError):
        return None


def round_block(
    block: torch.Tensor, changes: torch.Tensor, factor: torch.Tensor, positions: torch.Tensor, values: Grid | Codes
) -> None:
    """Do what :func:`emloc_core.algorithms.kernels.round_block` does."""
    _call("round_block", (block, changes, factor, positions), values)


def descend_block(block: torch.Tensor, slopes: torch.Tensor, changes: torch.Tensor, curvature: torch.Tensor, start: int,
                  values: Grid | Codes) -> None:  # fmt: skip
    """Do what :func:`emloc_core.algorithms.kernels.descend_block` does."""
    _call("descend_block", (block, slopes, changes, curvature), values, start)


def unpack_levels(codes: torch.Tensor, scales: torch.Tensor, table: torch.Tensor, n: int, width: int,
                  dtype: torch.dtype) -> torch.Tensor:  # fmt: skip
    """Return a matrix, (m, n), or a stack of them, on four levels.

    Args:
        codes: (..., bytes, 1), uint8.
        scales: (..., m, groups), bf16.
        table: the levels of every byte, (256, 4), fp32.
        width: of a group.
        dtype: fp32 or bf16.
    """
    return _unpacked("unpack_levels", (codes, scales, table), n, (scales.shape[-2], n, codes.shape[-2], width), dtype)


def unpack_trellis(
    codes: torch.Tensor, scales: torch.Tensor, values: torch.Tensor, m: int, n: int, width: int, dtype: torch.dtype
) -> torch.Tensor:
    """Return a matrix, (m, n), or a stack of them, in a trellis code.

    Args:
        codes: (..., ceil(m / 3), n), uint8.
        scales: (..., m, groups), bf16.
        values: of every state, (states,), fp32.
        width: of a group.
        dtype: fp32 or bf16.
    """
    return _unpacked("unpack_trellis", (codes, scales, values), n, (m, n, width), dtype)


def _unpacked(
    name: str, tensors: tuple[torch.Tensor, ...], n: int, sizes: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    assert all(tensor.is_contiguous() for tensor in tensors), "C knows no strides"
    functions, scales = library(UNPACKING), tensors[1]
    matrix = torch.empty(*scales.shape[:-1], n, dtype=dtype)
    if matrix.nbytes >= _LARGE:
        functions.use_large_pages(*map(ctypes.c_int64, (matrix.data_ptr(), matrix.nbytes)))
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (*tensors, matrix)]
    numbers = [*map(ctypes.c_int64, (*sizes, dtype == torch.float32))]

    def unpack(begin: int, end: int) -> None:
        getattr(functions, name)(*pointers, ctypes.c_int64(begin), ctypes.c_int64(end), *numbers)

    _on_threads(unpack, matrix.numel() // n if n else 0, matrix.numel() // _PER_THREAD)
    return matrix


def _on_threads(work: Callable[[int, int], None], rows: int, most: int) -> None:
    """Share rows, each of which is computed by itself, among as many threads as torch has, but at most so many."""
    threads = max(1, min(torch.get_num_threads(), most, rows))
    if threads == 1:
        work(0, rows)
        return
    bounds = [rows * index // threads for index in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:  # made again: threads that stayed would not survive a fork
        list(pool.map(work, bounds[:-1], bounds[1:]))


def _call(name: str, tensors: tuple[torch.Tensor, ...], values: Grid | Codes, *start: int) -> None:
    assert all(tensor.is_contiguous() for tensor in tensors), "C knows no strides"
    (k, m), source = tensors[0].shape, GRID if isinstance(values, Grid) else TRELLIS
    function, structure = getattr(library(source), name), _structure(values)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]

    def work(begin: int, end: int) -> None:
        sizes = (*start, k, m, begin * SEGMENT, min(m, end * SEGMENT))
        function(*pointers, *map(ctypes.c_int64, sizes), structure)

    segments = -(-m // SEGMENT)
    _on_threads(work, segments, segments if source == TRELLIS else 1)


def _structure(values: Grid | Codes) -> ctypes.Structure:
    if isinstance(values, Codes):
        pointers = (tensor.data_ptr() for tensor in (values.scales, values.values, values.states))
        return _Codes(*pointers, values.width)
    kept, originals = (tensor.data_ptr() for tensor in values.kept) if values.kept else (None, None)
    tensors = (values.levels, values.middles, values.scales)
    return _Grid(*(tensor.data_ptr() for tensor in tensors), kept, originals, len(values.levels), values.width)
