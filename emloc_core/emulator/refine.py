"""Refines all stand-ins of a block's weights together, while the block is in memory.

Stand-ins that are fitted one by one know nothing of each other. Here the numbers of each that may still move take
gradient steps that bring the block's outputs in the emulator towards those in the base: block-wise reconstruction, as
in BRECQ (Li et al., 2021, arXiv 2102.05426) and AA-SVD (2026, arXiv 2604.02119). What counts is the change of a token
relative to its own length, as in :mod:`emloc_core.emulator.sensitivity`.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from emloc_core.algorithms.factorize import Factors
from emloc_core.emulator.sensitivity import Arguments, hidden_states
from emloc_core.kinds import Kind, Movable
from emloc_core.model.hooks import forward_hooks
from emloc_core.model.streaming import Stream

#: Rows of a step.
_ROWS = 4
#: Of Adam, falling to 0; its second average is as short as these runs are.
_RATE, _BETAS = 0.01, (0.9, 0.99)


def refined(
    stream: Stream, block: nn.Module, rows: int, found: Mapping[str, Factors], kind: Kind, epochs: int
) -> dict[str, Factors]:
    """Return the stand-ins of a block after passes over the rows, or as they are if those have not helped.

    Args:
        stream, block, rows: see :class:`Refinement`.
        found: the stand-ins by module path.
        kind: says which of their numbers may move.
        epochs: number of passes.
    """
    movables = {path: kind.movable(of) for path, of in found.items()}
    refinement = Refinement(stream, block, rows, movables)
    if not movables or not refinement.run(epochs):
        return dict(found)
    errors = refinement.errors()
    return {path: replace(of.settled(), error=errors[path]) for path, of in movables.items()}


class Refinement:
    """Refines the stand-ins of one block.

    Args:
        stream: samples ``0 .. rows - 1`` pass through the base, ``rows .. 2 rows - 1`` through the emulator, and all of
            them wait at the block.
        block: with the base's weights.
        rows: number of calibration rows; those that do not pass through the block are ignored.
        movables: the stand-ins, by module path.
    """

    def __init__(self, stream: Stream, block: nn.Module, rows: int, movables: Mapping[str, Movable]) -> None:
        self._stream, self._block, self._rows, self._movables = stream, block, rows, movables
        self._linears: dict[str, Any] = {path: stream.skeleton.model.get_submodule(path) for path in movables}
        names = {module: name for name, module in block.named_modules()}
        self._keys = {path: f"{names[linear]}.weight" for path, linear in self._linears.items()}
        self._waiting = [sample for sample in stream.here if sample < rows]

    def run(self, epochs: int) -> bool:
        """Take steps for so many passes over the rows; return whether the block is nearer to the base's for them."""
        targets = {row: self._outputs(row) for row in self._waiting}
        steps = epochs * -(-len(self._waiting) // _ROWS)
        optimiser = torch.optim.Adam([of.numbers for of in self._movables.values()], lr=_RATE, betas=_BETAS)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
        dtypes = {linear.weight.dtype for linear in self._linears.values()}
        scaler = torch.amp.GradScaler(self._stream.skeleton.device.type, enabled=torch.float16 in dtypes)
        draw = random.Random(0)
        before = self._total(targets)
        with torch.enable_grad():
            for _ in range(epochs):
                order = draw.sample(self._waiting, len(self._waiting))
                for start in range(0, len(order), _ROWS):
                    self._step(targets, order[start : start + _ROWS], scaler)
                    scaler.step(optimiser)
                    scale = scaler.get_scale()
                    scaler.update()
                    optimiser.zero_grad()
                    if scaler.get_scale() >= scale:  # if not, a gradient overflowed, and no step was taken
                        schedule.step()
        return self._total(targets) < before

    def errors(self) -> dict[str, float]:
        """Return ``||(What - W) x|| / ||W x||`` over the inputs x that every Linear has in the emulator, by path."""
        lost, whole = dict.fromkeys(self._movables, 0.0), dict.fromkeys(self._movables, 0.0)

        def comparing(path: str, weight: torch.Tensor) -> Callable[..., None]:
            def compare(module: nn.Module, args: tuple[Any, ...], found: torch.Tensor) -> None:
                bias = getattr(module, "bias", None)
                exact = functional.linear(args[0], weight, bias)
                exact, found = (each if bias is None else each - bias for each in (exact, found))
                lost[path] += float((found.float() - exact.float()).square().sum(dtype=torch.float64))
                whole[path] += float(exact.float().square().sum(dtype=torch.float64))

            return compare

        weights = self._weights()
        with forward_hooks((linear, comparing(path, linear.weight)) for path, linear in self._linears.items()):
            for row in self._waiting:
                self._outputs(row + self._rows, weights)
        return {path: (lost[path] / whole[path]) ** 0.5 if whole[path] else 0.0 for path in lost}

    def _step(self, targets: Mapping[int, torch.Tensor], rows: list[int], scaler: torch.amp.GradScaler) -> None:
        """Add the scaled gradient of some rows to the numbers: each row's to the weights, and theirs once to these."""
        weights = self._weights()
        leaves = {path: weight.detach().requires_grad_() for path, weight in weights.items()}
        for row in rows:
            with self._stream.arguments(row + self._rows) as arguments:  # until the backward pass has read them
                scaler.scale(_change(self._through(arguments, leaves), targets[row]) / len(rows)).backward()
        used = [path for path in weights if leaves[path].grad is not None]
        torch.autograd.backward([weights[path] for path in used], [leaves[path].grad for path in used])

    def _total(self, targets: Mapping[int, torch.Tensor]) -> float:
        weights = self._weights()
        return sum(float(_change(self._outputs(row + self._rows, weights), target)) for row, target in targets.items())

    def _weights(self) -> dict[str, torch.Tensor]:
        return {path: of.weight(self._linears[path].weight.dtype) for path, of in self._movables.items()}

    def _outputs(self, sample: int, weights: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """Return what the block passes on of a sample, with these weights of its Linears in place of its own."""
        with self._stream.arguments(sample) as arguments:
            return self._through(arguments, weights or {})

    def _through(self, arguments: Arguments, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        lent = {self._keys[path]: weight for path, weight in weights.items()}
        return hidden_states(functional_call(self._block, lent, *arguments, tie_weights=False))


def _change(found: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the mean over tokens of how far they are from the target, squared, relative to its own length."""
    change = (found.float() - target.float()).square().sum(-1)
    return (change / target.float().square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)).mean()
