"""Spectra: every Linear's factors at the largest useful rank, and its energies, from which any ratio can be cut.

The columns of U are ordered by energy, so the best factors of rank k are the first k columns of U and the first k rows
of V, and the energies give the error at every rank. That only holds for calibration on the base's own activations:
propagated factors depend on the ranks of earlier Linears. Ranks can be shared out for these too, by the energies: then
no factors are kept.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from emloc_core.algorithms.allocation import Spectrum, largest_rank
from emloc_core.algorithms.factorize import Factors
from emloc_core.data.rows import CALIBRATION, SELECTION
from emloc_core.emulator.ranks import NO_EXPERTS, NO_SMALLER, UNREACHED, LinearPlan, RankPlan
from emloc_core.errors import EmlocError
from emloc_core.files.header import TensorInfo, read_header
from emloc_core.files.inputs import Inputs, hash_files
from emloc_core.files.manifest import CONTENT, manifest_value, require_unchanged
from emloc_core.files.output import MANIFEST, read_manifest
from emloc_core.files.shards import remove_damaged, write_shard
from emloc_core.model.skeleton import Skeleton

KIND = "spectra"
_REMEDY = "Make the spectra again: emloc compress --keep-spectra."


def at_largest_ranks(plan: RankPlan) -> RankPlan:
    """Return the plan with every Linear at the largest rank that is smaller than dense."""
    return plan.with_ranks(
        {linear.path: max(1, largest_rank(linear.out_features, linear.in_features)) for linear in plan.candidates}
    )


class SpectraFiles:
    """Spectra in their staging directory, one shard per block.

    Args:
        skeleton: the base.
        blocks: paths of all blocks.
        staging: the directory.
        factors: whether factors are kept too, from which emulators can be cut.
    """

    def __init__(self, skeleton: Skeleton, blocks: Sequence[str], staging: Path, *, factors: bool = True) -> None:
        self.skeleton, self.blocks, self.staging, self._factors = skeleton, blocks, staging, factors
        remove_damaged(_shard(staging, blocks, block) for block in blocks)  # of an interrupted run

    def is_written(self, block: str) -> bool:
        """Return whether a block's shard exists."""
        return _shard(self.staging, self.blocks, block).exists()

    def write(self, block: str, factors: Mapping[str, Factors], sensitivities: Mapping[str, float]) -> None:
        """Write a block's factors, by module path, in the base's dtype; energies and sensitivities in fp64."""
        tensors: dict[str, torch.Tensor] = {}
        for path, found in sorted(factors.items()):
            parts = {
                "energies": found.spectrum.to("cpu", torch.float64),
                "sensitivity": torch.tensor([sensitivities[path]], dtype=torch.float64),
            }
            if self._factors:
                dtype = self.skeleton.model.get_parameter(f"{path}.weight").dtype
                parts |= {"U": found.u.to("cpu", dtype), "V": found.v.to("cpu", dtype)}
            tensors.update((f"{path}.{name}", part) for name, part in parts.items())
        write_shard(_shard(self.staging, self.blocks, block), tensors)

    def finish(self, plan: RankPlan, tokens: int) -> dict[str, Any]:
        """Return the manifest's result, once all blocks and the rows are written."""
        headers = [read_header(_shard(self.staging, self.blocks, block))[0] for block in self.blocks]
        last = ".energies"
        reached = {key.removesuffix(last) for header in headers for key in header if key.endswith(last)}
        return {
            "base": self.skeleton.checkpoint.name,
            "blocks": list(self.blocks),
            "bytes": sum(tensor.nbytes for header in headers for tensor in header.values()),
            "tokens": tokens,
            CONTENT: hash_files(_files(self.staging, self.blocks)),
            "linears": {path: rank for path, rank in plan.ranks.items() if path in reached},
            "unreached": sorted(plan.ranks.keys() - reached),
        }


class Spectra:
    """A finished directory of spectra, read block by block.

    Args:
        directory: the directory.
        factors: whether factors are expected, from which emulators can be cut.

    Attributes:
        request: what it was made from: ``base``, ``settings``, ``calibration``, ``selection``.
        base: the fingerprint of the model.
        settings: settings of the decomposition.
        blocks: paths of all blocks.
        unreached: Linears that no calibration row passed through.
        tokens: number of calibration tokens.

    Raises:
        EmlocError: the directory holds no spectra, or a shard is missing or damaged.
    """

    def __init__(self, directory: Path, *, factors: bool = True) -> None:
        self.directory, self._factors = directory, factors
        manifest = read_manifest(directory) if directory.is_dir() else None
        if manifest is None or manifest.get("kind") != KIND:
            raise EmlocError(
                f"{directory} holds no spectra.", "Make them with emloc compress --keep-spectra.", code="missing"
            )
        for name in (CALIBRATION, SELECTION):
            if not (directory / name).is_file():
                raise EmlocError(f"{directory} lacks {name}.", _REMEDY, code="missing")
        self._manifest = manifest
        self.base: str = manifest_value(manifest, directory, "request.base", str)
        self.settings: dict[str, Any] = manifest_value(manifest, directory, "request.settings", dict[str, Any])
        self.request: dict[str, Any] = manifest["request"]
        self.blocks: list[str] = manifest_value(manifest, directory, "result.blocks", list[str])
        self.unreached: list[str] = manifest_value(manifest, directory, "result.unreached", list[str])
        self.tokens: int = manifest_value(manifest, directory, "result.tokens", int)
        self._tensors: dict[str, TensorInfo] = {}
        for block in self.blocks:
            try:
                self._tensors.update(read_header(_shard(directory, self.blocks, block))[0])
            except EmlocError as error:
                raise EmlocError(error.args[0], _REMEDY, code=error.code) from None

    def fingerprint(self, inputs: Inputs) -> str:
        """Return the SHA-256 over the manifest, every shard and the kept rows, in hex.

        Raises:
            EmlocError: one of them has changed since it was made.
        """
        files = _files(self.directory, self.blocks)
        require_unchanged(self._manifest, self.directory, inputs.hash(files))
        return inputs.hash([self.directory / MANIFEST, *files])

    def reached(self, plan: RankPlan) -> RankPlan:
        """Return the plan with the Linears kept dense that no calibration row passed through, or that have no spectrum.

        Raises:
            EmlocError: the plan has Linears, or shapes, that the spectra do not have.
        """
        largest = at_largest_ranks(plan).linears
        for linear in largest:
            if linear.rank is not None and linear.path not in self.unreached:
                self._require(linear)
        tiny = [linear.path for linear in largest if linear.reason == NO_SMALLER]  # whatever the rank
        return plan.dense(self.unreached, UNREACHED).dense(tiny, NO_SMALLER).without_experts(NO_EXPERTS)

    def _require(self, linear: LinearPlan) -> None:
        m, n, k = linear.out_features, linear.in_features, linear.rank or 0
        if linear.block not in self.blocks:
            raise EmlocError(f"{self.directory} lacks the block {linear.block}.", _REMEDY, code="mismatch")
        expected: dict[str, tuple[int, ...]] = {"energies": (min(m, n),), "sensitivity": (1,)}
        if self._factors:
            expected |= {"U": (m, k), "V": (k, n)}
        for name, shape in expected.items():
            found = self._tensors.get(f"{linear.path}.{name}")
            if found is None or found.shape != shape or found.shard != self._shard_of(linear):
                raise EmlocError(
                    f"{self.directory} lacks {name} of {linear.path}, of shape {shape}: it was made with another "
                    "declaration of the model's family, or is damaged.",
                    _REMEDY,
                    code="mismatch",
                )

    def spectrum(self, linear: LinearPlan) -> Spectrum:
        """Return a Linear's spectrum, for an allocator.

        Raises:
            EmlocError: it contains NaN or Inf.
        """
        with safe_open(str(self._shard_of(linear)), framework="pt") as file:
            energies, sensitivity = (file.get_tensor(f"{linear.path}.{part}") for part in ("energies", "sensitivity"))
        self._require_finite(linear, energies, sensitivity)
        return Spectrum(linear.path, linear.block, energies, float(sensitivity))

    def cut(self, linear: LinearPlan) -> Factors:
        """Return the factors of a Linear at its planned rank, at most the largest useful one.

        Raises:
            EmlocError: a factor contains NaN or Inf.
        """
        with safe_open(str(self._shard_of(linear)), framework="pt") as file:
            u = file.get_slice(f"{linear.path}.U")[:, : linear.rank]
            v = file.get_slice(f"{linear.path}.V")[: linear.rank]
        self._require_finite(linear, u, v)
        return Factors(u, v, self.spectrum(linear).energies)

    def _shard_of(self, linear: LinearPlan) -> Path:
        return _shard(self.directory, self.blocks, linear.block)

    def _require_finite(self, linear: LinearPlan, *tensors: torch.Tensor) -> None:
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
            raise EmlocError(
                f"The spectra of {linear.path} in {self.directory} contain NaN or Inf.", _REMEDY, code="not-finite"
            )


def _files(directory: Path, blocks: Sequence[str]) -> list[Path]:
    rows = [directory / name for name in (CALIBRATION, SELECTION)]
    return [_shard(directory, blocks, block) for block in blocks] + rows


def _shard(directory: Path, blocks: Sequence[str], block: str) -> Path:
    return directory / f"spectra-{blocks.index(block) + 1:05d}-of-{len(blocks):05d}.safetensors"
