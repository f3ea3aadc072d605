"""Rounds blocks of columns and unpacks levels on a CPU in C, compiled for this processor when a process first does so.

Torch's operations do the same, in many times as many steps, where there is no compiler. ``CC`` names another one.
"""

import ctypes
import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from shutil import which
from tempfile import TemporaryDirectory
from typing import Any

import torch

from emloc_core.algorithms.grid import Grid

ROUNDING, UNPACKING = "rounding", "unpacking"
#: That a block has at most.
COLUMNS = 64
#: Numbers to unpack that are worth a thread, which is made for them.
_PER_THREAD = 1 << 22
#: Bytes from which glibc takes every block from the system, and gives it back.
_LARGE = 32 << 20
_FLAGS = ("-O3", "-march=native", "-shared", "-fPIC", f"-DCOLUMNS={COLUMNS}")


class _Grid(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("levels", "middles", "scales", "kept", "originals")),
        *((name, ctypes.c_int64) for name in ("count", "width")),
    )


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
    block: torch.Tensor, changes: torch.Tensor, factor: torch.Tensor, positions: torch.Tensor, grid: Grid
) -> None:
    """Do what :func:`emloc_core.algorithms.kernels.round_block` does."""
    _call("round_block", (block, changes, factor, positions), grid)


def descend_block(
    block: torch.Tensor, slopes: torch.Tensor, changes: torch.Tensor, curvature: torch.Tensor, start: int, grid: Grid
) -> None:
    """Do what :func:`emloc_core.algorithms.kernels.descend_block` does."""
    _call("descend_block", (block, slopes, changes, curvature), grid, start)


def unpack_levels(codes: torch.Tensor, scales: torch.Tensor, table: torch.Tensor, n: int, width: int,
                  dtype: torch.dtype) -> torch.Tensor:  # fmt: skip
    """Return a matrix, (m, n), or a stack of them, on a few levels.

    Args:
        codes: (..., bytes, 1), uint8.
        scales: (..., m, groups), bf16.
        table: the levels of every byte, (256, digits), fp32.
        width: of a group.
        dtype: fp32 or bf16.
    """
    tensors = (codes, scales, table)
    assert all(tensor.is_contiguous() for tensor in tensors), "C knows no strides"
    functions, m = library(UNPACKING), scales.shape[-2]
    matrix = torch.empty(*scales.shape[:-1], n, dtype=dtype)
    if matrix.nbytes >= _LARGE:
        functions.use_large_pages(*map(ctypes.c_int64, (matrix.data_ptr(), matrix.nbytes)))
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (*tensors, matrix)]
    sizes = [*map(ctypes.c_int64, (m, n, codes.shape[-2], table.shape[1], width, dtype == torch.float32))]

    def unpack(begin: int, end: int) -> None:
        functions.unpack_levels(*pointers, ctypes.c_int64(begin), ctypes.c_int64(end), *sizes)

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


def _call(name: str, tensors: tuple[torch.Tensor, ...], grid: Grid, *start: int) -> None:
    assert all(tensor.is_contiguous() for tensor in tensors), "C knows no strides"
    function: Any = getattr(library(ROUNDING), name)
    kept, originals = (tensor.data_ptr() for tensor in grid.kept) if grid.kept else (None, None)
    function(
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors),
        *map(ctypes.c_int64, (*start, *tensors[0].shape)),
        _Grid(grid.levels.data_ptr(), grid.middles.data_ptr(), grid.scales.data_ptr(), kept, originals,
              len(grid.levels), grid.width),
    )  # fmt: skip
