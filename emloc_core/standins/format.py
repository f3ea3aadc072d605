"""The contract that every format of emulator fulfils."""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from enum import StrEnum
from math import prod
from typing import Any, NamedTuple

import torch
from torch import nn

from emloc_core.algorithms.statistics import Gram, Side
from emloc_core.errors import EmlocError
from emloc_core.settings import SAMPLES, Allocator, CompressSettings
from emloc_core.standins import costs
from emloc_core.standins.costs import Planned
from emloc_core.standins.experts import is_stack, replace_experts
from emloc_core.standins.layer import PackedLinear, Parts, StandInLinear, replace_linear
from emloc_core.standins.standin import Fitted, StandIn


class _QuantMethod(StrEnum):
    """The ``quant_method`` of an emulator, as diffusers asks for it: a member of an enumeration."""

    EMLOC = "emloc"


METHOD = _QuantMethod.EMLOC
#: Field of config.json with the kind of an emulator that bitsandbytes loads, by which it differs from such a base.
MARK = "emloc_kind"


def kind_of(config: Mapping[str, Any]) -> str | None:
    """Return the kind of an emulator, by its ``config.json``; None: it is no emulator."""
    settings = config.get("quantization_config")
    if isinstance(settings, Mapping) and settings.get("quant_method") == METHOD:
        return str(settings.get("format"))
    return config.get(MARK)


class Ratios(NamedTuple):
    """The sizes of an emulator, as shares of the parameters that its factors have.

    Attributes:
        default: where the user does not say.
        smallest: that is looked for.
    """

    default: float = 0.6
    smallest: float = 0.01


class Phase(NamedTuple):
    """What a phase of stage 1 takes of a block, in bytes.

    Attributes:
        statistics: the peak of the phase's own work.
        stand_ins: the block's, as rows pass through them.
    """

    statistics: int
    stand_ins: int


class Format(ABC):
    """How an emulator keeps what stands in for a weight. Users choose it by its name, as the kind of the emulator.

    Attributes:
        layer: what stands in for a Linear in a model.
        ratios: of the factors that it keeps; None: it keeps none, and has one size.
        calibrations: what stand-ins can be fitted to, the default first: ``propagated``, ``base``, ``none``.
        allocator: name of the rank allocator where the user does not say and errors are propagated; otherwise it is
            ``uniform``. A format with ``global`` has a :meth:`ranking`.
        samples: number of calibration rows where the user does not say, and has enough; :data:`SAMPLES` or more.
        experts: whether stacks of experts get stand-ins too; otherwise they stay dense.
        narrow: whether it gets Grams rounded to fp32, which takes less memory; otherwise they may be in fp64, and have
            heavy rows.
    """

    name: str
    layer: type[StandInLinear]
    ratios: Ratios | None = None
    calibrations: tuple[str, ...] = ("propagated", "base")
    allocator: Allocator = "uniform"
    samples: int = SAMPLES
    experts: bool = False
    narrow: bool = False

    @property
    def is_available(self) -> bool:
        """Whether what making such an emulator takes is installed; otherwise it is not recommended."""
        return True

    def check(self, settings: CompressSettings) -> None:
        """Refuse settings that mean nothing for this format.

        Raises:
            EmlocError: names them.
        """
        defaults = CompressSettings()
        unknown = () if self.ratios else ("ratio", "allocator")
        if lacking := [name for name in unknown if getattr(settings, name) != getattr(defaults, name)]:
            raise EmlocError(
                f"An emulator of the kind {self.name!r} has no {', '.join(lacking)}.",
                "Leave that out, or choose another --kind.",
            )
        if settings.allocator == "global" and self.allocator == "uniform":
            raise EmlocError(
                f"The kind {self.name!r} gives all Linears the same ratio.",
                "Leave out --allocator, or give --kind low-rank, say.",
            )
        if settings.calibration not in (None, *self.calibrations):
            raise EmlocError(
                f"An emulator of the kind {self.name!r} is always fitted to rows.",
                "Leave out --calibration none, or give --kind nf4, say.",
            )

    def tap(self, cheaper: Side) -> Side:
        """Return which activations of a Linear are captured, given which are fewer; by default its inputs."""
        return "input"

    def own(self) -> "Format":
        """Return the format in a checkpoint of ours, in which more may be packed than Linears of blocks."""
        return self

    def holds(self, model: nn.Module) -> bool:
        """Return whether it can hold an emulator of a model, or its outline; if not, :meth:`own` does."""
        return True

    @property
    def packs_vocabulary(self) -> bool:
        """Whether output layer and embeddings are packed too: where the Linears are."""
        return issubclass(self.layer, PackedLinear)

    @abstractmethod
    def fit(self, weights: Sequence[torch.Tensor], gram: Gram, ranks: Sequence[int | None]) -> Sequence[Fitted]:
        """Return what stands in for weights, as it will be when it has been stored and read.

        Args:
            weights: each (m, n).
            gram: of the inputs that all of them have, or of the outputs of a single one.
            ranks: of their factors; None where the format keeps none.
        """

    def round(self, weight: torch.Tensor) -> Fitted:
        """Return what stands in for a weight, (m, n), by itself; only called for the calibration ``none``."""
        raise NotImplementedError(self.name)

    def ranking(self) -> "Format":
        """Return the format of factors whose energies tell what a rank gains; only called with ``global``."""
        raise NotImplementedError(self.name)

    def describe(self, rank: str) -> str:
        """Return what stands in for a weight, in words; ``rank`` is its rank, or the range of several ("3 to 7")."""
        return f"rank {rank}" if self.ratios else self.name

    def parts(self, shape: tuple[int, int], rank: int | None, dtype: torch.dtype) -> Parts:
        """Return shape and dtype of what is stored of a weight of this shape, by name: what the layer has."""
        return self.layer.parts(shape, rank, dtype)

    def names(self) -> list[str]:
        """Return the names of a stand-in's tensors within the Linear; the first is ``weight``."""
        return list(self.parts((1, 1), 1, torch.float32))

    def keys(self, weight: str) -> list[str]:
        """Return the keys of a stand-in's tensors in the checkpoint, from the key of the weight."""
        return [f"{weight.removesuffix('weight')}{name}" for name in self.names()]

    def pack(self, fitted: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Return a stand-in's tensors by their names, on the CPU.

        Args:
            fitted: what :meth:`fit` returned; by default :class:`~emloc_core.standins.standin.Packed`.
        """
        return {name: fitted.parts[name].cpu() for name in self.names()}

    def read(self, tensors: Sequence[torch.Tensor], shape: tuple[int, int], dtype: torch.dtype) -> StandIn:
        """Return what was packed, as it was rounded.

        Args:
            tensors: as :meth:`pack` returned them, in the order of the names.
            shape: of the weight, (m, n).
        """
        return StandIn(self.layer.unpack(*tensors, shape=shape, dtype=dtype))

    def config(self, ranks: Mapping[str, int | None], model: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
        """Return the emulator's ``quantization_config``.

        Args:
            ranks: by module path of the Linears that are replaced; None where the format has none.
            model: the base; meta tensors suffice.
        """
        return {"quant_method": METHOD, "format": self.name, "ranks": dict(ranks)}

    def replace(self, model: nn.Module, ranks: Mapping[str, int | None]) -> None:
        """Replace Linears of a model, and stacks of experts, by empty layers of this format.

        Raises:
            EmlocError: the model has no Linear, or stack, at one of the paths.
        """
        experts = defaultdict[str, dict[str, int | None]](dict)
        for path, rank in ranks.items():
            owner, _, name = path.rpartition(".")
            if is_stack(model, path):
                experts[owner][name] = rank
            else:
                replace_linear(model, path, self.layer, rank)
        for owner, stack_ranks in experts.items():
            replace_experts(model, owner, self.layer, stack_ranks)

    def nbytes(self, shape: tuple[int, int], rank: int | None, dtype: torch.dtype) -> int:
        """Return the bytes of what stands in for a weight of this shape."""
        return sum(prod(size) * part_dtype.itemsize for size, part_dtype in self.parts(shape, rank, dtype).values())

    def numbers(self, shape: tuple[int, int], rank: int | None) -> int:
        """Return how many numbers an input is multiplied by."""
        return shape[0] * shape[1]

    def phases(self, linears: Sequence[Planned], dtype: torch.dtype, *, propagated: bool) -> list[Phase]:
        """Return what fitting the Linears of a block takes, group by group.

        Args:
            linears: with their ranks.
            propagated: whether errors are propagated; if not, the Grams of the whole block are there at first.
        """
        phases, held, read, by_group = [], 0, 0, list(costs.groups(linears))
        for index, group in enumerate(by_group):
            fitting = self.fitting_bytes(group, propagated=propagated, itemsize=dtype.itemsize)
            if propagated:
                fitting = max(fitting, costs.summing_bytes(group))
            else:
                fitting += costs.gram_bytes([linear for later in by_group[index + 1 :] for linear in later])
            held += self.fitted_bytes(group, dtype)
            phases.append(Phase(fitting + held, read))
            read += self.reading_bytes(group, dtype.itemsize)
        return [*phases, Phase(held, read)]

    def fitted_bytes(self, linears: Sequence[Planned], dtype: torch.dtype) -> int:
        """Return the bytes of what was fitted until it is written, by default packed."""
        return sum(self.nbytes((linear.out_features, linear.in_features), linear.rank, dtype) for linear in linears)

    def fitting_bytes(self, linears: Sequence[Planned], *, propagated: bool, itemsize: int) -> int:
        """Return the peak of fitting the Linears of a group, or a matrix of a stack; by default, of rounding.

        Args:
            linears: that share their inputs, with their ranks.
        """
        return costs.rounding_bytes(linears)

    def reading_bytes(self, linears: Sequence[Planned], itemsize: int) -> int:
        """Return the bytes of a block's stand-ins as they are read: by default, unpacked."""
        return itemsize * sum(linear.out_features * linear.in_features for linear in linears)
