"""Exact LoRA steps on a model that does not fit: every block is read twice per step, however many micro-batches.

All micro-batches' ordinary forwards, losses included, advance through the units together, with gradients on
(:mod:`emloc_core.model.lockstep`). Each unit is a checkpoint that takes its frozen weights from a cache of what is
loaded. Then comes one backward of the summed loss. Autograd runs the ready node that was made last; so the last block
of all micro-batches is recomputed before the one before it, and the weights are read once more, in reverse.

Frozen parameters are on the meta device, except those of the visited unit: computing with one that is not loaded fails.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from emloc_core import devices
from emloc_core.compat.peft import WRAPPER
from emloc_core.compat.torch import writes
from emloc_core.errors import EmlocError
from emloc_core.exact.boundaries import Boundaries
from emloc_core.exact.head import Head, count_tokens, shifted_labels, with_gradient
from emloc_core.model.device import free_memory
from emloc_core.model.lockstep import Lockstep, units
from emloc_core.model.parking import Parking
from emloc_core.model.skeleton import Skeleton
from emloc_core.model.weights import FrozenWeights
from emloc_core.processes.parallel import Processes

_HEAD = "the head"
#: Share of the CPU's free memory that copies of units may fill, pinned for the GPU.
_PINNED_SHARE = 0.5


class ExactSteps:
    """Takes the gradients of steps.

    Args:
        model: the base with a LoRA in its Linears (:func:`emloc_core.exact.lora.lora_on`): the LoRA is real and
            requires gradients, all else is on the meta device and frozen. Its units' forwards are replaced.
        skeleton: of the same base.
        device: device that computes.
        room: bytes of the device in which weights may stay.
        boundaries: where the activations at block boundaries wait; None: on the device.

    Attributes:
        weights: the base's weights, with counts of how often they were read.

    Raises:
        EmlocError: the model has no backbone apart from its head.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        skeleton: Skeleton,
        device: torch.device | str = "cpu",
        room: float = 0,
        boundaries: Boundaries | None = None,
    ) -> None:
        self.model, self.device = model, torch.device(device)
        self.boundaries = boundaries or Boundaries()
        self.processes = Processes()
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        paths = units(skeleton.model, skeleton.block_lists)
        head_units = self.head_units(paths)
        pinned = _PINNED_SHARE * (free_memory("cpu") / self.processes.local_count - self.boundaries.reserved)
        self.weights = FrozenWeights(skeleton, paths, self.device, room, pinned)
        inner = [unit for unit in paths if unit not in head_units]
        parking = Parking.on(self.device, [*model.buffers(), *self._load_outside(skeleton, skeleton.outside(paths))])
        self._lockstep = Lockstep(model, inner, skeleton.block_lists, parking)
        self._names: dict[str, dict[str, str]] = {}  # of a unit's weights: in the base, and with a LoRA
        for unit in inner:
            self._wrap(unit, checkpointed=True)
        for unit in head_units:
            self._wrap(unit, checkpointed=False)

    def loss(self, batches: Iterable[Mapping[str, Any]], *, autocast: bool = False) -> torch.Tensor:
        """Add the gradients of a step's mean loss to the LoRA's, and return that loss.

        Every micro-batch draws its random numbers (dropout) from its own seed, taken from the global generator.
        Of several processes, each takes its share of the micro-batches, and all get the same; the LoRA must have no
        gradients before.

        Args:
            batches: the micro-batches, of all processes: the model's inputs by name, on any device, with ``labels``,
                (rows, T), which are -100 where a token does not count.
            autocast: whether to compute in bfloat16 where that is safe.

        Raises:
            EmlocError: a block runs twice or writes to a buffer, no token counts, or the base has changed.
        """
        with self.processes.together():
            tokens: list[int] = []
            mine: dict[int, Mapping[str, Any]] = {}
            for batch in batches:
                if self.processes.takes(len(tokens)):
                    mine[len(tokens)] = batch
                tokens.append(self.count_tokens(batch))
            if not any(tokens):
                raise EmlocError("No token of a step counts towards its loss.", "Give rows with completions.")
            seeds = torch.randint(2**63 - 1, (len(tokens),)).tolist()
            total = self._share(list(mine.values()), sum(tokens), [seeds[index] for index in mine], autocast=autocast)
        self.processes.add(total, self._trained)
        return total

    def _share(
        self, batches: Sequence[Mapping[str, Any]], tokens: int, seeds: Sequence[int], *, autocast: bool
    ) -> torch.Tensor:
        """Add the gradients of this process's micro-batches, and return their part of the loss."""
        if not batches:  # of the last rows of an epoch
            return torch.zeros((), device=self.device)
        # The last micro-batch first: the backward then starts with the first, and sums in the ordinary order.
        randomness = _Randomness(seeds[::-1], self.device)
        # Cast LoRA weights are not kept from one micro-batch for the others: their gradients would be summed in bf16.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=autocast, cache_enabled=False):
            try:
                forwards = [self.forward(batch, 1 / tokens) for batch in reversed(batches)]
                with randomness.preserved():
                    losses = self._lockstep.advance(forwards, self._visit, around=randomness.using)
                total = torch.stack(losses).sum()
                total.backward()
            finally:
                self.boundaries.clear()
        return total.detach()

    def close(self) -> None:
        """Forget the weights and the activations that were kept."""
        self.weights.close()
        self.boundaries.close()

    def head_units(self, paths: Sequence[str]) -> list[str]:
        """Return the units outside the backbone, whose weights the loss reads in pieces: they are not recomputed."""
        backbone = f"{self.model.base_model_prefix}."
        head_units = [unit for unit in paths if not unit.startswith(backbone)]
        if len(head_units) == len(paths):
            raise EmlocError(
                f"{type(self.model).__name__} has no backbone apart from its head, so that its loss cannot be "
                "streamed.",
                "Train it by ordinary steps: leave out exact steps.",
            )
        self._head = Head(self.model)
        return head_units

    def count_tokens(self, batch: Mapping[str, Any]) -> int:
        """Return the number of tokens of a micro-batch that count in the mean loss."""
        return count_tokens(batch)

    def forward(self, batch: Mapping[str, Any], weight: float) -> Callable[[], torch.Tensor]:
        """Return a forward of a micro-batch, in lockstep with the others: its summed loss, times ``weight``."""

        def forward() -> torch.Tensor:
            inputs = self.moved(batch)
            labels = shifted_labels(inputs)
            arguments = {name: value for name, value in inputs.items() if name not in ("labels", "shift_labels")}
            outputs = self.model.base_model(**arguments, use_cache=False)
            self._lockstep.pause(_HEAD, (outputs.last_hidden_state,))
            summed = self._head.loss(outputs, labels, weight)
            with self.boundaries.keeping():
                return with_gradient(*summed)

        return forward

    def moved(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return a micro-batch on the device."""
        return {name: _moved(value, self.device) for name, value in batch.items()}

    @contextmanager
    def _visit(self, unit: str) -> Iterator[None]:
        """Load a unit, and let it hold its weights: a model's code may read one when the unit has run."""
        with ExitStack() as stack:
            for name, tensor in self.weights.parameters(unit).items() if unit != _HEAD else ():
                owner, _, attribute = self._names[unit][name].rpartition(".")
                module = self.model.get_submodule(f"{unit}.{owner}".removesuffix("."))
                stack.callback(setattr, module, attribute, getattr(module, attribute))
                setattr(module, attribute, nn.Parameter(tensor, requires_grad=False))
            yield

    def _load_outside(self, skeleton: Skeleton, names: list[str]) -> Iterator[nn.Parameter]:
        """Load parameters that lie in no unit (a class embedding, say) for good, and yield them."""
        with skeleton.parameters(names) as parameters:
            for name, tensor in parameters.items():
                owner, _, attribute = name.rpartition(".")
                parameter = nn.Parameter(tensor.detach().to(self.device), requires_grad=False)
                setattr(self.model.get_submodule(owner), attribute, parameter)
                yield parameter

    def _wrap(self, unit: str, *, checkpointed: bool) -> None:
        """Have a unit's forward compute with the weights that are lent to it."""
        module = self.model.get_submodule(unit)
        body = _Body(module, module.forward)
        names = self._names[unit] = {
            name.replace(WRAPPER, ""): name
            for name, parameter in module.named_parameters()
            if not parameter.requires_grad
        }

        def run(*args: Any, **kwargs: Any) -> Any:
            lent = {f"unit.{names[name]}": tensor for name, tensor in self.weights.parameters(unit).items()}
            before = _written(module)
            result = functional_call(body, lent, args, kwargs, tie_weights=False)
            if _written(module) != before:
                raise EmlocError(
                    f"{unit} writes to a buffer in its forward, and would do so again when it is recomputed.",
                    "Train this model by ordinary steps: leave out exact steps.",
                )
            return result

        def recomputed(*args: Any, **kwargs: Any) -> Any:
            # For keyword arguments, torch neither passes tensors to its hooks nor keeps a GPU's random state. The
            # closure holds no hidden states, which may wait elsewhere.
            count, names = len(args), [name for name, value in kwargs.items() if _is_hidden(value)]
            others = {name: value for name, value in kwargs.items() if name not in names}

            def by_position(*values: Any) -> Any:
                return run(*values[:count], **dict(zip(names, values[count:], strict=True)), **others)

            with self.boundaries.keeping():
                return checkpoint(by_position, *args, *map(kwargs.get, names), use_reentrant=False)

        module.forward = recomputed if checkpointed else run


def _is_hidden(value: Any) -> bool:
    """Return whether an argument is like hidden states; a mask, which all blocks share, has a dimension more."""
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() < 4


class _Body(nn.Module):
    """A unit under its own forward, so that its parameters can be given while its ``forward`` is replaced."""

    def __init__(self, unit: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.unit, self._forward = unit, forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs)


class _Randomness:
    """A random state for every micro-batch, so that its numbers do not depend on when the others run."""

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self._seeds = seeds
        self._states: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}
        self._gpu = device if devices.is_accelerator(device) else None

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Restore the global state at the end."""
        gpus = [self._gpu] if self._gpu else []
        with torch.random.fork_rng(gpus, device_type=self._gpu.type if self._gpu else "cuda"):
            yield

    @contextmanager
    def using(self, index: int) -> Iterator[None]:
        """Draw from a micro-batch's own state."""
        if index in self._states:
            processor, gpu = self._states[index]
            torch.set_rng_state(processor)
            if self._gpu:
                devices.interface(self._gpu).set_rng_state(gpu, self._gpu)
        else:
            torch.manual_seed(self._seeds[index])
        yield
        gpu = devices.interface(self._gpu).get_rng_state(self._gpu) if self._gpu else None
        self._states[index] = torch.get_rng_state(), gpu


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value


def _written(module: nn.Module) -> list[tuple[int, int]]:
    return [(id(buffer), writes(buffer)) for buffer in module.buffers()]
