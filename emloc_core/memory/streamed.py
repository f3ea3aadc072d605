"""Memory of the stages that never hold a complete model, estimated by formula from shapes (``docs/memory.md``)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from emloc_core.adapters.candidates import CANDIDATES
from emloc_core.algorithms.statistics import cheaper_side
from emloc_core.emulator.ranks import TOKENS_AT_ONCE, ExpertsPlan, LinearPlan, RankPlan
from emloc_core.emulator.sensitivity import RATIO
from emloc_core.exact.memory import Positions, lora_need, step_need
from emloc_core.memory.model import MemoryModel, Need
from emloc_core.model.blocks import block_paths
from emloc_core.model.overhead import overhead
from emloc_core.standins.experts import experts_per_token
from emloc_core.standins.format import Phase
from emloc_core.standins.layer import unpacked_bytes

_WIDENED = 16 << 20  # bytes of a weight corrected in fp32 at a time
_MERGED = 2 << 20  # bytes of a weight merged at a time


def compress(model: MemoryModel, plan: RankPlan) -> Need:
    """Return what stage 1 needs where it needs most: as the Linears of a block are fitted or refined, or its experts.

    - weights: the largest unit loaded at a time, in the model's dtype: a block, or a module outside the blocks (the
      embedding, the output projection).
    - statistics: what fitting or refining takes; see :func:`_phases` and :func:`_fitting_experts`.
    - activations: the images and the hidden states of the samples, in the model's dtype; where errors are propagated
      twice, those of the base and of the emulator. Inside a block, samples have as much that is not in the file. From a
      GPU they move to the CPU's memory where they do not fit, so that one of them counts, unless experts are fitted.
    - stand-ins: where errors are propagated, the block's as rows pass through them; those of experts stay packed, but
      for some.

    Without calibration it is far less: one Linear at a time.
    """
    settings, itemsize = model.method.settings, model.dtype.itemsize
    propagated = settings.calibration == "propagated"
    blocks, outside = _units(model)
    linears = {path: plan.in_block(path) for path in blocks}
    layers = [stacks for path in blocks for stacks in plan.experts_in_block(path).values()]
    waiting = 1 if model.workload.device == "cuda" and not layers else settings.samples
    always = {
        "weights": max(outside, *blocks.values()) * itemsize,
        "activations": (1 + propagated) * model.step.waiting("calibration", waiting),
        # Rows of many lengths need as many kernels as tuning.
        "overhead": overhead(model.workload.device, tuning=True),
    }

    def need(statistics: int, standins: int, phase: str = "the largest block") -> Need:
        return _need("compress", always | {"statistics": statistics, "stand-ins": propagated * standins}, phase)

    experts = {path: _packed_experts(model, plan, path) for path in blocks}
    of_blocks = [_phases(model, of) for of in linears.values()]
    needs = [
        need(
            max(each.statistics for each in phase),
            max(each.stand_ins + packed for each, packed in zip(phase, experts.values(), strict=True)),
        )
        for phase in zip(*of_blocks, strict=True)
    ]
    if layers:
        read = max(of[-1].stand_ins for of in of_blocks)
        needs.append(need(max(_fitting_experts(model, of) for of in layers), read, "the experts of a layer"))
    return max(needs, key=lambda need: need.total)


def _phases(model: MemoryModel, linears: Sequence[LinearPlan]) -> list[Phase]:
    """Return what fitting the Linears of a block takes, and refining them, by the format.

    With ranks shared out by spectra, fitting takes at least what the pass before does: fitting factors, and the block's
    at half of the parameters, fp32.
    """
    settings, itemsize = model.method.settings, model.dtype.itemsize
    propagated = settings.calibration == "propagated"
    fitting, *others = model.format.phases(linears, itemsize, propagated=propagated, refine=settings.refine > 0)
    if model.method.by_spectra:
        fitting = fitting._replace(statistics=max(fitting.statistics, _ranking(model, linears)))
    return [fitting, *others]


def _units(model: MemoryModel) -> tuple[dict[str, int], int]:
    """Return how many numbers the blocks have, by path, and the largest matrix outside them."""
    blocks = {
        path: sum(parameter.numel() for parameter in model.model.get_submodule(path).parameters())
        for path in block_paths(model.model, model.family)
    }
    outside = [each.numel() for name, each in model.model.named_parameters() if not name.startswith(tuple(blocks))]
    return blocks, max(outside, default=0)


def _fitting_experts(model: MemoryModel, stacks: Sequence[ExpertsPlan]) -> int:
    """Return the peak of fitting a layer's experts: all of them packed, one being fitted, and the tokens of some.

    Tokens are read for as many experts as :data:`TOKENS_AT_ONCE` allows, for one at least, as the base has them; where
    errors are propagated as the emulator has them; as many are sent to every expert. What its first matrix makes of
    them is there while the second is fitted. For every token of the layer there are 8 bytes for each of its experts,
    three times: by row, of all rows, and by expert.
    """
    settings, itemsize = model.method.settings, model.dtype.itemsize
    streams, top = 1 + (settings.calibration == "propagated"), experts_per_token(model.config)
    hidden = max(each.out_features if each.name == "down_proj" else each.in_features for each in stacks)
    tokens = top * settings.samples * model.step.positions(stacks[0].path)
    sent = streams * tokens * itemsize
    of_one = -(-sent // stacks[0].experts)

    def fitting(stack: ExpertsPlan) -> int:
        alone = [replace(stack, experts=1)]
        inner = 4 * stack.in_features * of_one if stack.name == "down_proj" else 0
        return inner + model.format.fitting_bytes(alone, propagated=streams > 1, itemsize=itemsize)

    read = min(sent, max(TOKENS_AT_ONCE // hidden, of_one)) * hidden
    packed = sum(each.nbytes(model.format, model.dtype) for each in stacks)
    return packed + max(map(fitting, stacks)) + read + 3 * 8 * tokens


def _packed_experts(model: MemoryModel, plan: RankPlan, block: str) -> int:
    """Return the bytes of a block's experts as rows pass through them: packed, and some of them unpacked."""
    stacks = [each for of in plan.experts_in_block(block).values() for each in of]
    unpacked = [unpacked_bytes(each.shape, each.experts, model.dtype) for each in stacks]
    return sum(each.nbytes(model.format, model.dtype) for each in stacks) + max(unpacked, default=0)


def _ranking(model: MemoryModel, linears: Sequence[LinearPlan]) -> int:
    # Factors are held until sensitivities are measured.
    held = int(4 * RATIO * sum(linear.numbers for linear in linears))
    ranking, itemsize = model.format.ranking(), model.dtype.itemsize
    captured = [
        replace(each, tap=ranking.tap(cheaper_side(each.out_features, each.in_features)))
        if isinstance(each.tap, str)
        else each
        for each in linears
    ]
    return ranking.fitting_bytes(captured, propagated=False, itemsize=itemsize) + held


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
        blocks, outside = _units(model)
        held = [numbers + max(map(emulated, plan.in_block(path)), default=0) for path, numbers in blocks.items()]
        weights, copies = max(outside, *held), 1 + len({candidate.clamp for candidate in CANDIDATES} - {0})
        waiting = len(CANDIDATES) * model.step.waiting("selection", model.method.settings.selection)
        other = {"activations": waiting, "logits": model.step.logits * (itemsize + 2 * 4)}
    else:
        weights = max(each.numbers + emulated(each) for each in plan.linears)
    terms = {
        "weights": weights * itemsize + _WIDENED,
        "adapter": copies * 4 * model.adapter_parameters(),
        **other,
        "overhead": overhead(model.workload.device, tuning=False),
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
        model: the model's memory.
        rows: rows of an optimiser step; None: those of the workload.
        at_once: rows of a micro-batch.
    """
    rows, device = rows or model.workload.rows_per_step, model.workload.device
    tokens, patches = (
        Positions(rows * each, at_once * each) for each in (model.step.row.tokens, model.step.row.patches)
    )
    need = step_need(model.stored, model.family, tokens, patches, model.dtype)
    boundaries = 0 if device == "cuda" else need["boundaries"]
    terms = {
        "weights": need["weights"] + need["unpacked"],
        "adapter": lora_need(model.adapter_parameters()),
        "activations": boundaries + need["ends"] + need["activations"],
        "logits": need["logits"],
        "overhead": overhead(device, tuning=True),
    }
    return _need("exact steps", terms, "the largest block")


def _need(stage: str, terms: Mapping[str, int], phase: str) -> Need:
    """Return what a stage needs, without the terms that are 0."""
    return Need(stage, {term: need for term, need in terms.items() if need}, phase)
