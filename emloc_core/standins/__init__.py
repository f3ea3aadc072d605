"""What stands in for the weights of a base in its emulator: a module for each format, and what all formats share.

A format decides what is kept of a Linear's weight, how that is fitted, stored and read back, in which layer it
computes, how many bytes it takes, and what fitting needs. Everything else (streaming, resuming, training, correction,
merging) is the same for all formats. Users choose one by its name, as the *kind* of the emulator.
"""

from emloc_core.standins.format import Format, Ratios
from emloc_core.standins.layer import PackedLinear, StandInLinear
from emloc_core.standins.low_rank import LowRank
from emloc_core.standins.low_rank_nf4 import FourBitLowRank
from emloc_core.standins.low_rank_two_bits import TwoBitLowRank
from emloc_core.standins.nf4 import NF4
from emloc_core.standins.standin import Packed, StandIn
from emloc_core.standins.trellis import Trellis

__all__ = [
    "NF4",
    "RECOMMENDED",
    "RECOMMENDED_WITH_IMAGES",
    "Format",
    "FourBitLowRank",
    "LowRank",
    "Packed",
    "PackedLinear",
    "Ratios",
    "StandIn",
    "StandInLinear",
    "Trellis",
    "TwoBitLowRank",
]

#: Kinds in the order in which they are recommended, the first whose tuning fits: ``docs/evidence.md`` says why.
RECOMMENDED = ("nf4", "trellis", "low-rank-nf4", "low-rank-2-bit", "low-rank")
#: The same for rows with images, where factors are ahead of a trellis code.
RECOMMENDED_WITH_IMAGES = tuple(kind for kind in RECOMMENDED if kind != "trellis")
