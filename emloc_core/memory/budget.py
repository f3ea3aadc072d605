"""Memory to tune in, the largest ratio whose tuning fits it, and what would fit where no way does."""

import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from emloc_core.errors import EmlocError
from emloc_core.settings import FREE
from emloc_core.units import human_bytes, parse_bytes

if TYPE_CHECKING:
    from emloc_core.memory.model import MemoryModel, Need

#: What stays free of a memory by default: this share of it, and at most so many bytes.
SHARE, MOST = 0.05, 1 << 30
_SHARE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")
#: Fewest tokens of a row that advice is given for.
_SHORTEST = 64


@dataclass(frozen=True)
class Budget:
    """Memory to tune in.

    Attributes:
        memory: bytes.
        headroom: bytes of it that stay free, since allocators fragment memory, and a plan is off by a few per cent.
        requested: whether the user named it; if not, it is what inference on the base needs.
    """

    memory: int
    headroom: int = 0
    requested: bool = True

    @classmethod
    def parse(cls, memory: str, headroom: str | None = None, device: str = "auto") -> "Budget":
        """Return the budget of a memory such as ``24GiB``, with a headroom such as ``2GiB``, ``8%`` or ``0``.

        The memory ``free`` is what is free of the device; that imports torch.

        Raises:
            EmlocError: one of them is not a size, the device has no free memory, or the headroom leaves nothing.
        """
        if memory == FREE:
            from emloc_core.model.device import free_memory

            size = free_memory(device)
            if not size:
                raise EmlocError("The device has no free memory.", "Stop whatever else uses it.", code="memory")
        else:
            size = parse_bytes(memory)
        free = min(int(SHARE * size), MOST) if headroom is None else _headroom(headroom, size)
        if free >= size:
            raise EmlocError(f"A headroom of {headroom} leaves nothing of {memory}.", "Give less headroom.")
        return cls(size, free)

    @classmethod
    def named(cls, memory: str | None, headroom: str | None = None, device: str = "auto") -> "Budget | None":
        """Return :meth:`parse`'s budget, or None where no memory is named.

        Raises:
            EmlocError: a headroom is named without a memory, or see there.
        """
        if memory is not None:
            return cls.parse(memory, headroom, device)
        if headroom is not None:
            raise EmlocError("A headroom is part of a memory size, but none is given.", "Give --memory, such as 24GiB.")
        return None

    @property
    def usable(self) -> int:
        """Bytes that may be used."""
        return self.memory - self.headroom

    def __str__(self) -> str:
        free = f", of which {human_bytes(self.headroom)} stay free" if self.headroom else ""
        return f"{human_bytes(self.memory)}{free}"


def _headroom(text: str, memory: int) -> int:
    if share := _SHARE.fullmatch(text):
        return int(float(share[1]) / 100 * memory)
    return 0 if text.strip() == "0" else parse_bytes(text)


@dataclass(frozen=True)
class Fit:
    """The chosen emulator.

    Attributes:
        ratio: the largest that fits, a multiple of 0.01, and at most the kind's largest.
    """

    ratio: float | None
    need: "Need"


def largest_ratio(model: "MemoryModel", budget: int) -> Fit | None:
    """Return the largest multiple of 0.01 whose tuning fits ``budget`` bytes, or None if not even the smallest fits.

    The memory for tuning grows with the ratio, mostly by the weights and never by less, and these are counted without
    tracing. So the first guess is close, and few steps are traced.
    """

    if (ratios := model.format.ratios) is None:
        plan = model.plan()
        return Fit(None, model.tuning(plan)) if model.fits(budget, plan) else None

    def weights(hundredths: int) -> int:
        return model.emulator_bytes(model.plan(hundredths / 100))

    fits, too_large = round(ratios.smallest * 100), 100
    if not model.fits(budget, model.plan(fits / 100)):
        return None
    while True:
        need = model.tuning(model.plan(fits / 100))
        room = budget - need.total
        guess = fits + bisect_right(range(fits + 1, too_large), weights(fits) + room, key=weights)
        if guess == fits:
            return Fit(fits / 100, need)
        if model.fits(budget, model.plan(guess / 100)):
            fits = guess
        else:
            too_large = guess


def advice(model: "MemoryModel", budget: int) -> Iterator[str]:
    """Yield lines that say what would fit where no emulator's tuning does; each is computed, not guessed.

    Args:
        model: with the kind of emulator that needs least, and one row at a time; or a base in four bits, of which
            there is none.
        budget: bytes.
    """

    def sized(ratio: float | None) -> str:
        return "" if ratio is None or model.packed else f" at {ratio:g}"

    def largest(shorter: "MemoryModel") -> Fit | None:
        if not model.packed:
            return largest_ratio(shorter, budget)
        need = shorter.tuning()
        return Fit(1, need) if need.total <= budget else None

    ratio, rows = model.smallest_ratio, model.workload.batch_size
    smallest = model.tuning(None if model.packed else model.plan(ratio)).total
    subject = "a LoRA on the model" if model.packed else f"the smallest emulator ({model.format.name}{sized(ratio)})"
    yield f"tuning {subject} on {rows} x {model.workload.length} tokens needs {human_bytes(smallest)}"
    length, shortest = model.workload.length, max(_SHORTEST, model.least_length())
    while length > shortest:
        length = max(shortest, length // 2)
        if fit := largest(model.with_workload(replace(model.workload, length=length))):
            yield f"{rows} x {length} tokens fits{sized(fit.ratio)} ({human_bytes(fit.need.total)})"
            return
    yield f"no length fits: even {rows} x {length} tokens needs more, so it takes more memory or a smaller model"
