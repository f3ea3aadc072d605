"""Kinds of emulator: what replaces a Linear's weight, in files and in a model.

A kind decides how a Linear's stand-in is stored and read back, what transformers is told so that it loads it, and how
many bytes it takes. Everything else (streaming, resuming, training, correction, merging) is the same for all kinds.
"""

from emloc_core.kinds.factors import FourBitLowRank, LowRank
from emloc_core.kinds.kind import Factorize, Fit, Kind, Movable, Pair
from emloc_core.kinds.levels import FewLevels, SixLevels
from emloc_core.kinds.nf4 import NF4
from emloc_core.kinds.repair import RepairedThreeLevels

__all__ = [
    "NF4",
    "RECOMMENDED",
    "RECOMMENDED_WITH_IMAGES",
    "Factorize",
    "FewLevels",
    "Fit",
    "FourBitLowRank",
    "Kind",
    "LowRank",
    "Movable",
    "Pair",
    "RepairedThreeLevels",
    "SixLevels",
]

#: Kinds in the order in which they are recommended, the first whose tuning fits: ``docs/evidence.md`` says why. The
#: last is for models whose weights are mostly experts.
RECOMMENDED = ("nf4", "1.6-bit+repair", "low-rank-nf4", "low-rank")
#: The same for rows with images, where factors alone are ahead of weights on three levels with a repair.
RECOMMENDED_WITH_IMAGES = tuple(kind for kind in RECOMMENDED if kind != "1.6-bit+repair")
