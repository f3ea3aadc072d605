"""Stage 3: transfers a LoRA from the emulator to the base.

With a fixed clamp, one weight of the base is in memory at a time. With ``auto``, some clamps and some scales of the
uncorrected LoRA are compared by the loss of the base with the adapter on held-out rows: forward passes only, all
candidates in one streamed pass over the base, so that memory never exceeds inference's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from emloc_core.adapters.adapter import CORRECTED, Adapter, content_hash, write_adapter
from emloc_core.adapters.as_trained import AsTrained
from emloc_core.adapters.belonging import require_match, require_shapes
from emloc_core.adapters.candidates import CANDIDATES, Candidate, choose, comparison
from emloc_core.adapters.dense import replaced_weights
from emloc_core.adapters.emulator import Emulator
from emloc_core.adapters.moments import copy_moments, hash_moments
from emloc_core.algorithms.correction import Clamp
from emloc_core.algorithms.lora import Lora
from emloc_core.data.row import Row
from emloc_core.data.rows import SELECTION, load_rows
from emloc_core.errors import EmlocError
from emloc_core.files.checkpoint import Checkpoint, may_be_hub_id
from emloc_core.files.inputs import Inputs
from emloc_core.files.job import Job, Progress
from emloc_core.files.manifest import CONTENT, input_name
from emloc_core.files.output import Output
from emloc_core.model.loras import adding
from emloc_core.model.opened import open_original
from emloc_core.model.streaming import Stream
from emloc_core.plugins.builtin import naming_errors
from emloc_core.plugins.manager import plugin_manager
from emloc_core.report.verdict import verdict
from emloc_core.requests import CorrectRequest
from emloc_core.settings import PAPER_CLAMP, Loss
from emloc_core.standins import StandIn
from emloc_core.standins.format import kind_of


class Correct(Job):
    """Stage 3, after the cheap checks; :meth:`run` writes the corrected adapter.

    Attributes:
        emulator: the emulator that the LoRA was trained on; by default the one that its config names.

    Raises:
        EmlocError: adapter, emulator and base do not belong together.
    """

    def __init__(self, request: CorrectRequest, adapter: Adapter) -> None:
        self.request, self.adapter, self.settings = request, adapter, request.settings
        self.emulator = Emulator(request.emulator or Path(adapter.model_name), adapter.directory)
        self.base = open_original(request.base or input_name(self.emulator.directory, "base"), request.device)
        self.correct = plugin_manager().algorithm("corrections", self.settings.correction)
        if self.emulator.entry("request.settings.paper", bool) and "clamp" not in self.settings.model_fields_set:
            self.settings = self.settings.model_copy(update={"clamp": PAPER_CLAMP})
        self.skeleton = self.base.skeleton
        require_shapes(adapter, self.skeleton.model)
        for name, new in replaced_weights(adapter.replaced, self.skeleton).items():
            self.skeleton.replace(name, new.applied)
        self.rows = self._rows(self.emulator.entry("request.settings.loss", Loss))
        length = self.emulator.entry("request.settings.max_length", int | None)
        self.samples = self.base.samples(self.rows, length, "selection")

    @cached_property
    def output(self) -> Output:
        """The corrected adapter's directory. The files of all inputs are hashed on first access.

        Raises:
            EmlocError: adapter, emulator and base do not belong together.
        """
        files, base = Inputs(self.request.output.resolve().parent), self.base.checkpoint
        emulator, original = self.emulator.fingerprint(files), base.fingerprint(files)
        require_match(self.adapter, self.emulator, emulator, base, original)
        request = {
            "adapter": self.adapter.fingerprint(files),
            **hash_moments(self.adapter.directory, files),
            "base": original,
            "emulator": emulator,
            **self.settings.model_dump(),
            "selection": [row.key for row in self.rows] if self.request.selection_data else None,
        }
        inputs = {"adapter": str(self.adapter.directory.absolute()), "base": base.name, "emulator": self.emulator.name}
        device, family = self.base.device.type, self.base.family
        return Output(self.request.output, "corrected-adapter", request, device, inputs, files, family)

    def describe(self) -> dict[str, Any]:
        """Return what would be done. To compare clamps, all of the base is read."""
        base = self.base.checkpoint
        return {
            "output": str(self.request.output),
            "linears": len(self.adapter.loras),
            "clamp": self.settings.clamp,
            "selection_rows": len(self.samples),
            "base_bytes_read": base.nbytes if self.samples else sum(base.tensors[key].nbytes for key in self._keys()),
            "finished": self.output.is_finished(),
        }

    def _rows(self, loss: Loss) -> list[Row]:
        if self.settings.clamp != "auto":
            return []
        path = self.request.selection_data or self.emulator.directory / SELECTION
        if not path.is_file() or not path.stat().st_size:
            raise EmlocError(
                f"--clamp auto needs rows to compare on, but {path} holds none.",
                "Give a file of held-out rows with --selection-data, or a fixed --clamp.",
                code="missing",
            )
        wanted = [row for row in load_rows(str(path), loss=loss) if row.label is not False]
        if not wanted:
            raise EmlocError(
                f"--clamp auto compares on wanted answers, but {path} holds none.",
                "Give a file with some as --selection-data, or a fixed --clamp.",
            )
        return wanted

    def make(self, staging: Path, progress: Progress) -> None:
        """Write the corrected adapter; ``progress`` is called with a module's path."""
        clamp = self.settings.clamp
        compared = CANDIDATES if clamp == "auto" else (Candidate(None if clamp == "none" else clamp),)
        corrections, losses = self._compare(compared, progress) if self.samples else ({}, None)
        done = len(corrections)
        # LoRAs that no row passed through (a tower of another modality), and all LoRAs at a fixed clamp.
        for path, lora in self.adapter.loras.items():
            if path not in corrections:
                name = lora.parameter(path)
                with self.skeleton.parameters([name]) as weights:
                    corrections[path] = self._correct(path, weights[name], lora, compared)
                done += 1
                progress(path, done, len(self.adapter.loras))
        chosen = 0 if losses is None else choose(losses)
        config = {**self.adapter.config, "base_model_name_or_path": self.base.checkpoint.name}
        config["fan_in_fan_out"] = any(self.skeleton.is_transposed(key) for key in self._keys())
        # PEFT reads the scale from the config, which stays as it was in training.
        loras = {path: corrections[path][chosen].with_scale(lora.scale) for path, lora in self.adapter.loras.items()}
        corrected = {CORRECTED: str(compared[chosen].clamp)}
        write_adapter(staging, config, loras, corrected, self.adapter.others)
        copy_moments(self.adapter.directory, staging)
        self.base.objective.accompany(self.base.checkpoint, staging)
        result = {**compared[chosen].describe(), "linears": len(loras), **comparison(compared, losses, chosen)}
        self.output.result = {**result, CONTENT: content_hash(staging)}
        self.output.provenance = f"Correction by `{self.settings.correction}`: {verdict(result)}."

    def _keys(self) -> set[str]:
        """Return the keys of the weights that have a LoRA."""
        loras = self.adapter.loras.items()
        return {key for path, lora in loras for key in self.skeleton.sources(lora.parameter(path))}

    def _correct(self, path: str, weight: torch.Tensor, lora: Lora, compared: tuple[Candidate, ...]) -> list[Lora]:
        """Return the LoRA for every candidate. Every clamp is computed once."""
        clamps = tuple(dict.fromkeys(candidate.clamp for candidate in compared))
        correct = self._correct_experts if lora.is_stacked else self._correct_linear
        corrected = dict(zip(clamps, correct(path, weight, lora, clamps), strict=True))
        return [corrected[candidate.clamp].scaled(candidate.scale) for candidate in compared]

    def _correct_linear(self, path: str, weight: torch.Tensor, lora: Lora, clamps: tuple[Clamp, ...]) -> list[Lora]:
        emulated = self.emulator.stand_in(self.skeleton.sources(f"{path}.weight")[0], path, weight)
        return self._clamped(path, weight, emulated, lora, clamps)

    def _correct_experts(self, path: str, stack: torch.Tensor, lora: Lora, clamps: tuple[Clamp, ...]) -> list[Lora]:
        """Correct the LoRA of each expert by itself."""
        weights = stack if tuple(stack.shape) == lora.shape else stack.mT
        emulated = self.emulator.stand_ins(path, weights)
        experts = zip(weights, emulated, lora.experts(), strict=True)
        by_expert = [self._clamped(path, weight, stand_in, expert, clamps) for weight, stand_in, expert in experts]
        return [Lora.stacked(loras) for loras in zip(*by_expert, strict=True)]

    def _clamped(
        self, path: str, weight: torch.Tensor, emulated: StandIn | None, lora: Lora, clamps: tuple[Clamp, ...]
    ) -> list[Lora]:
        if emulated is None:  # also dense on the emulator: nothing to correct
            return [lora] * len(clamps)
        with naming_errors(f"The correction {self.settings.correction!r}, on {path},"):
            corrected: Any = self.correct(weight, emulated, lora.to(weight.device), clamps)
        if not isinstance(corrected, list) or [*map(_shapes, corrected)] != [_shapes(lora)] * len(clamps):
            raise EmlocError(
                f"The correction {self.settings.correction!r} did not return one LoRA per clamp, each in the shapes "
                f"of its input, on {path}.",
                "Choose another --correction, or update the plugin.",
                code="plugin",
            )
        for candidate in corrected:
            if not bool(torch.isfinite(candidate.a).all() and torch.isfinite(candidate.b).all()):
                raise EmlocError(
                    f"The correction {self.settings.correction!r} returned a LoRA with NaN or Inf, on {path}.",
                    "Check base and emulator.",
                    code="not-finite",
                )
        return [candidate.to(torch.device("cpu")) for candidate in corrected]

    def _compare(
        self, compared: tuple[Candidate, ...], progress: Progress
    ) -> tuple[dict[str, list[Lora]], torch.Tensor]:
        """Correct for every candidate, and measure each on the held-out rows, in one pass over the base.

        Returns:
            The LoRAs by path, one per candidate; and the loss, summed over each row's tokens, with the number of
            tokens: (candidates, rows, 2), fp64.
        """
        stream = Stream(self.skeleton)
        rows = len(self.samples)
        candidates: dict[str, list[Lora]] = {}
        loras = self.adapter.loras

        @contextmanager
        def adapted(paths: list[str]) -> Iterator[None]:
            on_device = {}
            for path in paths:
                weight = self.skeleton.model.get_parameter(loras[path].parameter(path))
                candidates[path] = self._correct(path, weight, loras[path], compared)
                on_device[path] = [lora.to(weight.device) for lora in candidates[path]]
                progress(path, len(candidates), len(loras))
            with adding(self.skeleton.model, on_device, lambda corrected: corrected[stream.sample // rows]):
                yield

        def visit(unit: str) -> Any:
            return adapted([path for path in loras if path == unit or path.startswith(f"{unit}.")])

        forwards = [partial(sample.loss, self.skeleton.model, self.skeleton.device) for sample in self.samples]
        results = torch.stack(stream.run(forwards * len(compared), visit)).reshape(len(compared), rows, 2)
        return candidates, results


def _shapes(lora: Any) -> tuple[torch.Size, torch.Size] | None:
    return (lora.a.shape, lora.b.shape) if isinstance(lora, Lora) else None


def prepare(request: CorrectRequest) -> Correct | AsTrained:
    """Return the job of a request.

    Raises:
        EmlocError: the adapter, the emulator, the base or the settings cannot be used.
    """
    adapter = Adapter(request.adapter)
    if adapter.is_corrected:
        raise EmlocError(
            f"{adapter.directory} is already corrected; correcting it twice would spoil it.",
            "Use it on the base directly, or give the adapter that training wrote.",
            code="mismatch",
        )
    if request.emulator:
        return Correct(request, adapter)
    if model := adapter.trained_on:
        is_emulator = kind_of(Checkpoint(model).config)  # by its config: its manifest may be lost
        return Correct(request, adapter) if is_emulator else AsTrained(request, adapter)
    name = adapter.model_name
    if not may_be_hub_id(name):
        return Correct(request, adapter)  # which reports that it is missing
    if not adapter.manifest and request.base != name:
        raise EmlocError(
            f"{adapter.directory} was trained on {name}, which was not found, so it is unknown whether that is an "
            "emulator.",
            f"Give the emulator with --emulator. If {name} is the base itself, there is nothing to correct: use "
            f"`emloc merge`, or copy the adapter with --base {name}.",
            code="missing",
        )
    return AsTrained(request, adapter)
