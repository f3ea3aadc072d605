"""The method, as functions of tensors. What plugin authors handle is importable from here."""

from emloc_core.algorithms.allocation import Spectrum
from emloc_core.algorithms.factorize import Factors
from emloc_core.algorithms.lora import Lora
from emloc_core.algorithms.statistics import Gram

__all__ = ["Factors", "Gram", "Lora", "Spectrum"]
