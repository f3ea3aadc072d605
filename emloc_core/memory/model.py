"""Memory of each stage, in bytes, from the config alone: no weights, no network. See ``docs/memory.md``.

Weights, LoRA, gradients, optimiser states and the KV cache are counted exactly. Activations and logits are those of
the real step, traced storage by storage (:mod:`emloc_core.memory.tracing`). The blocks of a tower are alike, or take
turns, so only a few are traced, at two depths, and the peak of each phase is extrapolated linearly.
"""

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import PreTrainedModel

from emloc_core.algorithms.allocation import uniform
from emloc_core.emulator.coverage import Coverage, coverage
from emloc_core.emulator.declared import find_linears
from emloc_core.emulator.files import UNREACHED
from emloc_core.emulator.method import Method, method_of
from emloc_core.emulator.ranks import RankPlan, allocated
from emloc_core.errors import EmlocError, first_line, typed_line
from emloc_core.experts import is_stack
from emloc_core.family import Family
from emloc_core.files.checkpoint import read_config_json
from emloc_core.files.pretrained import load_config
from emloc_core.kinds import Kind
from emloc_core.memory.tracing import Phases, trace_inference, trace_training
from emloc_core.memory.workload import Workload
from emloc_core.model.image_shape import ImageShape, image_shape
from emloc_core.model.overhead import overhead
from emloc_core.model.skeleton import build_model
from emloc_core.plugins.manager import plugin_manager
from emloc_core.settings import ALL_LINEAR, CompressSettings
from emloc_core.tuning.targets import all_linears
from emloc_core.tuning.trl import lora_config

#: Terms, in display order.
TERMS = (
    "weights", "adapter", "gradients", "optimiser", "kv_cache", "activations", "logits", "statistics", "stand-ins",
    "overhead",
)  # fmt: skip
#: Fields for which transformers would assume another model's size if they were missing.
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
#: A first block and a last one, which form their own phases.
_OUTER = 2


@dataclass(frozen=True)
class Need:
    """Memory of a stage.

    Attributes:
        stage: its name.
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
        config_file: the model's ``config.json``.
        workload: the batch, and how it is trained on.
        settings: how an emulator is made; the length of its rows is ignored. None: by default.

    Raises:
        EmlocError: the config lacks a field, or no family declares it.
    """

    def __init__(self, config_file: Path, workload: Workload, settings: CompressSettings | None = None) -> None:
        self.config_file, self.workload = config_file, workload
        self.settings = (settings or CompressSettings()).settled()
        self.kind: Kind = plugin_manager().algorithm("emulators", self.settings.kind)()
        raw = read_config_json(config_file)
        if raw.get("quantization_config"):
            raise EmlocError(
                f"The model of {config_file} is quantised or an emulator.",
                "Give the original model; in four bits, it needs what its emulator of the kind nf4 does.",
                code="unsupported",
            )
        self.family: Family = plugin_manager().family_for(raw)
        self.config = load_config(config_file)
        _require_sizes(config_file, raw, self.config)
        self.dtype = self._dtype()
        self.model: PreTrainedModel = self._build()
        self.method = self._method()
        self.towers = {tower.blocks: tower.name for tower in self.family.towers}
        chosen = workload.train.target_modules or self.family.lora_targets()
        self.targets = all_linears(self.model) if chosen == [ALL_LINEAR] else sorted(set(chosen))
        self.image: ImageShape | None = None
        if workload.images:
            self.image = image_shape(config_file, self.config, workload.image_size)
        self._inputs = self._shape_inputs()
        self._traced = _traced(repr(raw), repr(workload), repr(self._inputs), repr(self.family))

    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype | None = self.config.dtype or self.config.get_text_config().dtype
        if dtype is None:
            raise EmlocError(
                f"{self.config_file} has no dtype.", 'Add the dtype of the weights, such as "dtype": "bfloat16".'
            )
        return dtype

    def _method(self) -> Method:
        return method_of(self.settings, self.kind, find_linears(self.model, self.family, self.kind))

    @property
    def linears(self) -> RankPlan:
        """The Linears and experts that become smaller, without ranks."""
        return self.method.linears

    @property
    def coverage(self) -> Coverage:
        """What becomes smaller, and what stays dense."""
        return coverage(self.model, self.family, self.linears)

    def _build(self) -> PreTrainedModel:
        try:
            return build_model(self.config, self.family, self.dtype)
        except Exception as error:  # the model's own code may raise anything on bad values
            raise EmlocError(
                f"transformers cannot build the model of {self.config_file} ({typed_line(error)}).",
                "Check the values in the file.",
            ) from error

    def plan(self, ratio: float | None = None) -> RankPlan:
        """Return the ranks of the emulator at a ratio; None: that of the settings, if the kind has one.

        Towers that no row reaches stay dense, as in stage 1: there is nothing to fit stand-ins to.
        """
        plan = allocated(self.linears, ratio or self.method.settings.ratio, uniform, kind=self.kind)
        idle = [each.path for each in plan.planned if each.path.startswith(self._idle_towers)]
        return plan.dense(idle, UNREACHED) if idle else plan

    @cached_property
    def _idle_towers(self) -> tuple[str, ...]:
        """Path prefixes of towers that no row reaches: vision towers, if the workload is text only."""
        if len(self.towers) == 1 or self.workload.images:
            return ()
        phases = self._follow(self._trace_inference, dict.fromkeys(self.towers, 1))
        return tuple(f"{path}." for path, tower in self.towers.items() if f"{tower} forward" not in phases)

    def parameters(self, plan: RankPlan | None = None) -> int:
        """Return the number of parameters of the base, or of a plan's emulator; tied ones count once."""
        total = sum(parameter.numel() for parameter in self.model.parameters())
        if plan is None:
            return total
        before, after = plan.parameters(self.kind)
        return total - before + after

    def weight_bytes(self, ratio: float) -> int:
        """Return the bytes of the emulator's weights at a ratio."""
        return self.emulator_bytes(self.plan(ratio))

    def emulator_bytes(self, plan: RankPlan) -> int:
        """Return the bytes of the emulator's weights; tied ones count once."""
        kept = self.parameters() * self.dtype.itemsize
        for each in plan.planned:
            if each.rank is not None:
                kept += each.nbytes(self.kind, self.dtype) - each.numbers * self.dtype.itemsize
        return kept

    def adapter_parameters(self) -> int:
        """Return the number of LoRA parameters: ``r (m + n)`` for each Linear with a LoRA."""
        rank = self.workload.train.lora_rank
        return sum(
            rank * (module.in_features + module.out_features)
            for path, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and f".{path}".endswith(tuple(f".{target}" for target in self.targets))
        )

    def with_workload(self, workload: Workload) -> "MemoryModel":
        """Return the same model under another workload."""
        return MemoryModel(self.config_file, workload, self.settings)

    def with_kind(self, kind: str) -> "MemoryModel":
        """Return the same model with the default emulator of a kind; what was traced of either is known to both."""
        other = copy.copy(self)
        other.settings = CompressSettings(kind=kind)
        other.kind = plugin_manager().algorithm("emulators", kind)()
        other.method = other._method()
        return other

    def least_length(self) -> int:
        """Return the fewest tokens that a row can have: those of its images, and one."""
        return self.workload.images * self.image.tokens + 1 if self.image else 1

    def inference(self) -> Need:
        """Return what the base needs to read a prompt of the workload's size and generate the first token."""
        stage = "inference on the base"
        if stage not in self._traced:
            self._traced[stage] = self._need(stage, self._extend(self._trace_inference, None))
        return self._traced[stage]

    def _trace_inference(self, depths: Mapping[str, int]) -> Phases:
        return trace_inference(self._cut(depths), self.towers, self._inputs, self._apart)

    def tuning(self, plan: RankPlan | None = None, *, made: bool = False) -> Need:
        """Return what a LoRA needs on the base, or on a plan's emulator. Equal ranks are traced once.

        Args:
            plan: the ranks; None: the base.
            made: whether they are those of an emulator that exists. If not, and calibration will share them out,
                activations are those of the highest ranks that a block may come to.
        """
        shared_out = self.method.by_spectra and self.kind.has_factors and not made
        traced = plan.at_caps() if plan and shared_out else plan
        emulator = None if traced is None else (self.kind.name, frozenset(traced.ranks.items()))
        if emulator not in self._traced:
            self._traced[emulator] = self._trace_tuning(traced)
        need = self._traced[emulator]
        if plan is None or traced is None:
            return need
        weights = need.terms["weights"] - self.emulator_bytes(traced) + self.emulator_bytes(plan)
        return replace(need, terms={**need.terms, "weights": weights})

    def _trace_tuning(self, plan: RankPlan | None) -> Need:
        stage = "LoRA on the base" if plan is None else "LoRA on the emulator"

        def trace(depths: Mapping[str, int]) -> Phases:
            model = self._cut(depths)
            if plan is not None:
                self.kind.replace(model, {path: rank for path, rank in plan.ranks.items() if _has(model, path)})
            lora: Any = get_peft_model(
                model,
                lora_config(self.workload.train, self.targets),
                low_cpu_mem_usage=True,
            )
            train = self.workload.train
            return trace_training(
                lora,
                self.towers,
                self._inputs,
                checkpointing=train.gradient_checkpointing,
                accumulating=train.accumulation > 1,
                bf16=train.bf16,
                fused_loss=self.workload.device == "cuda",
                apart=self._apart,
            )

        return self._need(stage, self._extend(trace, plan))

    def _need(self, stage: str, phases: Phases) -> Need:
        phase, peak = max(phases.items(), key=lambda entry: entry[1].total())
        # AdamW keeps two moments of every trained parameter, in the parameter's dtype (Kingma and Ba, 2014).
        besides = overhead(self.workload.device, tuning=peak["adapter"] > 0)
        terms = {**peak, "optimiser": 2 * peak["adapter"], "overhead": besides}
        return Need(stage, {term: terms[term] for term in TERMS if terms.get(term)}, phase)

    @cached_property
    def _apart(self) -> dict[str, int]:
        """How many of the language model's first blocks differ from the others, since DeepStack adds to their outputs.

        The next block counts too: while it runs, the tensor that was added to is still alive.
        """
        added = max(len(self._deepstack(path)) for path in self.towers) if self.workload.images else 0
        return {list(self.towers)[-1]: added + 1} if added else {}

    def _deepstack(self, path: str) -> Sequence[int]:
        """Return the indices of a tower's blocks whose outputs DeepStack adds."""
        return getattr(self.model.get_submodule(path.rpartition(".")[0]), "deepstack_visual_indexes", ())

    def _cut(self, depths: Mapping[str, int]) -> nn.Module:
        """Return a copy of the model with only the first blocks of each tower."""
        whole = {path: self.model.get_submodule(path) for path in depths}
        try:
            for path, depth in depths.items():
                self.model.set_submodule(path, nn.ModuleList(list(whole[path].children())[:depth]))
            return copy.deepcopy(self.model)
        finally:
            for path, blocks in whole.items():
                self.model.set_submodule(path, blocks)

    def _extend(self, trace: Callable[[Mapping[str, int]], Phases], plan: RankPlan | None) -> Phases:
        """Trace a few blocks of each tower, then a period more of each in turn, and extrapolate the difference to all.

        Phases are divided so that each peak grows linearly with depth. Towers whose blocks do not repeat are traced in
        full.
        """
        whole = {path: len(list(self.model.get_submodule(path).children())) for path in self.towers}
        period = {path: self._period(path, plan) for path in self.towers}
        few = {path: self._few(path, count, period[path]) for path, count in whole.items()}
        phases = self._follow(trace, few)
        extended = {phase: Counter(peak) for phase, peak in phases.items()}
        for path, count in whole.items():
            if count == few[path]:
                continue
            deeper = self._follow(trace, {**few, path: few[path] + period[path]})
            times = (count - few[path]) // period[path]
            for phase, peak in phases.items():
                for kind in peak.keys() | deeper[phase].keys():
                    extended[phase][kind] += times * (deeper[phase][kind] - peak[kind])
        return extended

    def _follow(self, trace: Callable[[Mapping[str, int]], Phases], depths: Mapping[str, int]) -> Phases:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # about names that libraries use
                return trace(depths)
        except Exception as error:  # the model's own code may raise anything on fake tensors
            raise EmlocError(
                f"A step of the model in {self.config_file} cannot be traced without weights ({first_line(error)}).",
                "Its memory depends on what it computes; plan a dense model of about its size instead.",
                code="unsupported",
            ) from error

    def _few(self, path: str, count: int, period: int) -> int:
        """Return how many of a tower's blocks to trace first: a period between the first and the last, or more.

        They are whole periods fewer than all.
        """
        enough = _OUTER + period + self._apart.get(path, 0)
        few = enough + (count - enough) % period
        return few if few + period < count else count

    def _period(self, path: str, plan: RankPlan | None) -> int:
        """Return after how many blocks a tower's blocks repeat; the number of all if they do not."""
        blocks = dict(self.model.get_submodule(path).named_children())
        if self._deepstack(path):
            return len(blocks)
        ranks = {} if plan is None else plan.ranks
        types: Sequence[str] = ()
        if path == list(self.towers)[-1]:  # such as sliding and full attention, in turn
            types = getattr(self.config.get_text_config(), "layer_types", None) or ()
        layouts: list[tuple[Any, ...]] = [
            tuple(
                (name, tuple(parameter.shape), ranks.get(f"{path}.{index}.{name.removesuffix('.weight')}"))
                for name, parameter in block.named_parameters()
            )
            for index, block in blocks.items()
        ]
        if len(types) == len(layouts):
            layouts = [(kind, *layout) for kind, layout in zip(types, layouts, strict=True)]
        steps = range(1, len(layouts))
        return next((step for step in steps if layouts[step:] == layouts[:-step]), max(1, len(layouts)))

    def _shape_inputs(self) -> dict[str, Any]:
        workload = self.workload
        # Rows of a batch differ in length, so attention needs a mask; a single row needs none.
        rows = workload.batch_size * workload.sequences_per_row
        inputs = {"rows": rows, "length": workload.length, "padded": rows > 1}
        if self.image is None:
            return inputs
        tokens = workload.images * self.image.tokens
        if tokens >= workload.length:
            raise EmlocError(
                f"{workload.images} images of {self.image.tokens} tokens each leave no text in {workload.length} "
                "tokens.",
                "Give fewer images or a greater length.",
            )
        return {**inputs, "images": workload.images, "image": self.image, "image_token": self.config.image_token_id}


def _require_sizes(config_file: Path, raw: Mapping[str, Any], config: Any) -> None:
    """Refuse a config without its sizes, for which transformers would use its own defaults."""
    sections = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", {})}
    for name, section in sections.items():
        if section is not None:
            given = raw.get(name)
            if name == "text_config" and given is None:  # published at the top level, which transformers accepts
                given = raw
            if not isinstance(given, dict):
                raise EmlocError(f"{config_file} has no {name}.", "Download the file again.")
            _require_fields(config_file, given, section, f"{name}.")
    if not sections:
        _require_fields(config_file, raw, config, "")


def _require_fields(config_file: Path, raw: Mapping[str, Any], config: Any, prefix: str) -> None:
    renamed = getattr(config, "attribute_map", {})
    for name in _SIZES:
        derived = isinstance(getattr(type(config), name, None), property)  # from other fields
        if hasattr(config, name) and not derived and name not in raw and renamed.get(name) not in raw:
            raise EmlocError(f"{config_file} has no {prefix}{name}.", "Download the file again.")
    # If it is missing, some classes use the number of heads, and others assume a number.
    if "num_key_value_heads" not in raw and isinstance(getattr(type(config), "num_key_value_heads", None), int):
        raise EmlocError(f"{config_file} has no {prefix}num_key_value_heads.", "Download the file again.")
    heads, shared = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if isinstance(heads, int) and isinstance(shared, int) and (shared < 1 or heads % shared):
        raise EmlocError(
            f"{config_file}: {prefix}num_attention_heads is {heads}, not a multiple of num_key_value_heads, {shared}.",
            "Check the values in the file.",
        )


#: What was traced of a model: of emulators, by kind and ranks; of the base, by None for tuning, or by the stage.
_Traced = dict[tuple[str, frozenset[tuple[str, int]]] | str | None, Need]


@lru_cache(maxsize=8)  # a plan of a large model takes many traces, of seconds each
def _traced(*model: str) -> _Traced:  # noqa: ARG001
    """Return where to keep what is traced of a model, the same for a model that is planned again.

    Args:
        model: all that traces depend on: config, workload, shapes of inputs, family.
    """
    return {}


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return is_stack(model, path)
    return True
