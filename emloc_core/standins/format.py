"""The contract that every format of emulator fulfils."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import nn

from emloc_core.algorithms.factorize import Factors, factorize
from emloc_core.algorithms.statistics import Gram
from emloc_core.errors import EmlocError
from emloc_core.settings import SAMPLES, Allocator, CompressSettings
from emloc_core.standins.layer import StandInLinear, layer_bytes, replace_linear

#: The ``quant_method`` of an emulator.
METHOD = "emloc"
#: Field of an emulator's config.json with its kind, by which one in four bits differs from a base that is.
MARK = "emloc_kind"

#: U (m, k) and V (k, n) with U V the matrix that a Linear of the emulator multiplies by.
Pair = tuple[torch.Tensor, torch.Tensor]
Factorize = Callable[[torch.Tensor, Gram, int], Factors]
#: Takes weights, the Gram of the inputs that all of them have, or of the outputs of a single one, and their ranks.
Fit = Callable[[Sequence[torch.Tensor], Gram, Sequence[int]], list[Any]]
#: Settings that only kinds of more than one size know.
_OF_RATIO = ("ratio", "allocator")


class Movable(Protocol):
    """A stand-in of which some numbers may still move when those of the whole block are known.

    Attributes:
        numbers: of any shape, in fp32, of such a size that a step of a hundredth is small.
    """

    numbers: nn.Parameter

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Return what the Linear multiplies by, (m, n), as it will be read, with a gradient for the numbers."""

    def settled(self) -> Factors:
        """Return the stand-in with the numbers as they are now."""


class Format(ABC):
    """How an emulator keeps what stands in for a weight. Users choose it as the kind of the emulator.

    Attributes:
        name: of the format; that of the kind for users.
        layer: what stands in for a Linear in a model.
        factorize: gives the factors of a weight, where there are any.
        taps_inputs: whether factors are fitted to the Gram of the inputs, even where that of the outputs is smaller.
        has_factors: whether a Linear becomes factors of some rank, alone or beside its weight. If not, the kind has one
            size, and the settings of sizes mean nothing.
        keeps_weight: whether a Linear keeps its weight, rounded: alone, or beside its factors.
        ratio: the size where the user does not say.
        smallest_ratio, largest_ratio: those that are looked for; above the largest hardly anything is saved.
        has_experts: whether fused experts become factors too; otherwise they stay dense.
        calibration: what stand-ins are fitted to where the user does not say.
        allocator: name of the rank allocator where the user does not say and errors are propagated; otherwise it is
            ``uniform``.
        samples: number of calibration rows where the user does not say, and has enough; :data:`SAMPLES` or more.
        needs_rows: whether stand-ins are always fitted to rows. If not, the weight alone can say what becomes of it.
        rounds: how often the parts of a stand-in are fitted in turn.
        refine: passes over the rows in which a block's stand-ins are refined, where the user does not say; None: they
            cannot be.
    """

    name: str
    layer: type[StandInLinear]
    factorize: Factorize = staticmethod(factorize)
    taps_inputs: bool = False
    has_factors: bool = True
    keeps_weight: bool = False
    ratio: float = 0.6
    smallest_ratio: float = 0.01
    largest_ratio: float = 0.99
    has_experts: bool = False
    calibration: Literal["base", "propagated"] = "base"
    allocator: Allocator = "uniform"
    samples: int = SAMPLES
    needs_rows: bool = True
    rounds: int = 1
    refine: int | None = None

    def check(self, settings: CompressSettings) -> None:
        """Refuse settings that mean nothing for this kind.

        Raises:
            EmlocError: names them.
        """
        defaults = CompressSettings()
        unknown = () if self.has_factors else _OF_RATIO
        if given := [name for name in unknown if getattr(settings, name) != getattr(defaults, name)]:
            raise EmlocError(
                f"An emulator of the kind {self.name!r} has no {', '.join(given)}.",
                "Leave that out, or choose another --kind.",
            )
        if settings.calibration == "none" and self.needs_rows:
            raise EmlocError(
                f"An emulator of the kind {self.name!r} is fitted to rows.",
                "Leave out --calibration none, or give --kind nf4, say.",
            )
        if settings.refine and self.refine is None:
            raise EmlocError(
                f"An emulator of the kind {self.name!r} cannot be refined.",
                "Leave out --refine, or give --kind 2.7-bit, say.",
            )

    def rounding(self, factorize: Factorize) -> Fit:
        """Return what gives weights' factors as they will be when they have been stored and read."""
        return each(factorize)

    def decomposing(self, factorize: Factorize) -> Fit:
        """Return what gives factors of what the factors stand for, whose energies tell an allocator what a rank gains.

        It is the weight itself, unless the kind keeps that. :meth:`Factors.pair` has all that stands in for the weight.
        """
        return each(factorize)

    def stand_in(self, weight: torch.Tensor) -> Factors:
        """Return what stands in for a weight, (m, n), by itself; asked of kinds alone that do not need rows."""
        raise NotImplementedError(self.name)

    def movable(self, stand_in: Any) -> Movable:
        """Return a stand-in as it is refined; asked of kinds alone that can be."""
        raise NotImplementedError(self.name)

    def told(self, rank: str) -> str:
        """Return what stands in for a weight, in words, where ``rank`` is its rank, or those of several ("3 to 7")."""
        return f"rank {rank}"

    def names(self) -> list[str]:
        """Return the names of a stand-in's tensors within the Linear; the first is ``weight``."""
        return list(self.layer.parts((1, 1), 1, torch.float32))

    def keys(self, weight: str) -> list[str]:
        """Return the keys of a stand-in's tensors in the checkpoint, where that of the weight is known."""
        return [f"{weight.removesuffix('weight')}{name}" for name in self.names()]

    @abstractmethod
    def pack(self, stand_in: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Return a stand-in's tensors by their names, on the CPU.

        Args:
            stand_in: :class:`~emloc_core.algorithms.factorize.Factors`, of the subclass that this format makes.
            dtype: of the base.
        """

    @abstractmethod
    def unpack(self, tensors: list[torch.Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Pair:
        """Return what was packed, as it was rounded.

        Args:
            tensors: as :meth:`pack` returned them, in the order of the names.
            shape: of the weight, (m, n).
            dtype: of the base.
        """

    def config(self, ranks: Mapping[str, int | None], model: nn.Module, dtype: torch.dtype) -> dict[str, Any]:  # noqa: ARG002
        """Return the emulator's ``quantization_config``.

        Args:
            ranks: by module path of the Linears that are replaced.
            model: the base; meta tensors suffice.
            dtype: of the base.
        """
        return {"quant_method": METHOD, "format": self.name, "ranks": dict(ranks)}

    def nbytes(self, shape: tuple[int, int], rank: int, dtype: torch.dtype) -> int:
        """Return the bytes of what stands in for a weight of this shape."""
        return layer_bytes(self.layer, shape, rank, dtype)

    def replace(self, model: nn.Module, ranks: Mapping[str, int | None]) -> None:
        """Replace Linears of a model by empty layers of this format.

        Raises:
            EmlocError: the model has no Linear at one of the paths.
        """
        for path, rank in ranks.items():
            replace_linear(model, path, self.layer, rank)


def each(factorize: Factorize) -> Fit:
    """Return what factorises weights one by one."""

    def fit(weights: Sequence[torch.Tensor], gram: Gram, ranks: Sequence[int]) -> list[Factors]:
        return [factorize(weight, gram, rank) for weight, rank in zip(weights, ranks, strict=True)]

    return fit


def whole(weight: torch.Tensor) -> Pair:
    """Return a weight and the identity, on the side where it is the smaller one."""
    m, n = weight.shape
    identity = torch.eye(min(m, n), dtype=weight.dtype, device=weight.device)
    return (weight, identity) if m >= n else (identity, weight)
