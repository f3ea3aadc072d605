"""What an emulator is made with where the user does not say: that depends on the kind, and on the model.

Stacks of experts become smaller on the base's activations alone, and spectra that are kept for other ratios are those
of the base's activations.
"""

from typing import Literal

from emloc_core.emulator.ranks import RankPlan
from emloc_core.errors import EmlocError
from emloc_core.kinds import Kind
from emloc_core.settings import CompressSettings

#: The allocator of the paper.
UNIFORM = "uniform"


class CompletedSettings(CompressSettings):
    """How an emulator is made, with nothing left open."""

    calibration: Literal["none", "base", "propagated"]
    allocator: str
    refine: int


def completed(
    settings: CompressSettings, kind: Kind, linears: RankPlan, *, keeps_spectra: bool = False
) -> CompletedSettings:
    """Return the settings with calibration, rank allocator and passes of refinement as they will be.

    Args:
        settings: what the user says.
        kind: of the emulator.
        linears: the Linears and experts of the model that this kind makes smaller.
        keeps_spectra: whether spectra are kept.

    Raises:
        EmlocError: stand-ins are to be refined that are not fitted to what the emulator computes.
    """
    usual = "base" if keeps_spectra or linears.has_experts else kind.calibration
    calibration = settings.calibration or usual
    if settings.refine and calibration != "propagated":
        raise EmlocError(
            "Refinement needs the inputs that a block has in the emulator.",
            "Leave out --refine, or give --calibration propagated.",
        )
    refine = kind.refine if settings.refine is None and calibration == "propagated" else settings.refine
    allocator = settings.allocator or (kind.allocator if calibration == "propagated" else UNIFORM)
    found = {"calibration": calibration, "allocator": allocator, "refine": refine or 0}
    return CompletedSettings(**settings.model_dump() | found)
