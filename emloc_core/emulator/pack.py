"""Packs weights of the base, one in memory at a time.

Without calibration, those of Linears and experts are packed as they are; with it, the output layer is fitted to what
reaches it in the emulator, and the embeddings are packed as they are.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from emloc_core.algorithms.products import by_onednn
from emloc_core.algorithms.statistics import Gram
from emloc_core.emulator.experts import Stack, Stacked
from emloc_core.emulator.files import EmulatorFiles
from emloc_core.emulator.propagation import PairedMoments
from emloc_core.emulator.vocabulary import VocabularyPlan
from emloc_core.errors import EmlocError
from emloc_core.files.checkpoint import Checkpoint
from emloc_core.files.job import Progress
from emloc_core.model.hooks import forward_hooks
from emloc_core.model.skeleton import Skeleton
from emloc_core.model.streaming import Stream
from emloc_core.plugins.manager import plugin_manager
from emloc_core.standins.standin import Fitted, Packed
from emloc_core.standins.vocabulary import PACKINGS, packed_embedding


def pack_blocks(files: EmulatorFiles, progress: Progress) -> None:
    """Write what stands in for the weights of every block that is not written yet.

    Raises:
        EmlocError: a weight is NaN or Inf; the message names the Linear.
    """
    total = len(files.blocks)
    for index, block in enumerate(files.blocks):
        if not files.is_written(block):
            paths = [linear.path for linear in files.plan.in_block(block)]
            fitted: dict[str, Fitted | Stacked] = {path: _stand_in(files, path) for path in paths}
            for owner, planned in files.plan.experts_in_block(block).items():
                fitted |= {stack.path: _stack(files, owner, stack.path) for stack in planned}
            files.write(block, fitted)
        progress(block, index + 1, total)
        plugin_manager().notify("emloc_block_done", stage="compress", path=block, index=index, total=total)


def _stand_in(files: EmulatorFiles, path: str) -> Fitted:
    with _loaded(files, f"{path}.weight") as weight:
        return files.format.round(weight)


def _stack(files: EmulatorFiles, owner: str, path: str) -> Stacked:
    experts = files.skeleton.model.get_submodule(owner)
    with _loaded(files, path) as stack:
        packed = Stack(len(stack))
        for matrix in stack:
            rounded = files.format.round(matrix.T if experts.is_transposed else matrix)
            packed.add(files.format.pack(rounded, stack.dtype), rounded.relative_error())
        return packed.stacked()


@contextmanager
def _loaded(files: EmulatorFiles, name: str) -> Iterator[torch.Tensor]:
    with files.skeleton.parameters([name]) as loaded:
        weight = loaded[name].detach()
        require_finite(weight, name, files.base)
        yield weight


def pack_vocabulary(files: EmulatorFiles, plans: Sequence[VocabularyPlan]) -> None:
    """Pack matrices that are not written yet, as they are, one at a time.

    Raises:
        EmlocError: one holds NaN or Inf.
    """
    for plan in plans:
        if files.is_written(plan.path):
            continue
        name = f"{plan.path}.weight"
        with files.skeleton.parameters([name]) as loaded:
            files.write(plan.path, {plan.path: _packed(files.skeleton, plan, loaded[name])})


@contextmanager
def looking_up(stream: Stream, plan: VocabularyPlan, parts: Mapping[str, torch.Tensor], rows: int) -> Iterator[None]:
    """Let the samples from index ``rows`` on, those of the emulator, look their tokens up in packed embeddings."""
    module: Any = stream.skeleton.model.get_submodule(plan.path)
    other = packed_embedding(module, plan.packing, parts)

    def look_up(_module: nn.Module, args: tuple[Any, ...], _output: Any) -> Any:
        return None if stream.sample < rows else other.forward(*args)

    with forward_hooks([(module, look_up)]):  # a unit's own forward has begun
        yield


def fit_head(
    stream: Stream, plan: VocabularyPlan, rows: int, blame: Callable[[EmlocError, str, int], EmlocError]
) -> Packed:
    """Fit an output layer to the samples that wait at it. They stay there: no logits are computed.

    Where samples of the emulator are among them, it is fitted to give the base's logits on the emulator's hidden
    states, as Linears are where errors are propagated; see :mod:`emloc_core.emulator.propagation`.

    Args:
        stream: samples ``0 .. rows - 1`` pass through the base, ``rows .. 2 rows - 1``, if there are any, through the
            emulator.
        blame: takes an error, a path and a row's index, and returns the error for the user.

    Raises:
        EmlocError: hidden states hold NaN or Inf.
    """
    device, here = stream.skeleton.device, stream.visiting
    # The target of the identity is the matrix that any weight is multiplied by.
    moments = PairedMoments([torch.eye(plan.features, device=device)], narrow=True) if max(here) >= rows else None
    gram = moments.emulator if moments else Gram("input", plan.features, device=device)
    for row in (sample for sample in here if sample < rows):
        inputs = [_input(stream, plan.path, sample) for sample in ((row, row + rows) if moments else (row,))]
        try:
            (moments or gram).add(*inputs)
        except EmlocError as error:
            raise blame(error, plan.path, row) from None
    stream.visiting = []
    target = moments.fit()[0] if moments else None
    del moments
    gram.narrow()
    return _packed(stream.skeleton, plan, stream.skeleton.model.get_parameter(f"{plan.path}.weight"), gram, target)


def _input(stream: Stream, path: str, sample: int) -> torch.Tensor:
    """Return a waiting sample's input of a layer: the unit that it waits at, or a layer within that."""
    captured: list[torch.Tensor] = []

    def reached(_module: nn.Module, args: tuple[Any, ...]) -> None:
        captured.append(args[0])
        stream.pause(f"the inputs of {path}", args, inside=True)

    if path in stream.units:
        with stream.arguments(sample) as (args, _):
            return args[0].clone()
    with forward_hooks([(stream.skeleton.model.get_submodule(path), reached)], before=True):
        stream.step(sample)
    return captured[0]


@by_onednn()
def _packed(
    skeleton: Skeleton,
    plan: VocabularyPlan,
    weight: torch.Tensor,
    gram: Gram | None = None,
    target: torch.Tensor | None = None,
) -> Packed:
    """Return a matrix packed.

    Args:
        weight: (rows, features).
        gram, target: see :meth:`~emloc_core.standins.vocabulary.Packing.pack`.
    """
    require_finite(weight, f"{plan.path}.weight", skeleton.checkpoint)
    return PACKINGS[plan.packing].pack(weight, gram, target)


def require_finite(weight: torch.Tensor, name: str, base: Checkpoint) -> None:
    """Refuse a weight of the base, by its extremes: a mask over a large one would dominate peak memory.

    Raises:
        EmlocError: it holds NaN or Inf.
    """
    if weight.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(weight))).all()):
        raise EmlocError(
            f"{name} in {base.directory} holds NaN or Inf.", "Download or copy the model again.", code="not-finite"
        )
