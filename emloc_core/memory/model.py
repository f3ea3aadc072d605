"""Memory of each stage, in bytes, from the config alone: no weights, no network. See ``docs/memory.md``.

Weights, LoRA, gradients, optimiser states and the KV cache are counted exactly. Activations and logits are those of
the real step, traced storage by storage (:mod:`emloc_core.memory.tracing`). The blocks of a tower are alike, or take
turns, so only a few are traced, and the others hold what these do (:mod:`emloc_core.memory.depth`).
"""

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from emloc_core.compat.halves import is_slow, scratch
from emloc_core.emulator.coverage import Coverage, coverage
from emloc_core.emulator.declared import all_linears, find_linears
from emloc_core.emulator.method import Method, method_of
from emloc_core.emulator.ranks import UNREACHED, RankPlan
from emloc_core.emulator.vocabulary import packings
from emloc_core.errors import EmlocError, first_line
from emloc_core.memory import cache
from emloc_core.memory.depth import Depth, Phases, repetition
from emloc_core.memory.planned_model import planned_model
from emloc_core.memory.workload import Workload
from emloc_core.model.image_shape import ImageShape, image_shape
from emloc_core.model.overhead import overhead
from emloc_core.plugins.manager import plugin_manager
from emloc_core.settings import ALL_LINEAR, FACTORS, FOUR_BITS, CompressSettings
from emloc_core.standins import Format
from emloc_core.standins.expert_loras import expert_stacks
from emloc_core.standins.experts import expert_rank, is_stack
from emloc_core.standins.layer import replace_linear
from emloc_core.standins.nf4 import FourBitLinear
from emloc_core.standins.registry import format_named
from emloc_core.standins.vocabulary import replace_vocabulary
from emloc_core.tuning.trl import lora_config

#: Traces a few blocks of towers of these depths.
Trace = Callable[[Mapping[str, Depth]], Phases]

#: Terms, in display order.
TERMS = (
    "weights", "adapter", "gradients", "optimiser", "kv_cache", "activations", "logits", "statistics", "stand-ins",
    "overhead",
)  # fmt: skip


@dataclass(frozen=True)
class Need:
    """Memory of a stage.

    Attributes:
        terms: bytes by term, at the peak of the sum.
        phase: what runs at the peak.
    """

    stage: str
    terms: Mapping[str, int]
    phase: str = ""

    @property
    def total(self) -> int:
        """Sum of all terms, in bytes."""
        return sum(self.terms.values())


class MemoryModel:
    """The memory of all stages of one model.

    Args:
        settings: how an emulator is made; the length of its rows is ignored. None: factors, of which a ratio says all.

    Raises:
        EmlocError: the config lacks a field, or no family declares it.
    """

    def __init__(self, config_file: Path, workload: Workload, settings: CompressSettings | None = None) -> None:
        self.config_file, self.settings = config_file, (settings or CompressSettings(kind=FACTORS)).settled()
        self._planned = planned_model(config_file)
        self.family = self._planned.family
        self.objective = plugin_manager().objective_of(self.family)
        self.model: Any = self._planned.outline
        self.config = self.model.config
        self.dtype = self._planned.dtype
        self.towers = {tower.blocks: tower.name for tower in self.family.towers}
        self._take(workload)
        self.method = self._method()

    def _take(self, workload: Workload) -> None:
        self.workload = workload
        targets = workload.train.target_modules or self.family.lora_targets()
        self.targets = all_linears(self.model) if targets == [ALL_LINEAR] else sorted(set(targets))
        self.image: ImageShape | None = None
        if workload.images:
            self.image = image_shape(self.config_file, self.config, workload.image_size)
        self.step = self.objective.step(self)

    def _method(self) -> Method:
        format = format_named(self.settings.kind)
        settings = self.settings.for_tuning(self.workload.train)
        return method_of(settings, format, find_linears(self.model, self.family, format), self.model)

    @property
    def format(self) -> Format:
        """The emulator's format."""
        return self.method.format

    @property
    def packed(self) -> Sequence[str]:
        """Paths of the Linears that the base has in four bits; none of an ordinary one."""
        return self._planned.packed

    @property
    def multiplied(self) -> set[torch.dtype]:
        """The dtypes of products: of the model, and of autocast."""
        return {self.dtype, *([torch.bfloat16] if self.workload.train.bf16 else [])}

    @property
    def slow(self) -> list[str]:
        """Those of :attr:`multiplied` in which products are computed in single precision on the device."""
        slow = [dtype for dtype in self.multiplied if is_slow(dtype, self.workload.device)]
        return sorted(str(dtype).removeprefix("torch.") for dtype in slow)

    def overhead(self, *, tuning: bool) -> int:
        """Return the bytes that a process takes besides the tensors that are counted."""
        device = self.workload.device
        return overhead(device, tuning=tuning) + scratch(device, self.multiplied)

    @property
    def stored(self) -> Any:
        """The base's outline as it is stored."""
        return self._planned.stored

    @property
    def nbytes(self) -> int:
        """Bytes of the base's weights; tied ones count once."""
        itemsize, four_bits = self.dtype.itemsize, format_named(FOUR_BITS)
        total = self.parameters() * itemsize
        for path in self.packed:
            weight: Any = self.model.get_submodule(path).weight
            total += four_bits.nbytes(tuple(weight.shape), None, self.dtype) - weight.numel() * itemsize
        return total

    @property
    def smallest_ratio(self) -> float | None:
        """The smallest ratio that is looked for; None where the format has none."""
        return self.format.ratios.smallest if self.format.ratios else None

    @property
    def linears(self) -> RankPlan:
        """The Linears and experts that become smaller, without ranks."""
        return self.method.linears

    @property
    def coverage(self) -> Coverage:
        """What becomes smaller, and what stays dense."""
        return coverage(self.model, self.family, self.linears)

    def plan(self, ratio: float | None = None) -> RankPlan:
        """Return the ranks of the emulator at a ratio; None: the settings' ratio, if the kind has one.

        Towers that no row reaches stay dense, as in stage 1: there is nothing to fit stand-ins to.
        """
        plan = self.method.plan(ratio)
        idle = [linear.path for linear in plan.planned if linear.path.startswith(self._idle_towers)]
        return plan.dense(idle, UNREACHED) if idle else plan

    @cached_property
    def _idle_towers(self) -> tuple[str, ...]:
        """Path prefixes of towers that no row reaches: vision towers, if the workload is text only."""
        if len(self.towers) == 1 or self.workload.images:
            return ()
        phases = self._follow(self._trace_inference, dict.fromkeys(self.towers, Depth(1, 0, 1)))
        return tuple(f"{path}." for path, tower in self.towers.items() if f"{tower} forward" not in phases)

    def parameters(self, plan: RankPlan | None = None) -> int:
        """Return the number of parameters of the base, or of a plan's emulator; tied ones count once."""
        total = sum(parameter.numel() for parameter in self.model.parameters())
        if plan is None:
            return total
        before, after = plan.parameters(self.format)
        return total - before + after

    def emulator_bytes(self, plan: RankPlan) -> int:
        """Return the bytes of the emulator's weights; tied ones count once."""
        dense, packed = self.parameters(), 0
        for linear in plan.planned:
            if linear.is_replaced:
                dense, packed = dense - linear.numbers, packed + linear.nbytes(self.format, self.dtype)
        for matrix in plan.vocabulary:
            dense, packed = dense - matrix.numbers, packed + matrix.nbytes(self.dtype)
        return dense * self.dtype.itemsize + packed

    def adapter_parameters(self) -> int:
        """Return the number of LoRA parameters: ``r (m + n)`` for each Linear, and expert's matrix, with a LoRA."""
        rank = self.workload.train.lora_rank
        stacks = expert_stacks(self.model) if self.workload.train.lora_experts else []
        of_experts = expert_rank(rank, self.model.config)
        shapes = [self.model.get_parameter(path).shape for path in stacks]
        return sum(count * of_experts * (m + n) for count, m, n in shapes) + sum(
            rank * (module.in_features + module.out_features)
            for path, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and f".{path}".endswith(tuple(f".{target}" for target in self.targets))
        )

    def with_workload(self, workload: Workload) -> "MemoryModel":
        """Return the same model under another workload."""
        other = copy.copy(self)
        vars(other).pop("_idle_towers", None)  # those of this workload
        other._take(workload)
        if workload.train.trains_modules != self.workload.train.trains_modules:
            other.method = other._method()
        return other

    def with_kind(self, kind: str) -> "MemoryModel":
        """Return the same model with the default emulator of a kind; both share their traces."""
        other = copy.copy(self)
        other.settings = CompressSettings(kind=kind, keep=self.settings.keep)
        other.method = other._method()
        return other

    def least_length(self) -> int:
        """Return the fewest tokens that a row can have: those of its images, and one."""
        return self.workload.images * self.image.tokens + 1 if self.image else 1

    def inference(self) -> Need:
        """Return what the base needs to read a prompt of the workload's size and generate the first token."""
        stage = "inference on the base"
        return self._need_of(
            self._work(stage, None), lambda: self._need(stage, self._follow(self._trace_inference, self._depths(None)))
        )

    def _need_of(self, work: str, trace: Callable[[], Need]) -> Need:
        """Return what a step needs: as kept under a digest of all that it depends on, or traced and then kept."""
        traces = self._planned.traces.values
        try:
            terms = {term: traces[work]["terms"][term] + 0 for term in TERMS if term in traces[work]["terms"]}
            return Need(str(traces[work]["stage"]), terms, str(traces[work]["phase"]))
        except (KeyError, TypeError):  # it was not traced, or the file is not ours
            need = trace()
            self._planned.traces.add({work: asdict(need)})
            return need

    def _work(self, stage: str, plan: RankPlan | None) -> str:
        """Return a digest of all that a trace of the model depends on."""
        train = self.workload.train
        of_steps = {"lora_dropout", "gradient_checkpointing", "bf16"}
        of_lora = {"lora_rank", "rank_pattern", "modules_to_save", "trainable_token_indices", "lora_experts"}
        lora = train.model_dump(include=of_steps | of_lora)
        emulator = None if plan is None else (self.format.name, sorted(plan.ranks.items()), packings(plan.vocabulary))
        return cache.key(
            stage, self.step.inputs, self.workload.device, self.slow, lora, train.accumulation > 1, self.targets,
            emulator,
        )  # fmt: skip

    def _trace_inference(self, depths: Mapping[str, Depth]) -> Phases:
        from emloc_core.memory.tracing import trace_inference

        return trace_inference(self._cut(depths), self.towers, depths, self.step)

    def tuning(self, plan: RankPlan | None = None, *, exists: bool = False) -> Need:
        """Return what a LoRA needs on the base, or on a plan's emulator. Equal ranks are traced once.

        Args:
            plan: the ranks; None: the base.
            exists: whether the emulator exists. If not, and calibration will share out its ranks, activations are those
                of the highest ranks that a block may come to.
        """
        shared_out = self.method.by_spectra and not exists
        traced = plan.at_caps() if plan and shared_out else plan
        need = self._need_of(self._work("tuning", traced), lambda: self._trace_tuning(traced))
        if plan is None or traced is None:
            return need
        weights = need.terms["weights"] - self.emulator_bytes(traced) + self.emulator_bytes(plan)
        return replace(need, terms={**need.terms, "weights": weights})

    def fits(self, budget: int, plan: RankPlan | None = None) -> bool:
        """Return whether tuning fits so many bytes; nothing is traced where weights and imports alone do not."""
        weights = self.nbytes if plan is None else self.emulator_bytes(plan)
        at_least = weights + self.overhead(tuning=True)
        return at_least <= budget and self.tuning(plan).total <= budget

    def _trace_tuning(self, plan: RankPlan | None) -> Need:
        from peft import get_peft_model

        from emloc_core.memory.tracing import trace_training

        stage = "LoRA on the base" if plan is None else "LoRA on the emulator"

        def trace(depths: Mapping[str, Depth]) -> Phases:
            model = self._cut(depths)
            if plan is not None:
                self.format.replace(model, {path: rank for path, rank in plan.ranks.items() if _has(model, path)})
                replace_vocabulary(model, packings(plan.vocabulary))
            # Every layer is planned like the few that are traced, which the choice of layers might leave out.
            train = self.workload.train.model_copy(update={"layers_to_transform": None})
            lora: Any = get_peft_model(
                model, lora_config(train, self.targets, self.objective.task, model=model), low_cpu_mem_usage=True
            )
            return trace_training(
                lora,
                self.towers,
                depths,
                self.step,
                checkpointing=train.gradient_checkpointing,
                accumulating=train.accumulation > 1,
                bf16=train.bf16,
            )

        return self._need(stage, self._follow(trace, self._depths(plan)))

    def _need(self, stage: str, phases: Phases) -> Need:
        phase, peak = max(phases.items(), key=lambda entry: entry[1].total())
        # AdamW keeps two moments of every trained parameter, in the parameter's dtype (Kingma and Ba, 2014).
        besides = self.overhead(tuning=peak["adapter"] > 0)
        terms = {**peak, "optimiser": 2 * peak["adapter"], "overhead": besides}
        return Need(stage, {term: terms[term] for term in TERMS if terms.get(term)}, phase)

    def _deepstack(self, path: str) -> Sequence[int]:
        """Return the indices of a tower's blocks whose outputs DeepStack adds."""
        return getattr(self.model.get_submodule(path.rpartition(".")[0]), "deepstack_visual_indexes", ())

    def _cut(self, depths: Mapping[str, Depth]) -> nn.Module:
        """Return a copy of the model with only the first blocks of each tower."""
        model = self._planned.model
        full = {path: model.get_submodule(path) for path in depths}
        try:
            for path, depth in depths.items():
                model.set_submodule(path, nn.ModuleList(list(full[path].children())[: depth.few]))
            cut = copy.deepcopy(model)
        finally:
            for path, blocks in full.items():
                model.set_submodule(path, blocks)
        for path in self.packed:
            if _has(cut, path):
                replace_linear(cut, path, FourBitLinear)
        return cut

    def _depths(self, plan: RankPlan | None) -> dict[str, Depth]:
        return {path: self._depth(path, plan) for path in self.towers}

    def _follow(self, trace: Trace, depths: Mapping[str, Depth]) -> Phases:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # about names that libraries use
                return trace(depths)
        except EmlocError:
            raise
        except Exception as error:  # the model's own code may raise anything on fake tensors
            raise EmlocError(
                f"A step of the model in {self.config_file} cannot be traced without weights ({first_line(error)}).",
                "Its memory depends on what it computes; plan a dense model of about its size instead.",
                code="unsupported",
            ) from error

    def _depth(self, path: str, plan: RankPlan | None) -> Depth:
        """Return which of a tower's blocks are alike, in shapes and ranks."""
        blocks = dict(self.model.get_submodule(path).named_children())
        if self._deepstack(path):
            return Depth(len(blocks), 0, len(blocks))
        ranked = dict.fromkeys(self.packed, 0) if plan is None else plan.ranks
        ranks = {path: rank or 0 for path, rank in ranked.items()}  # what stays dense has none
        layouts: list[tuple[Any, ...]] = [
            tuple(
                (name, tuple(parameter.shape), ranks.get(f"{path}.{index}.{name.removesuffix('.weight')}"))
                for name, parameter in block.named_parameters()
            )
            for index, block in blocks.items()
        ]
        added = 0
        if path == list(self.towers)[-1]:
            types: Sequence[str] = getattr(self.config.get_text_config(), "layer_types", None) or ()
            if len(types) == len(layouts):  # such as sliding and full attention, in turn
                layouts = [(kind, *layout) for kind, layout in zip(types, layouts, strict=True)]
            added = self._added
        apart, period = repetition(layouts)
        return Depth(len(blocks), max(apart, added), period)

    @property
    def _added(self) -> int:
        """How many of the language model's first blocks differ from the others, since DeepStack adds to their outputs.

        The next block counts too: while it runs, the tensor that was added to is still alive.
        """
        most = max(len(self._deepstack(path)) for path in self.towers) if self.workload.images else 0
        return most + 1 if most else 0


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return is_stack(model, path)
    return True
