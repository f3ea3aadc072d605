"""Spectra: the energy of every Linear's outputs along each direction, by which ranks are shared out.

They come from a pass over the calibration rows before the one that makes the emulator: one shard per block, so that an
interrupted pass resumes.
"""

from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path

import torch
from safetensors import safe_open

from emloc_core.algorithms.allocation import Spectrum, largest_rank
from emloc_core.algorithms.factorize import Factors
from emloc_core.emulator.ranks import NO_EXPERTS, NO_SMALLER, UNREACHED, LinearPlan, RankPlan
from emloc_core.errors import EmlocError
from emloc_core.files.header import read_header
from emloc_core.files.shards import remove_damaged, write_shard

_ENERGIES, _SENSITIVITY = ".energies", ".sensitivity"


class Spectra:
    """The spectra of a model, written and read block by block.

    Args:
        directory: of the shards; it is made. Damaged shards are removed.
    """

    def __init__(self, blocks: Sequence[str], directory: Path) -> None:
        self._blocks, self._directory = blocks, directory
        directory.mkdir(exist_ok=True)
        remove_damaged(map(self._shard, blocks))

    @property
    def are_complete(self) -> bool:
        """Whether those of every block have been written."""
        return all(map(self.is_written, self._blocks))

    def is_written(self, block: str) -> bool:
        """Return whether those of a block have been written."""
        return self._shard(block).exists()

    def write(self, block: str, fitted: Mapping[str, tuple[Factors, float]]) -> None:
        """Write the energies and the sensitivity of a block's Linears, by module path, in fp64.

        Raises:
            EmlocError: a sensitivity is NaN or Inf.
        """
        tensors: dict[str, torch.Tensor] = {}
        for path, (factors, sensitivity) in sorted(fitted.items()):
            if not isfinite(sensitivity):
                raise EmlocError(
                    f"With {path} changed, the outputs of {block} are NaN or Inf.",
                    "Give --allocator uniform, which does not need sensitivities.",
                    code="not-finite",
                )
            tensors[path + _ENERGIES] = factors.spectrum.to("cpu", torch.float64)
            tensors[path + _SENSITIVITY] = torch.tensor([sensitivity], dtype=torch.float64)
        write_shard(self._shard(block), tensors)

    def reached(self, plan: RankPlan) -> RankPlan:
        """Return the plan with Linears without a spectrum, and experts, kept dense."""
        headers = [read_header(self._shard(block))[0] for block in self._blocks]
        measured = {key.removesuffix(_ENERGIES) for header in headers for key in header}
        without = [linear for linear in plan.candidates if linear.path not in measured]
        tiny = [linear.path for linear in without if not largest_rank(*linear.shape)]
        unreached = {linear.path for linear in without} - set(tiny)
        return plan.dense(unreached, UNREACHED).dense(tiny, NO_SMALLER).without_experts(NO_EXPERTS)

    def spectrum(self, linear: LinearPlan) -> Spectrum:
        """Return a Linear's spectrum, for an allocator."""
        with safe_open(str(self._shard(linear.block)), framework="pt") as file:
            energies, sensitivity = (file.get_tensor(linear.path + part) for part in (_ENERGIES, _SENSITIVITY))
        return Spectrum(linear.path, linear.block, energies, float(sensitivity))

    def _shard(self, block: str) -> Path:
        name = f"spectra-{self._blocks.index(block) + 1:05d}-of-{len(self._blocks):05d}.safetensors"
        return self._directory / name
