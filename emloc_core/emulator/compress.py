"""Stage 1: makes the emulator from the base, block by block, and writes it as an ordinary checkpoint.

What stands in for a block's weights is written as soon as it is fitted. Where ranks depend on calibration, a pass
before gathers the spectra that they are shared out by.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from emloc_core.adapters.adapter import Adapter
from emloc_core.adapters.belonging import require_base, require_shapes
from emloc_core.adapters.enclosed import enclose
from emloc_core.data.rows import (
    CALIBRATION,
    SELECTION,
    SKIPPED,
    skipped_warnings,
    write_rows,
    write_skipped,
)
from emloc_core.data.sets import draw
from emloc_core.emulator.coverage import Coverage, coverage
from emloc_core.emulator.declared import find_linears
from emloc_core.emulator.decompose import Decomposition
from emloc_core.emulator.files import EmulatorFiles, replaced_keys, weight_keys
from emloc_core.emulator.method import CompletedSettings, method_of
from emloc_core.emulator.pack import pack_blocks, pack_vocabulary
from emloc_core.emulator.ranks import NO_EXPERTS, RankPlan, allocated
from emloc_core.emulator.sensitivity import PROBES, RATIO
from emloc_core.emulator.spectra import Spectra
from emloc_core.errors import EmlocError
from emloc_core.files.card import data_name
from emloc_core.files.inputs import Inputs
from emloc_core.files.job import Job, Progress
from emloc_core.files.manifest import learned_preferences
from emloc_core.files.output import Output
from emloc_core.files.shards import tensor_bytes
from emloc_core.model.opened import open_original
from emloc_core.objective import Sample
from emloc_core.requests import CompressRequest
from emloc_core.stages.rows import requested_rows
from emloc_core.standins.registry import format_named
from emloc_core.units import counted


class Compress(Job):
    """Stage 1, after the cheap checks; :meth:`run` makes the emulator.

    Args:
        request: of which model it is made, on which rows, and how. Its kind and ratio are decided.

    Attributes:
        plan: the ranks; those of ``uniform``, which has the same budget, if ranks are shared out by spectra.

    Raises:
        EmlocError: the model, the rows or the settings cannot be used; nothing has been written.
    """

    def __init__(self, request: CompressRequest) -> None:
        self.request = request
        self.base = open_original(request.model, request.device)
        requested = request.settings.for_tuning(request.tuning).settled()
        format = format_named(requested.kind)
        format.check(requested)
        model = self.base.skeleton.model
        linears = find_linears(model, self.base.family, format)
        rows, _, self.skipped = requested_rows(request, request.settings.loss)
        self.method = method_of(requested, format, linears, model, rows=len({row.key for row in rows}))
        self.format, self.settings = self.method.format, self.method.settings
        self.plan: RankPlan = self.method.plan()
        # Weights alone need no calibration: its rows are left for tuning.
        samples = 0 if self.settings.calibration == "none" else self.settings.samples
        self.rows = draw(rows, self.settings.seed, samples, self.settings.selection)
        self.samples = self._sampled()
        self.adapter = self._adapter()
        weight_keys(self.base.skeleton, self.plan)  # a checkpoint or a kind that is not for this model is refused
        self.format.config(self.plan.ranks, model, self.base.skeleton.dtype)

    def _adapter(self) -> Adapter | None:
        """Return the adapter whose LoRA is on while the emulator is fitted, if there is one.

        Raises:
            EmlocError: it is not for this model, or the emulator cannot be fitted with it.
        """
        if self.request.adapter is None:
            return None
        adapter = Adapter(self.request.adapter)
        require_shapes(adapter, self.base.skeleton.model)
        problem = None
        if self.settings.calibration != "propagated":
            problem = f"The calibration {self.settings.calibration!r} fits to the base as it is, without a LoRA."
        elif adapter.replaced or any(lora.is_stacked for lora in adapter.loras.values()):
            problem = f"An emulator can be fitted with LoRAs on Linears, and {adapter.directory} trains more."
        elif learned_preferences(adapter.directory):
            problem = f"{adapter.directory} learned preferences, which training it further on answers undoes."
        if problem:
            raise EmlocError(problem, "Leave out --adapter.", code="unsupported")
        return adapter

    def _sampled(self) -> Sequence[Sample]:
        """Return the calibration rows as samples; those of the correction must be readable too.

        The conformance kit has its own in their place.
        """
        self.base.samples(self.rows.selection, self.settings.max_length, "selection")
        return self.base.samples(self.rows.calibration, self.settings.max_length)

    @cached_property
    def coverage(self) -> Coverage:
        """What the emulator replaces of the model."""
        return coverage(self.base.skeleton.model, self.base.family, self.method.linears)

    @cached_property
    def output(self) -> Output:
        """The emulator's directory. The base's files are hashed on first access."""
        base, files = self.base.checkpoint, Inputs(self.request.output.resolve().parent)
        linears = json.dumps([linear.describe() for linear in self.method.linears.planned])
        request = {
            "base": base.fingerprint(files),
            "linears": hashlib.sha256(linears.encode()).hexdigest(),  # a plugin may change while the model does not
            "settings": self.settings.model_dump(),
            "calibration": [row.key for row in self.rows.calibration],
            "tokenized_rows": _digest(self.samples),  # the tokenizer or chat template may change while the rows do not
            "selection": [row.key for row in self.rows.selection],
        }
        inputs = {"base": base.name, "data": data_name(self.request.data)}
        if self.adapter:
            require_base(self.adapter, base, files)
            request["adapter"] = self.adapter.fingerprint(files)
            inputs["adapter"] = str(self.adapter.directory.absolute())
        device, family = self.base.device.type, self.base.family
        return Output(self.request.output, "emulator", request, device, inputs, files, family)

    def describe(self) -> dict[str, Any]:
        """Return what would be made: bytes, the rank of every Linear, rows."""
        base, dtype = self.base.checkpoint, self.base.skeleton.dtype
        replaced = sum(base.tensors[key].nbytes for key in replaced_keys(self.base.skeleton, self.plan))
        added = sum(linear.nbytes(self.format, dtype) for linear in self.plan.planned if linear.is_replaced)
        added += sum(matrix.nbytes(dtype) for matrix in self.plan.vocabulary)
        return {
            "output": str(self.request.output),
            "kind": self.format.name,
            "family": self.base.family.name,
            "base": str(base.directory),
            "base_bytes": base.nbytes,
            "emulator_bytes": base.nbytes - replaced + added,
            "linears": [linear.describe() for linear in self.plan.planned],
            "vocabulary": [matrix.describe() for matrix in self.plan.vocabulary],
            "kept_dense": [vars(kept) for kept in self.plan.kept],
            "summary": self.plan.lines(self.format),
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
        warnings = [*self.coverage.warnings, *skipped_warnings(self.skipped)]
        if self.settings.selection == self.request.settings.selection:
            return warnings
        calibration, selection, tuning = map(len, (self.rows.calibration, self.rows.selection, self.rows.tuning))
        few = (
            f"there are few rows: {calibration} are set aside for calibration and {selection} for choosing the "
            f"correction, which leaves {tuning} to train on; --samples and --selection change this"
        )
        return [*warnings, few]

    def run(self, progress: Progress = lambda *_: None) -> Path:
        """Make the emulator; for a finished one, note what it is planned for now."""
        if self.output.is_finished() and (tuning := self._tuning()):
            self.output.note("tuning", tuning)
        return super().run(progress)

    def make(self, staging: Path, progress: Progress) -> None:
        """Make the emulator; ``progress`` is called with a block's path."""
        plan = self.plan
        if self.method.by_spectra:
            plan, progress = self._allocated(staging, _one_of_two(progress, 0)), _one_of_two(progress, 1)
        files = EmulatorFiles(self.base.skeleton, plan, staging, self.format)
        calibrated = self.settings.calibration != "none"
        pack_vocabulary(files, [matrix for matrix in plan.vocabulary if not (calibrated and matrix.is_fitted)])
        if self.settings.calibration == "none":
            pack_blocks(files, progress)
        elif self.settings.calibration == "propagated":
            self._decomposition(plan, progress, staging).propagate(files)
        else:
            self._decomposition(plan, progress, staging).run(files)
        self._write_rows(staging)
        if self.adapter:
            enclose(self.adapter, staging)
        result = {"family": self.base.family.name, "coverage": self.coverage.describe()}
        result |= {"tuning": tuning} if (tuning := self._tuning()) else {}
        left_out = {"skipped_rows": len(self.skipped)} if self.skipped else {}
        self.output.result = {**result, **left_out, **files.finish(self._tokens)}
        self.output.provenance = described(self.settings, self.output.result)
        if self.adapter:
            self.output.provenance += " It was fitted with the LoRA so far, which was then trained further on it."

    def _allocated(self, staging: Path, progress: Progress) -> RankPlan:
        """Return the plan with ranks by spectra, which are gathered unless an interrupted run has."""
        directory = staging / ".spectra"  # hidden: removed when the emulator is published
        spectra = Spectra(self.base.skeleton.blocks, directory)
        if not spectra.are_complete:
            ranking = self.format.ranking()
            linears = find_linears(self.base.skeleton.model, self.base.family, ranking).without_experts(NO_EXPERTS)
            linears = linears.without_vocabulary()
            arguments = (allocated(linears, RATIO), self.samples, ranking, progress)
            Decomposition(self.base.skeleton, *arguments).run(spectra, PROBES)
        return self.method.plan(spectra=(spectra.reached(self.method.linears), spectra.spectrum))

    def _decomposition(self, plan: RankPlan, progress: Progress, staging: Path) -> Decomposition:
        loras = self.adapter.loras if self.adapter else {}
        arguments = (plan, self.samples, self.format, progress, staging, loras)
        return Decomposition(self.base.skeleton, *arguments)

    def _write_rows(self, staging: Path) -> None:
        write_rows(staging / CALIBRATION, self.rows.calibration)
        write_rows(staging / SELECTION, self.rows.selection)
        if self.skipped:
            write_skipped(staging / SKIPPED, self.skipped)

    def _tuning(self) -> dict[str, Any]:
        """Return the rows of a step that the emulator was planned for, if it was planned for a memory."""
        planned = self.request.tuning.model_dump(include={"batch_size", "accumulation"}, exclude_unset=True)
        longest = self.request.settings.max_length
        return {**planned, "max_length": longest} if planned and longest else planned

    @property
    def _tokens(self) -> int:
        return sum(sample.size for sample in self.samples)


def described(settings: CompletedSettings, result: Mapping[str, Any]) -> str:
    """Return the text of an emulator for model cards."""
    errors = [linear["relative_error"] for linear in result["linears"] if linear["relative_error"] is not None]
    text = f"Emulator: {settings.kind}"
    if settings.ratio:
        text += f", ratio {settings.ratio}, ranks by `{settings.allocator}`"
    text += f"; {result['bytes']['emulator']:,} of the base's {result['bytes']['base']:,} bytes"
    if errors:
        rows = f"relative output error on {counted(settings.samples, 'calibration row')}"
        label = "relative error of the weights" if settings.calibration == "none" else rows
        text += f"; {label} {sum(errors) / len(errors):.3f} (mean), {max(errors):.3f} (worst)"
    return f"{text}."


def _one_of_two(progress: Progress, index: int) -> Progress:
    """Return what reports the first or the second (1) pass over the blocks as half of one."""
    return lambda block, done, total, *_: progress(block, index * total + done, 2 * total)


def _digest(samples: Iterable[Sample]) -> str:
    """Return the SHA-256 over all model inputs of the samples, in hex."""
    total = hashlib.sha256()
    for sample in samples:
        for name, tensor in sorted(sample.inputs("cpu").items()):
            total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            total.update(tensor_bytes(tensor))
    return total.hexdigest()
