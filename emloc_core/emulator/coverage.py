"""The share of a model that can be compressed, and the Linears that no declaration covers.

A Linear is in an input group, or kept dense with a reason, or undeclared: it then stays dense because nobody thought of
it, which the user has to know.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from emloc_core.emulator.declared import kept_by
from emloc_core.emulator.ranks import LinearPlan, RankPlan
from emloc_core.emulator.vocabulary import packings
from emloc_core.family import Family
from emloc_core.standins.vocabulary import vocabulary_layers

#: Below this compressible share of the parameters, an emulator of any ratio is more than half of the model.
SMALL = 0.5
_SHOWN = 3  # patterns in a warning


@dataclass(frozen=True)
class Part:
    """Modules whose paths differ only in the numbers of blocks.

    Attributes:
        pattern: glob pattern of their paths.
        parameters: number of parameters; those that are tied to a module before them count there.
        share: of the model's parameters.
    """

    pattern: str
    modules: int
    parameters: int
    share: float

    def __str__(self) -> str:
        return f"{self.pattern} ({self.share:.1%} of the parameters)"


@dataclass(frozen=True)
class Coverage:
    """What an emulator replaces of a model.

    Attributes:
        compressible: share of the parameters that are weights of Linears and experts without a reason to stay dense.
        undeclared: Linears and fused experts that are neither in an input group nor kept dense, the largest first.
        dense: everything that is not compressible, the largest first.
    """

    family: str
    compressible: float
    undeclared: tuple[Part, ...]
    dense: tuple[Part, ...]

    @property
    def warnings(self) -> list[str]:
        """Sentences that the user of an emulator has to read."""
        warnings = []
        if self.undeclared:
            warnings.append(
                f"the family {self.family!r} does not mention {_listed(self.undeclared)}, which stay dense: add them "
                "to its input_groups, or to keep_dense with the reason (docs/plugins.md)"
            )
        if self.compressible < SMALL:
            warnings.append(
                f"only {self.compressible:.1%} of the parameters are in Linears that can be compressed, so an emulator "
                f"of any ratio keeps at least {1 - self.compressible:.1%}; what stays dense: {_listed(self.dense)}. If "
                "tuning that does not fit, `emloc train MODEL --exact` tunes the base, a few blocks in memory at a time"
            )
        return warnings

    def describe(self) -> dict[str, Any]:
        """Return the coverage as JSON values."""
        return {"compressible": self.compressible, "undeclared": [vars(part) for part in self.undeclared]}


def coverage(model: nn.Module, family: Family, plan: RankPlan) -> Coverage:
    """Return what an emulator replaces of a model.

    Args:
        model: the model; meta tensors suffice.
        family: its declaration, with what it takes from nested families.
        plan: the declaration, resolved on the model.
    """
    sizes: dict[str, int] = defaultdict(int)
    total = 0
    for name, parameter in model.named_parameters():
        sizes[name.rpartition(".")[0]] += parameter.numel()
        total += parameter.numel()
    experts = [stack for stack in plan.experts if stack.is_replaced]
    compressed = {linear.path for linear in plan.candidates} | {stack.owner for stack in experts}
    compressed |= packings(plan.vocabulary).keys()
    numbers = sum(linear.numbers for linear in (*plan.candidates, *experts))
    numbers += sum(matrix.numbers for matrix in plan.vocabulary)
    dense = {path: size for path, size in sizes.items() if path not in compressed}
    open_ = {path: sizes.get(path, 0) for path in undeclared(model, family, plan.planned)}
    return Coverage(family.name, numbers / total if total else 0.0, _parts(open_, total), _parts(dense, total))


def undeclared(model: nn.Module, family: Family, planned: Sequence[LinearPlan]) -> list[str]:
    """Return the paths of Linears and of fused experts that are in no input group and kept dense by no pattern.

    Families do not declare the output layer.
    """
    declared = {path for linear in planned for path in (linear.path, *linear.group)} | vocabulary_layers(model).keys()
    return [path for path in matrices(model) if path not in declared and kept_by(path, family) is None]


def matrices(model: nn.Module) -> Iterator[str]:
    """Yield the paths of modules that multiply by a matrix of their own: Linears, and experts fused into one tensor."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) or fused_weights(module):
            yield path


def fused_weights(module: nn.Module) -> list[nn.Parameter]:
    """Return the weights of three dimensions that a module multiplies by, such as those of fused experts."""
    convolves = isinstance(module, nn.Conv1d | nn.ConvTranspose1d)
    own = () if convolves else module.parameters(recurse=False)
    return [weight for weight in own if weight.ndim == 3 and min(weight.shape) > 1]


def _parts(sizes: dict[str, int], total: int) -> tuple[Part, ...]:
    parts: dict[str, list[int]] = defaultdict(list)
    for path, size in sizes.items():
        parts[re.sub(r"\.\d+(?=\.|$)", ".*", path)].append(size)
    shares = (Part(pattern, len(own), sum(own), sum(own) / total if total else 0.0) for pattern, own in parts.items())
    return tuple(sorted(shares, key=lambda part: -part.parameters))


def _listed(parts: Sequence[Part]) -> str:
    more = len(parts) - _SHOWN
    return ", ".join(map(str, parts[:_SHOWN])) + (f" and {more} more" if more > 0 else "")
