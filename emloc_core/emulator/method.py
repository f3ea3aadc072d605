"""Fills in the settings that the user left open, by the kind of emulator and by the model."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from emloc_core.algorithms.allocation import Spectrum
from emloc_core.emulator.ranks import NO_EXPERTS, LinearPlan, RankPlan, allocated
from emloc_core.settings import SAMPLES, Allocator, CompressSettings
from emloc_core.standins import Format

#: The allocator of the paper.
UNIFORM: Allocator = "uniform"
#: Share of the rows that kinds with more calibration rows than others may take; the rest is tuned on.
_SHARE = 0.25


class CompletedSettings(CompressSettings):
    """Settings that leave nothing open; a kind that has no ratio has none here either."""

    samples: int
    calibration: Literal["none", "base", "propagated"]
    allocator: Allocator


@dataclass(frozen=True)
class Method:
    """How the emulator of a model is made.

    Attributes:
        linears: the Linears and experts of the model, without ranks; unsupported ones are dense.
    """

    format: Format
    settings: CompletedSettings
    linears: RankPlan

    @property
    def by_spectra(self) -> bool:
        """Whether a first pass decomposes the model, since ranks are known only then."""
        return self.format.ratios is not None and self.settings.allocator == "global"

    def plan(
        self, ratio: float | None = None, spectra: tuple[RankPlan, Callable[[LinearPlan], Spectrum]] | None = None
    ) -> RankPlan:
        """Return what gets a stand-in, with ranks where the format has any.

        Args:
            ratio: instead of the settings' ratio.
            spectra: the Linears that have one, and what returns it; None: ranks are those of ``uniform``, which has the
                same budget.

        Raises:
            EmlocError: at this ratio nothing becomes smaller.
        """
        if self.format.ratios is None:
            return self.linears
        ratio = ratio or self.settings.ratio
        if spectra:
            return allocated(spectra[0], ratio, spectra[1])
        return allocated(self.linears, ratio)


def method_of(
    settings: CompressSettings, format: Format, linears: RankPlan, model: nn.Module, *, rows: int | None = None
) -> Method:
    """Return how an emulator is made.

    Args:
        linears: the Linears and experts of the model that this format makes smaller.
        model: it, or its outline.
        rows: number of distinct rows; None: there are enough.
    """
    linears = linears.without_vocabulary() if settings.keep else linears
    more = linears.has_experts or linears.vocabulary
    format = format if format.holds(model) and not more else format.own()
    calibration = settings.calibration or format.calibrations[0]
    shared_out = calibration == "propagated" and not linears.has_experts
    allocator = settings.allocator or (format.allocator if shared_out else UNIFORM)
    samples = settings.samples or usual_samples(format, rows)
    ratio = settings.ratio or (format.ratios.default if format.ratios else None)
    values = {
        "ratio": ratio,
        "samples": samples,
        "selection": _selection(settings, rows),
        "calibration": calibration,
        "allocator": allocator,
    }
    completed = CompletedSettings(**settings.model_dump() | values)
    method = Method(format, completed, linears)
    if method.by_spectra:
        return replace(method, linears=linears.without_experts(NO_EXPERTS))
    return method


def usual_samples(format: Format, rows: int | None = None) -> int:
    """Return how many of so many distinct rows (None: enough) a format is calibrated on, unless the user says."""
    if rows is None:
        return format.samples
    return min(format.samples, max(SAMPLES, int(_SHARE * rows)), max(1, rows // 3))  # the others are trained on


def _selection(settings: CompressSettings, rows: int | None) -> int:
    """Return how many rows are held out: of few, at most a sixth, where the user does not say."""
    if rows is None or "selection" in settings.model_fields_set:
        return settings.selection
    return min(settings.selection, max(1, rows // 6))
