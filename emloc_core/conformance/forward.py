"""Records a forward pass of the base, in memory and streamed: blocks, inputs and outputs of Linears, and Grams."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from emloc_core.algorithms.factorize import Factors
from emloc_core.algorithms.statistics import Gram
from emloc_core.emulator.decompose import Decomposition
from emloc_core.emulator.ranks import RankPlan
from emloc_core.model.hooks import forward_hooks, tapped
from emloc_core.model.skeleton import Skeleton
from emloc_core.objective import Sample
from emloc_core.standins import LowRank


@dataclass
class Forward:
    """The calls that were observed in ordinary forward passes.

    Attributes:
        blocks: for each sample, paths of the blocks in the order in which they were entered.
        inputs: path of a Linear -> the input of each call, (..., in_features); Linears in the order in which they ran.
        outputs: path of a Linear -> the output of each call, (..., out_features).
        tapped: path of a Linear -> what its tap gave at each call.
        logits: the logits of each sample.
    """

    blocks: list[list[str]] = field(default_factory=list)
    inputs: dict[str, list[torch.Tensor]] = field(default_factory=lambda: defaultdict(list))
    outputs: dict[str, list[torch.Tensor]] = field(default_factory=lambda: defaultdict(list))
    tapped: dict[str, list[torch.Tensor]] = field(default_factory=lambda: defaultdict(list))
    logits: list[torch.Tensor] = field(default_factory=list)


def observe(
    model: nn.Module,
    samples: Sequence[Sample],
    linears: Iterable[str],
    blocks: Iterable[str] = (),
    taps: Mapping[str, Any] | None = None,
) -> Forward:
    """Run the samples through a model in memory.

    Args:
        model: in eval mode.
        taps: path of a Linear -> how it is tapped.
    """
    forward = Forward()

    def entering(path: str) -> Callable[..., None]:
        return lambda *_: forward.blocks[-1].append(path)

    def watching(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            forward.inputs[path].append(args[0].clone())
            forward.outputs[path].append(output.clone())

        return hook

    def sink(path: str, activations: torch.Tensor) -> None:
        forward.tapped[path].append(activations.clone())

    tapping = tapped({path: model.get_submodule(path) for path in taps or ()}, taps or {}, sink)
    following = forward_hooks(((model.get_submodule(path), entering(path)) for path in blocks), before=True)
    with following, forward_hooks((model.get_submodule(path), watching(path)) for path in linears), tapping:
        for sample in samples:
            forward.blocks.append([])
            forward.logits.append(logits(model, sample))
    return forward


def logits(model: Any, sample: Sample) -> torch.Tensor:
    """Return a model's output for a sample, without gradient: for tokens, its logits, (1, T, vocabulary)."""
    with torch.no_grad():
        return answer(model, sample)


def answer(model: Any, sample: Sample) -> torch.Tensor:
    """Return the same as :func:`logits`, with its gradient."""
    output = sample.run(model, "cpu")
    return output if isinstance(output, torch.Tensor) else output.logits


@dataclass(frozen=True)
class Traced(Factors):
    """Factors that remember what they were made from: a Gram, and the loaded weight, (m, n)."""

    gram: Gram
    weight: torch.Tensor


class _Tracing(LowRank):
    """Makes factors that remember what they were made from."""

    def fit(self, weights: Sequence[torch.Tensor], gram: Gram, ranks: Sequence[int | None]) -> list[Factors]:
        factors = zip(super().fit(weights, gram, ranks), weights, strict=True)
        return [Traced(factor.u, factor.v, factor.spectrum, gram, weight.clone()) for factor, weight in factors]


class Decomposed(dict[str, Traced]):
    """The result of a streamed pass by module path of each compressed Linear: factors of full rank, min(m, n)."""

    def is_written(self, _block: str) -> bool:
        """Return False: nothing is resumed, so every block is still to be done."""
        return False

    def write(self, _block: str, fitted: Mapping[str, Any]) -> None:
        """Keep a block's factors."""
        self.update(fitted)


def decompose(skeleton: Skeleton, plan: RankPlan, samples: Sequence[Sample]) -> Decomposed:
    """Stream the samples through the base as stage 1 does, and factorise every compressed Linear at full rank."""
    full = RankPlan(
        tuple(replace(linear, rank=min(linear.out_features, linear.in_features)) for linear in plan.candidates)
    )
    decomposed = Decomposed()
    Decomposition(skeleton, full, samples, _Tracing(), lambda *_: None).run(decomposed)
    return decomposed
