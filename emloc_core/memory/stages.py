"""Memory of the stages that never hold a complete model, estimated by formula from shapes (``docs/memory.md``)."""

from collections import Counter
from collections.abc import Sequence
from math import prod
from typing import Any

from emloc_core.adapters.candidates import CANDIDATES
from emloc_core.emulator.ranks import LinearPlan, RankPlan
from emloc_core.emulator.sensitivity import RATIO
from emloc_core.exact.need import Positions, linears_in, lora_need, step_need
from emloc_core.memory.arithmetic import positions
from emloc_core.memory.model import MemoryModel, Need
from emloc_core.model.blocks import block_paths
from emloc_core.model.overhead import overhead

_WIDENED = 16 << 20  # bytes of a weight corrected in fp32 at a time
_MERGED = 2 << 20  # bytes of a weight merged at a time


def compress(model: MemoryModel, plan: RankPlan) -> Need:
    """Return what stage 1 needs: one block, its statistics, one factorisation, and the samples.

    - weights: the largest unit loaded at a time, in the model's dtype: a block, or a module outside the blocks (the
      embedding, the output projection).
    - statistics: the Grams of the block's input groups and outputs, fp32, ``4 s^2`` each, with s the side; and the
      largest factorisation, in fp64: ``8 (4 s^2 + 3 m n)`` bytes for the Gram, the eigenvectors and
      LAPACK's workspace (``dsyevd``: ``2 s^2``), and for the weight, its image and the factors.
    - activations: the images and the hidden states of the samples, in the model's dtype.
    - where errors are propagated: in place of the block's Grams one input group's, its Cholesky factor and what its
      Linears' targets need, ``4 n (2 n + min(n, m))``, with m the outputs of all of them; and twice the hidden states,
      those of the base and of the emulator; a third time for refinement, as the base's block passes them on.
    - where a weight is rounded with feedback, in place of all that (beside factors, if that is more): its inputs' Gram,
      which massive tokens widen to fp64, in fp32, and its factor, ``4 * 4 n^2``, beside factors one more; and of all
      weights of the group the weight, what is left of it, and what it becomes, ``4 * 4 m n``.
    - where ranks are shared out by spectra, at least what the pass before needs: statistics as without propagation,
      and the block's factors, fp32, at half of the parameters.
      Where factors stand for a rounding error, what rounding needs, too.
    - where factors are refined, at least what that needs for a block's: fp32, as they are, moved, with a gradient and
      Adam's moments; and multiplied out in the model's dtype, with a gradient.
    - stand-ins: where these are weights and not factors alone, the block's in fp32, beside an identity, and for
      refinement three times in the model's dtype: as they are, and unpacked, with a gradient.

    Without calibration it is far less: one Linear at a time.
    """
    weight = model.dtype.itemsize
    blocks, outside = _units(model)
    settings = model.method.settings
    propagated = settings.calibration == "propagated"
    needs = []
    if model.kind.has_factors:
        needs += [_statistics(plan, block, weight, propagated) for block in blocks]
    if model.kind.keeps_weight:
        needs += [_rounding(plan.in_block(block), model.kind.has_factors) for block in blocks]
    statistics = max(needs, default=0)
    if model.method.by_spectra:
        repaired = model.kind.has_factors and model.kind.keeps_weight
        statistics = max(statistics, *(_decomposition(plan, block, weight, repaired) for block in blocks))
    if settings.refine and not model.kind.keeps_weight:
        statistics = max(statistics, *(_refinement(plan, block, weight) for block in blocks))
    terms = {
        "weights": max(outside, *blocks.values()) * weight,
        "statistics": statistics,
        "activations": (1 + propagated + bool(settings.refine)) * settings.samples * _waiting(model),
        "overhead": overhead(model.workload.device, tuning=False),
    }
    if not model.kind.has_factors or (propagated and model.kind.keeps_weight):
        terms["stand-ins"] = max(_whole(plan, block, weight) for block in blocks)
    return Need("compress", terms, "the largest block")


def _units(model: MemoryModel) -> tuple[dict[str, int], int]:
    """Return how many numbers the blocks have, by path, and the largest matrix outside them."""
    blocks = {
        path: sum(parameter.numel() for parameter in model.model.get_submodule(path).parameters())
        for path in block_paths(model.model, model.family)
    }
    outside = [each.numel() for name, each in model.model.named_parameters() if not name.startswith(tuple(blocks))]
    return blocks, max(outside, default=0)


def _waiting(model: MemoryModel) -> int:
    """Return the bytes of a row that waits at a block: its images, and hidden states where a tower has most."""
    blocks = [f"{path}.0" for path in model.towers]
    hidden = [positions(model, block) * linears_in(model.model.get_submodule(block))[0].in_features for block in blocks]
    pixels = model.workload.images * prod(model.image.pixels) if model.image else 0
    return (pixels + max(hidden)) * model.dtype.itemsize


def _whole(plan: RankPlan, block: str, itemsize: int) -> int:
    shapes = [(linear.out_features, linear.in_features) for linear in plan.in_block(block)]
    return sum((4 + itemsize) * (m * n + min(m, n) ** 2) + 2 * itemsize * m * n for m, n in shapes)


def _rounding(linears: Sequence[LinearPlan], factors: bool) -> int:
    groups = _outputs(linears).items()
    return max((4 * ((4 + factors) * n**2 + 4 * m * n) for (_, n), m in groups), default=0)


def _statistics(plan: RankPlan, block: str, itemsize: int, propagated: bool) -> int:
    experts = [each for stacks in plan.experts_in_block(block).values() for each in stacks]
    grams: dict[Any, int] = {}
    work = 0
    for each in (*plan.in_block(block), *experts):
        m, n = each.out_features, each.in_features
        side = m if each.tap == "output" else n
        shares = each.matrices == 1 and each.tap != "output"  # the Gram of its inputs, with its group
        grams[each.group if shares else each.path] = 4 * each.matrices * side**2
        work = max(work, 8 * (4 * side**2 + 3 * m * n))
    # The factors of a block's experts are held until all are there, and written together.
    held = sum(each.stored() for each in experts) * itemsize
    return work + held + (_largest_group(plan.in_block(block)) if propagated else sum(grams.values()))


def _decomposition(plan: RankPlan, block: str, itemsize: int, repaired: bool) -> int:
    # Factors are held until sensitivities are measured.
    linears = plan.in_block(block)
    held = int(4 * RATIO * sum(linear.numbers for linear in linears))
    rounding = _rounding(linears, factors=True) if repaired else 0
    return _statistics(plan, block, itemsize, propagated=False) + held + rounding


def _refinement(plan: RankPlan, block: str, itemsize: int) -> int:
    linears = plan.in_block(block)
    factors = sum((linear.rank or 0) * (linear.out_features + linear.in_features) for linear in linears)
    return (6 * 4 + itemsize) * factors + 2 * itemsize * sum(linear.numbers for linear in linears)


def _largest_group(linears: Sequence[LinearPlan]) -> int:
    return max((4 * n * (2 * n + min(n, m)) for (_, n), m in _outputs(linears).items()), default=0)


def _outputs(linears: Sequence[LinearPlan]) -> Counter[tuple[tuple[str, ...], int]]:
    """Return how many outputs the Linears of every input group have, by the group and its inputs."""
    outputs: Counter[tuple[tuple[str, ...], int]] = Counter()
    for linear in linears:
        outputs[linear.group, linear.in_features] += linear.out_features
    return outputs


def correct(model: MemoryModel, plan: RankPlan, clamp: float | str | None = "auto") -> Need:
    """Return what stage 3 needs, with ``--clamp auto`` or with a fixed clamp.

    - weights: a weight is corrected with its factors, ``d (m n + k (m + n))`` bytes, and multiplied in fp32 some rows
      at a time. A weight that the emulator keeps, rounded, is factors too: itself and the identity. For ``auto`` the
      whole block is there, or a module outside the blocks.
    - adapter: the LoRA in fp32, as trained and for every clamp.
    - activations, for ``auto``: the images and the hidden states of the selection rows, once per candidate.
    - logits, for ``auto``: those of one row, in the model's dtype, in fp32 and normalised.
    """

    def factors(linear: LinearPlan) -> int:
        m, n, rank = linear.out_features, linear.in_features, linear.rank or 0
        inner = (rank if model.kind.has_factors else 0) + (min(m, n) if rank and model.kind.keeps_weight else 0)
        return inner * (m + n)

    auto, itemsize, copies = clamp == "auto", model.dtype.itemsize, 2
    other: dict[str, int] = {}
    if auto:
        blocks, outside = _units(model)
        held = [numbers + max(map(factors, plan.in_block(path)), default=0) for path, numbers in blocks.items()]
        weights, copies = max(outside, *held), 1 + len({candidate.clamp for candidate in CANDIDATES} - {0})
        logits = model.workload.length * model.config.get_text_config().vocab_size
        waiting = model.method.settings.selection * len(CANDIDATES) * _waiting(model)
        other = {"activations": waiting, "logits": logits * (itemsize + 2 * 4)}
    else:
        weights = max(each.out_features * each.in_features + factors(each) for each in plan.linears)
    terms = {
        "weights": weights * itemsize + _WIDENED,
        "adapter": copies * 4 * model.adapter_parameters(),
        **other,
        "overhead": overhead(model.workload.device, tuning=False),
    }
    return Need("correct", terms, "the largest block" if auto else "the largest Linear")


def merge(model: MemoryModel) -> Need:
    """Return what merging needs, in CPU memory: some rows of a weight, as read, in fp32 and as merged; and the LoRA."""
    rows = _MERGED * (2 + 4 // model.dtype.itemsize)
    terms = {"weights": rows, "adapter": 4 * model.adapter_parameters(), "overhead": overhead("cpu", tuning=False)}
    return Need("merge", terms, "a weight's rows")


def exact(model: MemoryModel, rows: int | None = None) -> Need:
    """Return what exact steps need, one row at a time: see ``step_need``; the LoRA with its optimiser; and torch.

    What they keep at block boundaries moves from a GPU to the CPU's memory, where it does not fit.

    Args:
        model: the model's memory.
        rows: rows of an optimiser step; None: those of the workload.
    """
    rows, device = rows or model.workload.rows_per_step, model.workload.device
    tokens, patches = model.workload.length, model.workload.images * model.image.patches if model.image else 0
    need = step_need(
        model.stored, model.family, Positions(rows * tokens, tokens), Positions(rows * patches, patches), model.dtype
    )
    boundaries = 0 if device == "cuda" else need["boundaries"]
    terms = {
        "weights": need["weights"] + need["unpacked"],
        "adapter": lora_need(model.adapter_parameters()),
        "activations": boundaries + need["ends"] + need["activations"],
        "logits": need["logits"],
        "overhead": overhead(device, tuning=True),
    }
    return Need("exact steps", terms, "the largest block")
