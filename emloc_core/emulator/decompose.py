"""One streamed pass of the calibration rows through the base; each block is fitted while they pass through it.

What is fitted goes to the caller's :class:`Store`: an emulator's shards, or spectra. Rows also pass through blocks that
the store already holds, since later blocks need their outputs.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from emloc_core.algorithms.lora import Lora
from emloc_core.algorithms.products import by_onednn
from emloc_core.algorithms.statistics import Gram
from emloc_core.emulator.experts import ExpertFitting, emulated
from emloc_core.emulator.files import EmulatorFiles
from emloc_core.emulator.forwards import requiring_products, requiring_shared_inputs
from emloc_core.emulator.needs import Needs
from emloc_core.emulator.pack import fit_head, looking_up, require_finite
from emloc_core.emulator.propagation import emulating, fit_block
from emloc_core.emulator.ranks import LinearPlan, RankPlan
from emloc_core.emulator.sensitivity import Arguments, copied, sensitivities
from emloc_core.emulator.vocabulary import VocabularyPlan
from emloc_core.errors import EmlocError
from emloc_core.files.job import Progress
from emloc_core.model.hooks import forward_hooks, tapped
from emloc_core.model.inside import Positions
from emloc_core.model.lockstep import Forward
from emloc_core.model.loras import adding
from emloc_core.model.parking import Parking
from emloc_core.model.skeleton import Skeleton
from emloc_core.model.streaming import Stream
from emloc_core.objective import Sample
from emloc_core.plugins.builtin import naming_errors
from emloc_core.plugins.manager import plugin_manager
from emloc_core.standins import Format, StandIn
from emloc_core.standins.standin import Fitted

_NONE: Mapping[str, Lora] = {}


class Store(Protocol):
    """Receives what is fitted, block by block. An incomplete block must never look complete."""

    def is_written(self, block: str) -> bool:
        """Return whether what was fitted for a block has been written."""

    def write(self, block: str, fitted: Mapping[str, Any]) -> None:
        """Store what was fitted for a block's Linears, by module path, and for its stacks of experts, by path
        (:class:`~emloc_core.emulator.experts.Stacked`); empty for a block that no row passes through.

        If sensitivities were requested, every Linear has a pair: what was fitted, and its sensitivity.
        """


class Decomposition:
    """Fits what stands in for every planned Linear of a model.

    Args:
        directory: for files of what rows hold beyond what they do at blocks; None: that stays in memory.
        loras: by the path of a Linear. They are on in the base and in the emulator, whose weights are fitted to what
            is computed there.

    Linears that no token reaches get no stand-in, since there is nothing to fit it to.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        plan: RankPlan,
        samples: Sequence[Sample],
        format: Format,
        progress: Progress,
        directory: Path | None = None,
        loras: Mapping[str, Lora] = _NONE,
    ) -> None:
        self.skeleton, self.plan, self.samples = skeleton, plan, samples
        self.format, self.progress, self._directory = format, progress, directory
        self._loras = loras
        self.blocks = skeleton.blocks

    def run(self, store: Store, probes: int = 0) -> None:
        """Fit to the base's own activations.

        Args:
            probes: rows to measure sensitivities with, of a format that gives factors; 0 measures none.

        Raises:
            EmlocError: a weight or an activation is NaN or Inf, or the Linears of an input group read different inputs;
                the message names the layer, and the row.
        """
        self._pass(1, store, partial(self._gather, probes))

    def propagate(self, store: EmulatorFiles) -> None:
        """Fit to the inputs from the emulator built so far; see :mod:`emloc_core.emulator.propagation`.

        Raises:
            EmlocError: as :meth:`run`.
        """
        self._pass(2, store, self._propagate)

    def needs(self, *, propagated: bool) -> Needs:
        """Return what a pass takes of the device, as ``emloc plan`` says."""
        base, sizes = self.skeleton, [sample.size for sample in self.samples]
        passing = Positions(sum(sizes), max(sizes, default=0))
        arguments = (base.model, base.family, self.plan, self.format, base.dtype)
        return Needs(*arguments, propagated=propagated, passing=lambda _path: passing)

    def _pass(self, streams: int, store: Any, visit_block: Callable[[Any, str], Any]) -> None:
        """Pass the samples through the base, and with two streams then through the emulator."""
        propagated = streams > 1
        # Base and emulator are given the same tensors, which therefore always stay.
        own = (tensor for sample in self.samples for tensor in sample.others.values())
        resident = [*self.skeleton.model.buffers(), *own]
        needed = max(need.nbytes for need in self.needs(propagated=propagated))
        self.stream = Stream(self.skeleton, Parking.on(self.skeleton.device, resident, self._directory, needed=needed))
        vocabulary = {self._unit(plan): plan for plan in self.plan.vocabulary}
        head = next((plan for plan in vocabulary.values() if plan.is_fitted and not store.is_written(plan.path)), None)
        last = self._unit(head) if head else self.blocks[-1]

        def visit(unit: str) -> Any:
            for name, parameter in self.skeleton.model.get_submodule(unit).named_parameters():
                require_finite(parameter, f"{unit}.{name}", self.skeleton.checkpoint)
            if unit in self.blocks:
                return visit_block(store, unit)
            if head and unit == last:
                return self._fitting_head(store, head)
            if propagated and unit in vocabulary:
                packed = store.matrix(vocabulary[unit].path)
                return looking_up(self.stream, vocabulary[unit], packed, len(self.samples))
            return None

        forwards = [self._forward(sample) for sample in self.samples] * streams
        self.stream.run(forwards, lambda unit: self._with_loras(unit, visit(unit)), last)
        for block in self.blocks:
            if not store.is_written(block):  # no row passed through it: a vision tower and text rows, say
                store.write(block, {})

    @contextmanager
    def _with_loras(self, unit: str, visited: AbstractContextManager[None] | None) -> Iterator[None]:
        """Let samples pass through a unit with its LoRAs."""
        model, device = self.skeleton.model, self.skeleton.device
        loras = {path: lora.to(device) for path, lora in self._loras.items() if f"{path}.".startswith(f"{unit}.")}
        with adding(model, loras), visited or nullcontext():
            yield

    def _unit(self, plan: VocabularyPlan) -> str:
        """Return the unit that a layer of the vocabulary is, or is part of."""
        return next(unit for unit in self.stream.units if f"{plan.path}.".startswith(f"{unit}."))

    @contextmanager
    def _fitting_head(self, store: Store, plan: VocabularyPlan) -> Iterator[None]:
        store.write(plan.path, {plan.path: fit_head(self.stream, plan, len(self.samples), self._blame)})
        yield

    def _forward(self, sample: Sample) -> Forward:
        def forward() -> None:
            sample.run(self.skeleton.model, self.skeleton.device)

        return forward

    @contextmanager
    def _gather(self, probes: int, store: Store, block: str) -> Iterator[None]:
        """Fit a block to the base's own activations, while the samples pass through it."""
        if store.is_written(block):
            yield
        else:
            planned = self.plan.in_block(block)
            gathered = _gathered(planned, self.skeleton.device)
            tapping = {path: linears[0].tap for path, (_, linears) in gathered.items()}

            def sink(path: str, activations: torch.Tensor) -> None:
                try:
                    gathered[path][0].add(activations)
                except EmlocError as error:
                    raise self._blame(error, path, self.stream.sample) from None

            model, experts = self.skeleton.model, self._experts(block)
            unit = model.get_submodule(block)
            modules = {path: model.get_submodule(path) for path in tapping}
            routed = [(model.get_submodule(path), self._keeping(path, fitting)) for path, fitting in experts.items()]
            calls = [self._call(sample) for sample in self.stream.visiting[:probes]]
            watching = requiring_shared_inputs(self.stream, planned, self.skeleton.family)
            products = requiring_products(self.stream, planned, len(self.samples))
            with watching, products, tapped(modules, tapping, sink), forward_hooks(routed):
                yield
            fitted: Mapping[str, Any] = self._reached(gathered)
            if calls:
                disturbances = sensitivities(unit, calls, fitted, self._answering)
                fitted = {path: (factors, disturbances[path]) for path, factors in fitted.items()}
            stacked = {path: stack for fitting in experts.values() for path, stack in fitting.fit().items()}
            store.write(block, {**fitted, **stacked})
        self._report(block)

    @contextmanager
    def _propagate(self, store: EmulatorFiles, block: str) -> Iterator[None]:
        """Pass the samples through a block, half of them through its stand-ins, which are fitted to them first."""
        rows, planned = len(self.samples), self.plan.in_block(block)
        linears = {linear.path: self.skeleton.model.get_submodule(linear.path) for linear in planned}
        routed = {path: self.skeleton.model.get_submodule(path) for path in self.plan.experts_in_block(block)}
        if store.is_written(block):
            experts = self._emulated(block, store.read_stacks(block))
            answering = emulating(self.stream, linears, store.read(block), rows)
            with answering, emulating(self.stream, routed, experts, rows):
                yield
        else:
            watching = requiring_shared_inputs(self.stream, planned, self.skeleton.family)
            with watching, requiring_products(self.stream, planned, rows):
                arguments = (self._experts(block), rows, self._fit, store.as_read, self._blame)
                fitted = fit_block(self.stream, planned, *arguments, narrow=self.format.narrow)
            store.write(block, fitted)
            yield
        self._report(block)

    def _emulated(
        self, block: str, stacks: Mapping[str, Mapping[str, torch.Tensor]]
    ) -> dict[str, Callable[..., torch.Tensor]]:
        """Return what computes as a block's experts in the emulator, by path, from the parts of its stacks."""
        model, planned = self.skeleton.model, self.plan.experts_in_block(block)
        return {
            path: emulated(model.get_submodule(path), plans, self.format, stacks) for path, plans in planned.items()
        }

    @by_onednn()
    def _fit(self, linears: Sequence[LinearPlan], weights: Sequence[torch.Tensor], gram: Gram) -> Sequence[Fitted]:
        """Fit what stands in for Linears that share a Gram; the format may be a plugin's."""
        paths = ", ".join(linear.path for linear in linears)
        if self.format.narrow:
            gram.narrow()
        with naming_errors(f"The kind {self.format.name!r}, on {paths},"):
            stand_ins = self.format.fit(weights, gram, [linear.rank for linear in linears])
        if len(stand_ins) != len(linears):
            raise EmlocError(
                f"The kind {self.format.name!r} gave {len(stand_ins)} stand-ins for {paths}.",
                "Choose another --kind, or update the plugin.",
                code="plugin",
            )
        return stand_ins

    def _reached(self, gathered: dict[str, tuple[Gram, list[LinearPlan]]]) -> dict[str, Fitted]:
        """Fit the Linears that tokens reached, together where they share a Gram, which is freed then."""
        reached: dict[str, Fitted] = {}
        while gathered:
            gram, linears = gathered.pop(next(iter(gathered)))
            if gram.tokens:
                fitted = self._fit(linears, [self._weight(linear.path) for linear in linears], gram)
                reached.update(zip([linear.path for linear in linears], fitted, strict=True))
        return reached

    def _experts(self, block: str) -> dict[str, ExpertFitting]:
        def fit(linear: LinearPlan, weight: torch.Tensor, gram: Gram) -> Fitted:
            return self._fit([linear], [weight], gram)[0]

        return {
            path: ExpertFitting(self.skeleton.model.get_submodule(path), stacks, self.format, fit, self._directory)
            for path, stacks in self.plan.experts_in_block(block).items()
        }

    def _keeping(self, path: str, experts: ExpertFitting) -> Callable[..., None]:
        """Return a hook that has the tokens of each row kept."""

        def keep(_module: nn.Module, args: tuple[Any, ...], _output: Any) -> None:
            try:
                experts.add(*args[:2])
            except EmlocError as error:
                raise self._blame(error, path, self.stream.sample) from None

        return keep

    def _call(self, sample: int) -> Arguments:
        with self.stream.arguments(sample) as arguments:
            return copied(arguments)

    def _answering(self, path: str, stand_in: StandIn) -> AbstractContextManager[None]:
        """Compute one Linear's outputs with a stand-in, for all samples."""
        stand_in = stand_in.to(self._weight(path))
        return emulating(self.stream, {path: self.skeleton.model.get_submodule(path)}, {path: stand_in}, 0)

    def _weight(self, path: str) -> torch.Tensor:
        return self.skeleton.model.get_parameter(f"{path}.weight")

    def _blame(self, error: EmlocError, path: str, sample: int) -> EmlocError:
        return EmlocError(
            f"{self.samples[sample].row}: {error} of {path}.",
            "Check the weights up to this layer; a half-precision model may overflow on this row.",
            code=error.code,
        )

    def _report(self, block: str) -> None:
        index = self.blocks.index(block)
        self.progress(block, index + 1, len(self.blocks))
        plugin_manager().notify("emloc_block_done", stage="compress", path=block, index=index, total=len(self.blocks))


def _gathered(planned: Sequence[LinearPlan], device: torch.device) -> dict[str, tuple[Gram, list[LinearPlan]]]:
    """Return Grams with the Linears that share each, by the path where it is gathered."""
    sharing: dict[Any, list[LinearPlan]] = defaultdict(list)
    for linear in planned:
        sharing[linear.path if linear.tap == "output" else linear.group].append(linear)
    return {linears[0].path: (_gram(linears[0], device), linears) for linears in sharing.values()}


def _gram(linear: LinearPlan, device: torch.device) -> Gram:
    if linear.tap == "output":
        return Gram("output", linear.out_features, device=device)
    return Gram("input", linear.in_features, device=device)
