"""Memory of the stages that never hold a complete model, estimated by formula from shapes (``docs/memory.md``)."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from emloc_core.adapters.candidates import CANDIDATES
from emloc_core.algorithms.statistics import cheaper_side
from emloc_core.devices import is_accelerator
from emloc_core.emulator.needs import Needs, units
from emloc_core.emulator.ranks import LinearPlan, RankPlan, allocated
from emloc_core.emulator.sensitivity import RATIO
from emloc_core.exact.memory import lora_need, step_need
from emloc_core.memory.model import MemoryModel, Need
from emloc_core.model.blocks import block_paths
from emloc_core.model.inside import Positions
from emloc_core.model.overhead import overhead
from emloc_core.standins import Format

_WIDENED = 16 << 20  # bytes of a weight corrected in fp32 at a time
_MERGED = 2 << 20  # bytes of a weight merged at a time


def compress(model: MemoryModel, plan: RankPlan) -> Need:
    """Return what stage 1 needs at its peak: see :mod:`emloc_core.emulator.needs`.

    - weights: the unit that is loaded then, in the model's dtype: a block, or a module outside the blocks (the
      embedding, the output projection).
    - statistics: what fitting takes. With ranks shared out by spectra, a pass before fits factors at half
      of the parameters.
    - activations: the images and the hidden states of the samples, in the model's dtype; where errors are propagated
      twice, those of the base and of the emulator; and what one sample holds inside a block. From a GPU they move to
      the CPU's memory where they do not fit, so that one of them counts, unless experts are fitted.
    - stand-ins: where errors are propagated, the block's as rows pass through them; those of experts stay packed, but
      for some.

    Without calibration it is far less: one Linear at a time.
    """
    settings, method = model.method.settings, model.method
    propagated = settings.calibration == "propagated"
    waiting = 1 if is_accelerator(model.workload.device) and not plan.has_experts else settings.samples
    rows = model.step.waiting("calibration", waiting)

    def needs(plan: RankPlan, format: Format, *, propagated: bool) -> Iterator[Need]:
        arguments = (model.model, model.family, plan, format, model.dtype)
        for phase in Needs(*arguments, propagated=propagated, passing=passing):
            terms = {
                "weights": phase.weights,
                "activations": (1 + propagated) * rows * phase.waits + phase.inside,
                "statistics": phase.statistics,
                "stand-ins": phase.stand_ins,
                # Rows of many lengths need as many kernels as tuning.
                "overhead": model.overhead(tuning=True),
            }
            yield _need("compress", terms, phase.phase)

    def passing(path: str) -> Positions:
        row = model.step.positions(path)
        return Positions(settings.samples * row, row)

    phases = [*needs(plan, model.format, propagated=propagated)]
    if method.by_spectra:
        ranking = model.format.ranking()
        first = _ranked(method.linears.without_vocabulary(), ranking)
        phases += needs(first, ranking, propagated=False)
    return max(phases, key=lambda need: need.total)


def _ranked(plan: RankPlan, ranking: Format) -> RankPlan:
    """Return the plan of the pass before, in which activations are captured on the cheaper side."""

    def captured(linear: LinearPlan) -> LinearPlan:
        return replace(linear, tap=ranking.tap(cheaper_side(linear.out_features, linear.in_features)))

    plan = allocated(plan, RATIO)
    return replace(plan, linears=tuple(map(captured, plan.linears)))


def correct(model: MemoryModel, plan: RankPlan, clamp: float | str | None = "auto") -> Need:
    """Return what stage 3 needs, with ``--clamp auto`` or with a fixed clamp.

    - weights: a weight is corrected with what stands in for it, in the dtype of the base, and both are multiplied in
      fp32 some rows at a time. For ``auto`` the whole block is there, or a module outside the blocks.
    - adapter: the LoRA in fp32, as trained and for every clamp.
    - activations, for ``auto``: the images and the hidden states of the selection rows, once per candidate.
    - logits, for ``auto``: those of one row, in the model's dtype, in fp32 and normalised.
    """

    def emulated(linear: LinearPlan) -> int:
        return linear.stored(model.format) if linear.is_replaced else 0

    auto, itemsize, copies = clamp == "auto", model.dtype.itemsize, 2
    other: dict[str, int] = {}
    if auto:
        blocks, outside = units(model.model, block_paths(model.model, model.family))
        held = [numbers + max(map(emulated, plan.in_block(path)), default=0) for path, numbers in blocks.items()]
        weights, copies = max(outside, *held), 1 + len({candidate.clamp for candidate in CANDIDATES} - {0})
        waiting = len(CANDIDATES) * model.step.waiting("selection", model.method.settings.selection)
        other = {"activations": waiting, "logits": model.step.logits * (itemsize + 2 * 4)}
    else:
        weights = max(linear.numbers + emulated(linear) for linear in plan.linears)
    terms = {
        "weights": weights * itemsize + _WIDENED,
        "adapter": copies * 4 * model.adapter_parameters(),
        **other,
        "overhead": model.overhead(tuning=False),
    }
    return _need("correct", terms, "the largest block" if auto else "the largest Linear")


def merge(model: MemoryModel) -> Need:
    """Return what merging needs, in CPU memory: some rows of a weight, as read, in fp32 and as merged; and the LoRA."""
    rows = _MERGED * (2 + 4 // model.dtype.itemsize)
    terms = {"weights": rows, "adapter": 4 * model.adapter_parameters(), "overhead": overhead("cpu", tuning=False)}
    return Need("merge", terms, "a weight's rows")


def exact(model: MemoryModel, rows: int | None = None, at_once: int = 1) -> Need:
    """Return what exact steps need: see ``step_need``; the LoRA with its optimiser; and torch.

    What they keep at block boundaries moves from a GPU to the CPU's memory, where it does not fit.

    Args:
        rows: rows of an optimiser step; None: those of the workload.
        at_once: rows of a micro-batch.
    """
    rows = rows or model.workload.rows_per_step
    tokens, patches = (
        Positions(rows * count, at_once * count) for count in (model.step.row.tokens, model.step.row.patches)
    )
    need = step_need(model.stored, model.family, tokens, patches, model.dtype)
    boundaries = 0 if is_accelerator(model.workload.device) else need["boundaries"]
    terms = {
        "weights": need["weights"] + need["unpacked"],
        "adapter": lora_need(model.adapter_parameters()),
        "activations": boundaries + need["ends"] + need["activations"],
        "logits": need["logits"],
        "overhead": model.overhead(tuning=True),
    }
    return _need("exact steps", terms, "the largest block")


def _need(stage: str, terms: Mapping[str, int], phase: str) -> Need:
    """Return what a stage needs, without the terms that are 0."""
    return Need(stage, {term: need for term, need in terms.items() if need}, phase)
