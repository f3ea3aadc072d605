"""Rounds blocks of columns on a CPU in C, compiled for this processor when a process first rounds.

Torch's operations do the same, one column at a time, where there is no compiler. ``CC`` names another one.
"""

import ctypes
import os
import subprocess
from functools import cache
from pathlib import Path
from shutil import which
from tempfile import TemporaryDirectory
from typing import Any

import torch

from emloc_core.algorithms.grid import Grid

_SOURCE = Path(__file__).with_name("rounding.c")
#: That a block has at most.
COLUMNS = 64
_FLAGS = ("-O3", "-march=native", "-shared", "-fPIC", f"-DCOLUMNS={COLUMNS}")


class _Grid(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("levels", "middles", "scales", "kept", "originals")),
        *((name, ctypes.c_int64) for name in ("count", "width")),
    )


def compiler() -> str | None:
    """Return the command of the C compiler, if there is one."""
    return os.environ.get("CC") or which("gcc") or which("clang")


@cache
def library() -> ctypes.CDLL | None:
    """Return the compiled functions; None where they cannot be compiled."""
    command = compiler()
    if command is None:
        return None
    try:
        with TemporaryDirectory() as directory:
            file = Path(directory, "rounding.so")
            subprocess.run([*command.split(), *_FLAGS, "-o", file, _SOURCE], check=True, capture_output=True)
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


def _call(name: str, tensors: tuple[torch.Tensor, ...], grid: Grid, *start: int) -> None:
    assert all(tensor.is_contiguous() for tensor in tensors), "C knows no strides"
    function: Any = getattr(library(), name)
    kept, originals = (tensor.data_ptr() for tensor in grid.kept) if grid.kept else (None, None)
    function(
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors),
        *map(ctypes.c_int64, (*start, *tensors[0].shape)),
        _Grid(grid.levels.data_ptr(), grid.middles.data_ptr(), grid.scales.data_ptr(), kept, originals,
              len(grid.levels), grid.width),
    )  # fmt: skip
