"""Refines all stand-ins of a block's weights together, while the block is in memory.

Stand-ins that are fitted one by one know nothing of each other. Here the numbers of each that may still move take
gradient steps that bring the block's outputs in the emulator towards those in the base: block-wise reconstruction, as
in BRECQ (Li et al., 2021, arXiv 2102.05426) and AA-SVD (2026, arXiv 2604.02119). What counts is the change of a token
relative to its own length, as in :mod:`emloc_core.emulator.sensitivity`.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from emloc_core.algorithms.products import by_onednn
from emloc_core.emulator.sensitivity import Arguments, hidden_states, relative_change
from emloc_core.files.scratch import ScratchTensors
from emloc_core.model.hooks import forward_hooks
from emloc_core.model.streaming import Stream
from emloc_core.standins import Format
from emloc_core.standins.standin import Fitted, Movable

#: Rows of a step.
_ROWS = 4
#: Of Adam, falling to 0; its second average is as short as these runs are.
_RATE, _BETAS = 0.01, (0.9, 0.99)


def refined(
    stream: Stream, block: nn.Module, fitted: Mapping[str, Fitted], format: Format, epochs: int, ends: "Ends"
) -> dict[str, Fitted]:
    """Return the stand-ins of a block after passes over the rows, or as they are if those have not helped."""
    movables = {path: format.movable(stand_in) for path, stand_in in fitted.items()}
    if not movables or not Refinement(stream, block, movables, ends).run(epochs):
        return dict(fitted)
    return {path: movable.settled() for path, movable in movables.items()}


class Ends:
    """Where samples come out of a block: those of the base leave a target there, those of the emulator wait.

    Attributes:
        targets: outputs of the base's block, by row; in a file, if there is a directory for one.
        change: how far the outputs of the emulator's block are from these, the mean over tokens, summed over rows.
    """

    def __init__(self, stream: Stream, block: str, rows: int, directory: Path | None) -> None:
        self._stream, self._block, self.rows = stream, block, rows
        self.targets = ScratchTensors(directory)
        self.change = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Let the samples of the emulator wait at the end of the block, and those of the base leave their targets.

        They wait with the arguments of the block, and compute its outputs once more when they resume.
        """

        def leave(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            sample, hidden = self._stream.sample, hidden_states(output)
            if sample < self.rows:
                self.targets[sample] = hidden
                return None
            self.change += float(relative_change(hidden, self.targets[sample - self.rows]).mean())
            self._stream.pause(f"the end of {self._block}", args, kwargs)
            return block.forward(*args, **kwargs)

        block = self._stream.skeleton.model.get_submodule(self._block)
        with forward_hooks([(block, leave)], with_kwargs=True):
            yield

    def pass_on(self) -> None:
        """Let the samples that wait continue to the next block."""
        for row in self.targets:
            self._stream.step(row + self.rows)


@contextmanager
def errors(linears: Mapping[str, nn.Module]) -> Iterator[Callable[[], dict[str, float]]]:
    """Measure ``||(What - W) x|| / ||W x||`` by path, over the inputs x of Linears whose outputs are ``What x``.

    Args:
        linears: with the base's weights.
    """
    lost, total = dict.fromkeys(linears, 0.0), dict.fromkeys(linears, 0.0)

    def comparing(path: str) -> Callable[..., None]:
        @by_onednn()
        def compare(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            weight, bias = module.get_parameter("weight"), getattr(module, "bias", None)
            exact = functional.linear(args[0], weight)
            output = output if bias is None else output - bias
            lost[path] += float((output.float() - exact.float()).square().sum(dtype=torch.float64))
            total[path] += float(exact.float().square().sum(dtype=torch.float64))

        return compare

    with forward_hooks(((linear, comparing(path)) for path, linear in linears.items()), first=True):
        yield lambda: {path: (lost[path] / total[path]) ** 0.5 if total[path] else 0.0 for path in lost}


class Refinement:
    """Refines the stand-ins of one block.

    Args:
        stream: the samples of the emulator wait at the end of the block.
        block: with the base's weights.
        ends: what samples left where they came out of the block.
    """

    def __init__(self, stream: Stream, block: nn.Module, movables: Mapping[str, Movable], ends: Ends) -> None:
        self._stream, self._block, self._movables, self._ends = stream, block, movables, ends
        self._linears: dict[str, Any] = {path: stream.skeleton.model.get_submodule(path) for path in movables}
        names = {module: name for name, module in block.named_modules()}
        self._keys = {path: f"{names[linear]}.weight" for path, linear in self._linears.items()}
        self._waiting = list(ends.targets)

    @by_onednn()
    def run(self, epochs: int) -> bool:
        """Take steps for so many passes over the rows; return whether the block is nearer to the base's than before.

        This is measured in the last pass, on every row before the step that it takes part in.
        """
        steps = epochs * -(-len(self._waiting) // _ROWS)
        optimiser = torch.optim.Adam([movable.numbers for movable in self._movables.values()], lr=_RATE, betas=_BETAS)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
        dtypes = {linear.weight.dtype for linear in self._linears.values()}
        scaler = torch.amp.GradScaler(self._stream.skeleton.device.type, enabled=torch.float16 in dtypes)
        draw = random.Random(0)
        change: float | torch.Tensor = 0.0
        with torch.enable_grad():
            for _ in range(epochs):
                change = 0.0
                order = draw.sample(self._waiting, len(self._waiting))
                for start in range(0, len(order), _ROWS):
                    change += self._step(order[start : start + _ROWS], scaler)
                    scaler.step(optimiser)
                    scale = scaler.get_scale()
                    scaler.update()
                    optimiser.zero_grad()
                    if scaler.get_scale() >= scale:  # if not, a gradient overflowed, and no step was taken
                        schedule.step()
        return bool(change < self._ends.change)

    def _step(self, rows: list[int], scaler: torch.amp.GradScaler) -> torch.Tensor:
        """Add the scaled gradient of some rows to the numbers: of each row to the weights, then once from the weights.

        Returns:
            How far the rows were from their targets, summed.
        """
        weights = {path: movable.weight(self._linears[path].weight.dtype) for path, movable in self._movables.items()}
        leaves = {path: weight.detach().requires_grad_() for path, weight in weights.items()}
        total = torch.zeros((), device=self._stream.skeleton.device)
        for row in rows:
            with self._stream.arguments(row + self._ends.rows) as arguments:  # until the backward pass has read them
                changed = self._changed(row, arguments, leaves)
                scaler.scale(changed / len(rows)).backward()
            total += changed.detach()
        used = [path for path in weights if leaves[path].grad is not None]
        torch.autograd.backward([weights[path] for path in used], [leaves[path].grad for path in used])
        return total

    def _changed(self, row: int, arguments: Arguments, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return how far a row is from its target after the block, with these weights in place of its Linears' own."""
        parameters = {self._keys[path]: weight for path, weight in weights.items()}
        output = hidden_states(functional_call(self._block, parameters, *arguments, tie_weights=False))
        return relative_change(output, self._ends.targets[row]).mean()
