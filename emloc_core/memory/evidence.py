"""Measured recovery of each kind of emulator, quoted by ``emloc plan``."""

from typing import NamedTuple


class Recovery(NamedTuple):
    """The share of what a LoRA on the base gains, in loss, that the base gains by a LoRA from an emulator.

    Attributes:
        corrected: after the correction ``auto``.
        polished: after 20 exact steps more.
        longer: how tuning for 960 steps instead of 60 changes ``corrected``, on two of the tasks; None: not measured.
        longer_polished: after those and 20 exact steps more, beside a LoRA on the base that took both.
        rounds: how many rounds that share the steps gave most.
        in_rounds: ``corrected`` after these, with the first seed.
    """

    corrected: float
    polished: float
    longer: float | None = None
    longer_polished: float | None = None
    rounds: int | None = None
    in_rounds: float | None = None


#: Means over three tasks of SmolLM2-135M-Instruct, by kind and by ratio, which is 0 where a kind has none; a test
#: compares ``benchmarks/results/quality.json``.
RECOVERY: dict[str, dict[float, Recovery]] = {
    "nf4": {0: Recovery(0.999, 1.001, 0.005)},
    "trellis": {0: Recovery(0.981, 0.995, 0.018, 0.995)},
    "low-rank-nf4": {0.39: Recovery(0.93, 0.985, -0.026, 0.975, 3, 0.963), 0.6: Recovery(0.964, 0.993)},
    "low-rank-2-bit": {0.54: Recovery(0.871, 0.981)},
}

#: Share of the loss from which exact steps are worth reading the model for.
_PAYS = 0.01


def measured(kind: str, ratio: float | None) -> Recovery | None:
    """Return what was measured of a kind at this ratio, or else at the next smaller one; None if nothing was."""
    recoveries = RECOVERY.get(kind, {})
    sizes = [size for size in recoveries if size <= (ratio or 0)]
    return recoveries[max(sizes)] if sizes else None


def exact_steps_pay(kind: str, ratio: float | None) -> bool:
    """Return whether a few exact steps after the correction gave the base more, or nobody measured it."""
    recovery = measured(kind, ratio)
    return recovery is None or recovery.polished - recovery.corrected >= _PAYS
