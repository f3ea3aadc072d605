"""Weights in a trellis code: fewer than three bits a number."""

from collections.abc import Sequence

import torch
from torch import nn

from emloc_core.algorithms import feedback, native, trellis
from emloc_core.algorithms.factorize import output_error
from emloc_core.algorithms.scales import GROUP, lookup, spread
from emloc_core.algorithms.statistics import Gram
from emloc_core.algorithms.trellis import COUNT, ENDS, SEGMENT, STATE_BITS, values
from emloc_core.errors import EmlocError
from emloc_core.settings import CompressSettings
from emloc_core.standins import costs
from emloc_core.standins.costs import Planned
from emloc_core.standins.format import Format
from emloc_core.standins.layer import PackedLinear, Parts
from emloc_core.standins.standin import Packed
from emloc_core.standins.unpacking import is_compiled


class TrellisLinear(PackedLinear):
    """``y = W x + b`` with the weight in a trellis code: ``weight`` is its bytes, beside the scales."""

    weight_scales: nn.Parameter

    @classmethod
    def parts(cls, shape: tuple[int, int], rank: int | None, dtype: torch.dtype) -> Parts:
        """Return codes and scales."""
        values()  # there already where a pass is traced without contents
        m, n = shape
        return {
            "weight": ((-(-m // COUNT), n), torch.uint8),
            "weight_scales": ((m, -(-n // GROUP)), torch.bfloat16),
        }

    @classmethod
    def unpack(cls, *parts: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """Return the weight, or a stack of them."""
        codes, scales = parts
        if is_compiled(codes, scales, dtype):
            return unpack_trellis(codes.contiguous(), scales.contiguous(), dtype, *shape)
        return _by_torch(codes, scales, dtype, *shape)

    unpack_stack = unpack  # all at once


class Trellis(Format):
    """Weights in a trellis code, rounded with feedback, and seen as rounded by what is fitted after them."""

    name = "trellis"
    layer = TrellisLinear
    samples = 256
    experts = True
    narrow = True

    @property
    def is_available(self) -> bool:
        """Whether there is a C compiler."""
        return native.compiler() is not None

    def check(self, settings: CompressSettings) -> None:
        """Refuse to look for codes where nothing is there to compile what does so.

        Raises:
            EmlocError: names the remedy.
        """
        super().check(settings)
        if not native.library(native.TRELLIS):
            raise EmlocError(
                f"An emulator of the kind {self.name!r} is made by C code, which cannot be compiled here.",
                "Install gcc or clang, or name another C compiler in CC: after `pip install ziglang`, "
                "CC='python -m ziglang cc' is one. Or choose another --kind.",
                code="unavailable",
            )

    def fit(self, weights: Sequence[torch.Tensor], gram: Gram, ranks: Sequence[int | None]) -> list[Packed]:
        """Round weights with feedback."""
        damped, matrix, fitted = feedback.damped(gram, feedback.MORE_DAMPING), feedback.single(gram), []
        for weight in weights:
            coded = trellis.rounded(weight, damped)
            error = output_error(weight, coded.numbers(), matrix)
            parts = {"weight": coded.codes(), "weight_scales": coded.scales}
            fitted.append(Packed(parts, (weight.shape[0], weight.shape[1]), error))
        return fitted

    def fitting_bytes(self, linears: Sequence[Planned], *, propagated: bool, itemsize: int) -> int:
        """The peak of rounding, with scales that are fitted."""
        return costs.rounding_bytes(linears, scales=True)

    def describe(self, rank: str) -> str:
        """The numbers that share a byte."""
        return f"a trellis code of {8 / COUNT:.1f} bits"


@torch.library.custom_op("emloc::unpack_trellis", mutates_args=())
def unpack_trellis(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, m: int, n: int) -> torch.Tensor:
    """Unpack in one pass what is contiguous: a matrix, (m, n), or a stack of them."""
    if feedback.takes_triton(codes.device):
        from emloc_core.standins import kernels

        return kernels.unpack_trellis(codes, scales, dtype, m, n)
    if native.library(native.UNPACKING):
        return native.unpack_trellis(codes, scales, values(), m, n, GROUP, dtype)
    return _by_torch(codes, scales, dtype, m, n)


@unpack_trellis.register_fake
def _(codes: torch.Tensor, _scales: torch.Tensor, dtype: torch.dtype, m: int, n: int) -> torch.Tensor:
    return codes.new_empty(*codes.shape[:-2], m, n, dtype=dtype)


def _by_torch(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, m: int, n: int) -> torch.Tensor:
    seen, before = codes.int(), codes.int()
    of_segment = torch.arange(codes.shape[-2], device=codes.device) % (SEGMENT // COUNT)
    for step in (1, 2):  # the two bytes before, of which there are none where a segment begins
        before = before.roll(1, -2)
        seen = seen | (before * (of_segment >= step)[:, None]) << 8 * step
    states = torch.stack([seen >> 8 - end & (1 << STATE_BITS) - 1 for end in ENDS], -2)
    table = values().to(codes.device, dtype, non_blocking=True)
    numbers = lookup(table, states.flatten(-3, -2)[..., :m, :])
    return numbers * spread(scales.to(dtype), n)
