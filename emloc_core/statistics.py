"""Second moments of activations: which are gathered, and how they are hooked."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal

import torch
from torch import nn

from emloc_core.errors import EmlocError

Side = Literal["input", "output"]


def cheaper_side(out_features: int, in_features: int) -> Side:
    """Say which Gram of a Linear is the smaller one: that of its outputs, unless it widens."""
    return "output" if out_features <= in_features else "input"


class Gram:
    """A sum of ``x x^T`` over activations.

    Args:
        side: whether the activations are inputs (of every Linear of an input group) or outputs (of one Linear).
        size: number of features.
        dtype: of the sum. Activations have massive outliers, so that the spectrum spans many decades: fp64 where it
            is affordable, fp32 at least.
        device: where the sum is kept.
    """

    def __init__(
        self, side: Side, size: int, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
    ) -> None:
        self.side = side
        self.matrix = torch.zeros(size, size, dtype=dtype, device=device)
        self.tokens = 0

    def add(self, activations: torch.Tensor) -> None:
        """Add activations of shape (..., size).

        Raises:
            EmlocError: they hold NaN or Inf; the caller adds the sample.
        """
        rows = activations.detach().reshape(-1, activations.shape[-1]).to(self.matrix.device, self.matrix.dtype)
        if not bool(torch.isfinite(rows.sum())):  # NaN and Inf survive a sum; one pass without a mask
            raise EmlocError("NaN or Inf among the activations")
        self.matrix.addmm_(rows.T, rows)
        self.tokens += rows.shape[0]

    @cached_property
    def root(self) -> torch.Tensor:
        """S with ``S S^T`` equal to the matrix. By eigenvalues: Cholesky fails with fewer tokens than features."""
        energies, vectors = torch.linalg.eigh(self.matrix)
        return vectors * energies.clamp(min=0).sqrt()


#: Called with a Linear's path and activations of shape (..., features).
Sink = Callable[[str, torch.Tensor], None]


@contextmanager
def tapped(linears: Mapping[str, nn.Module], taps: Mapping[str, Any], sink: Sink) -> Iterator[None]:
    """Hook Linears so that their activations reach ``sink`` at every forward.

    Args:
        linears: the modules by path.
        taps: path -> ``"input"``, ``"output"`` (without the bias), or a function of ``(module, args, output)`` that
            returns the input.
        sink: receives path and activations.
    """

    def hook(path: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        tap = taps[path]

        def receive(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if tap == "input":
                sink(path, args[0])
            elif tap == "output":
                bias = getattr(module, "bias", None)
                sink(path, output if bias is None else output.double() - bias.double())
            else:
                sink(path, tap(module, args, output))

        return receive

    handles = [module.register_forward_hook(hook(path)) for path, module in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
