"""Stage 1: makes the emulator from the base, block by block, and writes it as an ordinary checkpoint.

What stands in for a block's weights is written as soon as it is fitted. Where ranks depend on calibration, a pass
before gathers the spectra that they are shared out by.
"""

import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from emloc_core.algorithms.allocation import uniform
from emloc_core.algorithms.factorize import wants_inputs
from emloc_core.data.limits import Limits
from emloc_core.data.rows import (
    CALIBRATION,
    SELECTION,
    SKIPPED,
    Row,
    Skipped,
    load_rows,
    told,
    without,
    write_rows,
    write_skipped,
)
from emloc_core.data.sets import draw
from emloc_core.data.tokenize import Processing, Sample, encode, load_processing
from emloc_core.emulator.coverage import Coverage, coverage
from emloc_core.emulator.declared import block_paths, find_linears
from emloc_core.emulator.decompose import Decomposition, Progress
from emloc_core.emulator.files import EmulatorFiles, weight_keys
from emloc_core.emulator.method import method_of
from emloc_core.emulator.pack import pack_blocks
from emloc_core.emulator.ranks import NO_EXPERTS, RankPlan, allocated
from emloc_core.emulator.sensitivity import PROBES, RATIO
from emloc_core.emulator.spectra import Spectra
from emloc_core.family import Family
from emloc_core.files.card import data_name
from emloc_core.files.checkpoint import Checkpoint, open_checkpoint
from emloc_core.files.inputs import Inputs
from emloc_core.files.output import Output
from emloc_core.files.shards import tensor_bytes
from emloc_core.model.device import choose_device
from emloc_core.model.skeleton import Skeleton
from emloc_core.plugins.manager import plugin_manager
from emloc_core.requests import CompressRequest
from emloc_core.settings import CompressSettings
from emloc_core.standins import Format
from emloc_core.standins.registry import format_named


class Compress:
    """Stage 1, after the cheap checks; :meth:`run` makes the emulator.

    Args:
        base: the model.
        rows: the user's rows.
        output: directory of the emulator.
        settings: how it is made.
        device: device of weights, activations and statistics.
        data: name of the rows' source, for the card.
        tuning: the rows of a step that it was planned for, if it was planned for a memory.

    Attributes:
        plan: the ranks; those of ``uniform``, which has the same budget, if the allocator needs spectra.

    Raises:
        EmlocError: the checkpoint, family, data or settings cannot be used; nothing has been written.
    """

    #: Rows that could not be used.
    skipped: Sequence[Skipped] = ()

    def __init__(
        self,
        base: Checkpoint,
        rows: Sequence[Row],
        output: Path,
        settings: CompressSettings,
        device: torch.device | str = "cpu",
        data: str | None = None,
        tuning: dict[str, int] | None = None,
    ) -> None:
        self.base, self._data, self._tuning = base, data, tuning
        self.family: Family = plugin_manager().family_for(base.config)
        base.require_unquantised()
        self.skeleton = Skeleton(base, self.family, device)
        settings = settings.settled()
        self.kind: Format = format_named(settings.kind)
        self.kind.check(settings)
        distinct = len({row.key for row in rows})
        linears = self._linears(self.kind)
        self.method = method_of(settings, self.kind, linears, rows=distinct)
        self._keeps_fewer = self.method.settings.selection < settings.selection
        self.settings = settings = self.method.settings
        found = self.method.linears
        self.coverage: Coverage = coverage(self.skeleton.model, self.family, found)
        self.blocks = block_paths(self.skeleton.model, self.family)
        allocate = uniform if self.method.by_spectra else self.method.allocate
        self.plan: RankPlan = allocated(found, settings.ratio, allocate, kind=self.kind)
        # Weights alone need no calibration: its rows are left for tuning.
        samples = 0 if settings.calibration == "none" else settings.samples
        self.rows = draw(rows, settings.seed, samples, settings.selection)
        processing = load_processing(base.directory, self.family, rows)
        self.samples = self._encode(self.rows.calibration, processing)
        self._encode(self.rows.selection, processing)
        weight_keys(self.skeleton, self.plan)  # a checkpoint or a kind that is not for this model is refused at once
        self.kind.config(self.plan.ranks, self.skeleton.model, self.skeleton.dtype)
        self._path = output
        self._files = Inputs(output.resolve().parent)

    def _linears(self, kind: Format | None = None, *, on_inputs: bool = False) -> RankPlan:
        found = find_linears(self.skeleton.model, self.family, kind)
        return found.on_inputs() if on_inputs or wants_inputs(self.kind.factorize) else found

    @cached_property
    def output(self) -> Output:
        """The emulator's directory. The base's files are hashed on first access."""
        request = {
            "base": self.base.fingerprint(self._files),
            "settings": self.settings.model_dump(),
            "calibration": [row.key for row in self.rows.calibration],
            "tokenized_rows": _digest(self.samples),  # the tokenizer or chat template may change while the rows do not
            "selection": [row.key for row in self.rows.selection],
        }
        inputs = {"base": self.base.name, **({"data": self._data} if self._data else {})}
        return Output(self._path, "emulator", request, self.skeleton.device.type, inputs, self._files, self.family)

    def _encode(self, rows: list[Row], processing: Processing) -> list[Sample]:
        limits = Limits.of(self.skeleton.model.config)
        return encode(rows, processing, self.settings.max_length, limits, self.skeleton.dtype)

    def describe(self) -> dict[str, Any]:
        """Return what would be made: bytes, the rank of every Linear, rows."""
        dtype = self.skeleton.dtype
        replaced = [each for each in self.plan.planned if each.rank is not None]
        saved = sum(each.numbers * dtype.itemsize - each.nbytes(self.kind, dtype) for each in replaced)
        return {
            "output": str(self._path),
            "kind": self.kind.name,
            "family": self.family.name,
            "base": str(self.base.directory),
            "base_bytes": self.base.nbytes,
            "emulator_bytes": self.base.nbytes - saved,
            "linears": [each.describe() for each in self.plan.planned],
            "kept_dense": [vars(kept) for kept in self.plan.kept],
            "summary": self.plan.lines(self.kind),
            "calibration": self.settings.calibration,
            "calibration_rows": len(self.rows.calibration),
            "selection_rows": len(self.rows.selection),
            "tuning_rows": len(self.rows.tuning),
            "calibration_tokens": self._tokens,
            "ranks_by_spectra": self.method.by_spectra,
            "coverage": self.coverage.describe(),
            "finished": self.output.is_finished(),
        }

    @property
    def warnings(self) -> list[str]:
        """What the user has to know before the emulator is made: what stays dense, and how much of the model it is."""
        if not self._keeps_fewer:
            return [*self.coverage.warnings, *told(self.skipped)]
        calibration, selection, tuning = map(len, (self.rows.calibration, self.rows.selection, self.rows.tuning))
        few = (
            f"there are few rows: {calibration} are kept to calibrate on and {selection} to choose the correction on, "
            f"and {tuning} are left to train on; --samples and --selection keep others"
        )
        return [*self.coverage.warnings, *told(self.skipped), few]

    def run(self, progress: Progress = lambda *_: None) -> Path:
        """Make the emulator, or resume an interrupted run.

        Args:
            progress: called with a block's path, the number of blocks done, and the total.
        """
        if self.output.is_finished():
            if self._tuning:
                self.output.note("tuning", self._tuning)
            return self.output.path
        with self.output.build() as staging:
            plan = self.plan
            if self.method.by_spectra:
                first, progress = _in_two_passes(progress)
                plan = self._allocated(staging, first)
            files = EmulatorFiles(self.skeleton, plan, self.blocks, staging, self.kind)
            if self.settings.calibration == "none":
                pack_blocks(files, progress)
            elif self.settings.calibration == "propagated":
                self._decomposition(plan, progress, staging).propagate(files)
            else:
                self._decomposition(plan, progress, staging).run(files)
            self._write_rows(staging)
            known = {"family": self.family.name, "coverage": self.coverage.describe()}
            known |= {"tuning": self._tuning} if self._tuning else {}
            left_out = {"skipped_rows": len(self.skipped)} if self.skipped else {}
            self.output.result = {**known, **left_out, **files.finish(self._tokens)}
        return self.output.path

    def _allocated(self, staging: Path, progress: Progress) -> RankPlan:
        """Return the plan with ranks by spectra, which are gathered unless an interrupted run has."""
        spectra = Spectra(self.blocks, staging / ".spectra")  # hidden: removed when the emulator is published
        if not spectra.are_complete:
            on_inputs = self.kind.keeps_weight  # what is decomposed is what rounding left of it
            found = self._linears(on_inputs=on_inputs).without_experts(NO_EXPERTS)
            how = (self.samples, self.kind.decomposing(self.kind.factorize), progress, self.kind.name)
            first = Decomposition(self.skeleton, self.family, allocated(found, RATIO, uniform), *how)
            first.run(spectra, PROBES)
        found = spectra.reached(self._linears(self.kind))
        return allocated(found, self.settings.ratio, self.method.allocate, spectra.spectrum, self.kind)

    def _decomposition(self, plan: RankPlan, progress: Progress, staging: Path) -> Decomposition:
        rounding = self.kind.rounding(self.kind.factorize)
        how = (rounding, progress, self.kind.name, self.kind, self.settings.refine, staging)
        return Decomposition(self.skeleton, self.family, plan, self.samples, *how)

    def _write_rows(self, staging: Path) -> None:
        write_rows(staging / CALIBRATION, self.rows.calibration)
        write_rows(staging / SELECTION, self.rows.selection)
        if self.skipped:
            write_skipped(staging / SKIPPED, self.skipped)

    @property
    def _tokens(self) -> int:
        return sum(len(sample.input_ids) for sample in self.samples)


def prepare(request: CompressRequest) -> Compress:
    """Return the job of a request whose ratio is fixed.

    Raises:
        EmlocError: the model, the rows or the settings cannot be used.
    """
    base = open_checkpoint(request.model)
    skipped: list[Skipped] | None = [] if request.skip_bad_rows else None
    read = load_rows(request.data, request.split, request.settings.loss, request.columns, skipped)
    rows = without(read, request.exclude, request.split, request.columns)
    device = choose_device(request.device)
    name = data_name(request.data)
    tuning = request.tuning.model_dump(include={"batch_size", "accumulation"}, exclude_unset=True)
    if tuning and request.settings.max_length:
        tuning["max_length"] = request.settings.max_length
    job = Compress(base, rows, request.output, request.settings, device, name, tuning)
    job.skipped = skipped or []
    return job


def _in_two_passes(progress: Progress) -> tuple[Progress, Progress]:
    """Return what reports the first and the second pass over the blocks as one."""

    def first(block: str, done: int, total: int) -> None:
        progress(block, done, 2 * total)

    def second(block: str, done: int, total: int) -> None:
        progress(block, total + done, 2 * total)

    return first, second


def _digest(samples: Iterable[Sample]) -> str:
    """Return the SHA-256 over all model inputs of the samples, in hex."""
    total = hashlib.sha256()
    for sample in samples:
        for name, tensor in sorted(sample.inputs("cpu").items()):
            total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            total.update(tensor_bytes(tensor))
    return total.hexdigest()
