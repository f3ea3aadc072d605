"""Cuts an emulator of any size from spectra: slices of the factors, and all other tensors copied from the base."""

from functools import cached_property
from pathlib import Path
from typing import Any

from emloc_core.algorithms.allocation import ALLOCATORS
from emloc_core.data.rows import copy_kept_rows
from emloc_core.emulator.coverage import Coverage, coverage
from emloc_core.emulator.declared import block_paths, find_linears
from emloc_core.emulator.decompose import Progress
from emloc_core.emulator.files import EmulatorFiles
from emloc_core.emulator.method import UNIFORM
from emloc_core.emulator.ranks import RankPlan, allocated
from emloc_core.emulator.spectra import Spectra
from emloc_core.errors import EmlocError
from emloc_core.family import Family
from emloc_core.files.checkpoint import Checkpoint, open_checkpoint
from emloc_core.files.inputs import Inputs
from emloc_core.files.output import Output, made_from
from emloc_core.kinds import Kind, LowRank
from emloc_core.model.skeleton import Skeleton
from emloc_core.plugins.manager import plugin_manager
from emloc_core.requests import CutRequest
from emloc_core.settings import CutSettings


class Cut:
    """A cut, after the cheap checks; :meth:`run` writes the emulator.

    Args:
        spectra: spectra of ``base``.
        base: the model.
        output: directory of the emulator.
        settings: ratio and allocator.

    Raises:
        EmlocError: the spectra are of another base, or cannot be cut with these settings.
    """

    def __init__(self, spectra: Spectra, base: Checkpoint, output: Path, settings: CutSettings) -> None:
        self.spectra, self.base, self._path = spectra, base, output
        self.family = plugin_manager().family_for(base.config)
        self.skeleton = Skeleton(base, self.family)
        name, ratio = settings.allocator or UNIFORM, settings.ratio or LowRank.ratio
        self.settings = settings.model_copy(update={"allocator": name, "ratio": ratio})
        found = spectra.reached(find_linears(self.skeleton.model, self.family))
        self.coverage: Coverage = coverage(self.skeleton.model, self.family, found)
        self.plan: RankPlan = allocated(found, ratio, ALLOCATORS[name], spectra.spectrum)

    @cached_property
    def output(self) -> Output:
        """The emulator's directory. The files of base and spectra are hashed on first access.

        Raises:
            EmlocError: the spectra are of another base.
        """
        spectra, base, files = self.spectra, self.base, Inputs(self._path.resolve().parent)
        if spectra.base != base.fingerprint(files):
            raise EmlocError(
                f"The spectra {spectra.directory} were made from another base than {base.directory}: the fingerprints "
                "differ.",
                "Give the base that they were made from, unchanged, or make spectra of this one.",
                code="mismatch",
            )
        # The request of an emulator made by compress, and the spectra that it was cut from.
        request = {
            **spectra.request,
            "settings": {**spectra.settings, **self.settings.model_dump()},
            "spectra": spectra.fingerprint(files),
        }
        inputs = {"base": base.name}
        return Output(self._path, "emulator", request, inputs=inputs, files=files, family=self.family)

    def describe(self) -> dict[str, Any]:
        """Return what would be made: bytes, and the rank of every Linear."""
        known = describe_emulator(self.base, self.family, self.plan, self.skeleton, self._path, LowRank())
        return {**known, "coverage": self.coverage.describe(), "finished": self.output.is_finished()}

    @property
    def warnings(self) -> list[str]:
        """See :class:`emloc_core.emulator.coverage.Coverage`."""
        return self.coverage.warnings

    def run(self, progress: Progress = lambda *_: None) -> Path:
        """Write the emulator, or resume an interrupted run.

        Args:
            progress: called with a block's path, the number of blocks done, and the total.
        """
        if self.output.is_finished():
            return self.output.path
        with self.output.build() as staging:
            files = EmulatorFiles(self.skeleton, self.plan, block_paths(self.skeleton.model, self.family), staging)
            cut_blocks(self.spectra, files, progress)
            copy_kept_rows(self.spectra.directory, staging)
            known = {"family": self.family.name, "coverage": self.coverage.describe()}
            self.output.result = {**known, **files.finish(self.spectra.tokens)}
        return self.output.path


def prepare(request: CutRequest) -> Cut:
    """Return the job of a request.

    Raises:
        EmlocError: the spectra, the base or the settings cannot be used.
    """
    spectra = Spectra(request.spectra)
    base = open_checkpoint(request.base or made_from(request.spectra, "base"))
    return Cut(spectra, base, request.output, request.settings)


def describe_emulator(
    base: Checkpoint, family: Family, plan: RankPlan, skeleton: Skeleton, output: Path, kind: Kind
) -> dict[str, Any]:
    """Return what is known about an emulator before it is made, as JSON values."""
    replaced = [each for each in plan.planned if each.rank is not None]
    before = sum(each.numbers for each in replaced) * skeleton.dtype.itemsize
    after = sum(each.nbytes(kind, skeleton.dtype) for each in replaced)
    return {
        "output": str(output),
        "kind": kind.name,
        "family": family.name,
        "base": str(base.directory),
        "base_bytes": base.nbytes,
        "emulator_bytes": base.nbytes - before + after,
        "linears": [each.describe() for each in plan.planned],
        "kept_dense": [vars(kept) for kept in plan.kept],
        "summary": plan.lines(kind),
    }


def cut_blocks(spectra: Spectra, files: EmulatorFiles, progress: Progress) -> None:
    """Write every block's factors at the ranks of the emulator's plan; skip blocks that are already written."""
    for index, block in enumerate(files.blocks):
        if not files.is_written(block):
            files.write(block, {linear.path: spectra.cut(linear) for linear in files.plan.in_block(block)}, {})
        progress(block, index + 1, len(files.blocks))
