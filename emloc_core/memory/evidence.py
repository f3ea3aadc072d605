"""What was measured of the kinds of emulator, for plans to say."""

from typing import NamedTuple


class Recovery(NamedTuple):
    """How much of what a LoRA on the base gains, an emulator's LoRA gives the base: shares of the loss.

    Attributes:
        corrected: after the correction ``auto``.
        polished: after 20 exact steps more.
    """

    corrected: float
    polished: float


#: Means over three tasks of SmolLM2-135M-Instruct, by kind; a test compares ``benchmarks/results/quality.json``.
RECOVERY = {
    "nf4": Recovery(0.999, 1.001),
    "2.7-bit": Recovery(0.96, 0.99),
    "1.6-bit": Recovery(0.88, 0.98),
}
