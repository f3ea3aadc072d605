"""Fits an output layer that is packed to what reaches it in the emulator."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from emloc_core.algorithms.statistics import Gram
from emloc_core.emulator.propagation import PairedMoments
from emloc_core.emulator.vocabulary import VocabularyPlan, packed
from emloc_core.errors import EmlocError
from emloc_core.model.streaming import Stream
from emloc_core.standins.standin import Packed


def fit_head(
    stream: Stream, plan: VocabularyPlan, rows: int, blame: Callable[[EmlocError, str, int], EmlocError]
) -> Packed:
    """Fit an output layer to the samples that wait at it. They stay there: no logits are computed.

    Where samples of the emulator are among them, it is fitted to give the base's logits on the emulator's hidden
    states, as Linears are that errors are propagated to; see :mod:`emloc_core.emulator.propagation`.

    Args:
        stream: samples ``0 .. rows - 1`` pass through the base, ``rows .. 2 rows - 1``, if there are any, through the
            emulator.
        plan: of the layer.
        rows: number of calibration rows.
        blame: takes an error, a path and a row's index, and returns the error for the user.

    Raises:
        EmlocError: hidden states hold NaN or Inf.
    """
    device, here = stream.skeleton.device, stream.here
    # What is fitted of the identity is what any weight is multiplied by.
    moments = PairedMoments([torch.eye(plan.features, device=device)]) if max(here) >= rows else None
    gram = moments.emulator if moments else Gram("input", plan.features, device=device)
    for row in (sample for sample in here if sample < rows):
        given = [_input(stream, plan.path, sample) for sample in ((row, row + rows) if moments else (row,))]
        try:
            (moments or gram).add(*given)
        except EmlocError as error:
            raise blame(error, plan.path, row) from None
    stream.here = []
    target = moments.fit()[0] if moments else None
    return packed(stream.skeleton, plan, stream.skeleton.model.get_parameter(f"{plan.path}.weight"), gram, target)


def _input(stream: Stream, path: str, sample: int) -> torch.Tensor:
    """Return what a waiting sample gives a layer: the unit that it waits at, or one within that."""
    found: list[torch.Tensor] = []

    def reached(_module: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(args[0])
        stream.pause(f"the inputs of {path}", args, inside=True)

    if path in stream.units:
        with stream.arguments(sample) as (args, _):
            return args[0].clone()
    handle = stream.skeleton.model.get_submodule(path).register_forward_pre_hook(reached)
    try:
        stream.step(sample)
    finally:
        handle.remove()
    return found[0]
