"""Traces what a step of a model allocates, by running that step on fake tensors.

There are no formulas per architecture: the model, PEFT's LoRA, the trainer's loss and torch's backward are run, and a
ledger follows each storage from allocation to release. It sees what torch allocates for tensors, but not the scratch
memory that a kernel uses within one operation (``docs/memory.md``).
"""

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import DynamicCache

from emloc_core.compat.peft import leave_casts_to_autocast
from emloc_core.compat.torch import TorchDispatchMode, is_device_call, storage_id, tree_leaves
from emloc_core.memory.fake import without_contents

if TYPE_CHECKING:
    from emloc_core.objective import Step

#: Bytes by kind: weights, adapter, gradients, kv_cache, logits, activations (all else).
Composition = Counter[str]
#: A trace: the composition at the peak of each phase of a step, by phase, in order.
Phases = dict[str, Composition]


class Ledger(TorchDispatchMode):
    """Follows the storages of all tensors created while it is active.

    Args:
        widths: last dimensions that distinguish logits from other activations.

    Attributes:
        phase: name of the current phase, set by the caller.
        phases: the largest composition of each phase so far.
    """

    def __init__(self, widths: Sequence[int] = ()) -> None:
        super().__init__()
        self.phase = "forward"
        self.phases: Phases = {}
        self._widths = frozenset(widths)
        self._alive: dict[int, tuple[int, str, Any]] = {}
        self._now: Composition = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_device_call(func):  # two thirds of all calls
            return args[0].fake_device
        result = func(*args, **(kwargs or {}))
        for tensor in (result,) if isinstance(result, torch.Tensor) else tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                wide = tensor.dim() > 1 and tensor.shape[-1] in self._widths
                self._add(tensor, "logits" if wide else "activations")
        return result

    def enter(self, tensor: torch.Tensor, kind: str) -> None:
        """Add a tensor as of this kind, or change its kind."""
        key = storage_id(tensor.untyped_storage())
        if key in self._alive:
            size, before, reference = self._alive[key]
            self._alive[key] = (size, kind, reference)
            self._now[before] -= size
            self._now[kind] += size
        else:
            self._add(tensor, kind)

    def _add(self, tensor: torch.Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        key, size = storage_id(storage), storage.nbytes()
        if key not in self._alive:
            self._alive[key] = (size, kind, weakref.ref(storage, lambda _: self._remove(key)))
            self._now[kind] += size
        if self._now.total() > self.phases.get(self.phase, Counter()).total():
            self.phases[self.phase] = Counter(self._now)

    def _remove(self, key: int) -> None:
        size, kind, _ = self._alive.pop(key)
        self._now[kind] -= size


def trace_training(
    model: nn.Module,
    towers: Mapping[str, str],
    step: "Step",
    *,
    checkpointing: bool,
    accumulating: bool,
    bf16: bool,
    apart: Mapping[str, int] | None = None,
) -> Phases:
    """Run forward, loss and backward of one training step, as in stage 2.

    Args:
        model: a PEFT model on the meta device, in which only the LoRAs require gradients.
        towers: module path of the list of blocks -> name of the tower, in execution order.
        step: its rows.
        checkpointing: whether activations are recomputed in the backward pass.
        accumulating: whether gradients of an earlier forward pass exist from the start.
        bf16: whether the forward runs under autocast to bfloat16.
        apart: module path of a list of blocks -> number of its first blocks that differ from the others, and so form
            their own phases (DeepStack adds to their outputs).

    Returns:
        Peaks of the phases: the towers' forward passes, the loss, and the backward passes of each tower's last block,
        of the blocks between, and of the first.
    """
    base: Any = model.get_base_model()  # type: ignore[operator]
    model.train()
    if bf16:
        leave_casts_to_autocast(model)
    step.prepare(model, checkpointing=checkpointing)
    blocks = {path: len(base.get_submodule(path)) for path in towers}
    with step.tracing(base) as mode:
        parameters = without_contents(model, mode)
        with Ledger(step.widths(base)) as ledger:
            _enter_parameters(ledger, parameters)
            _follow_forward(ledger, base, towers, apart or {})
            for name, parameter in base.named_parameters():
                if parameter.requires_grad:
                    if accumulating:
                        parameter.grad = torch.zeros_like(parameter)
                        ledger.enter(parameter.grad, "gradients")
                    phase = _backward_phase(name, towers, blocks, apart or {})
                    parameter.register_post_accumulate_grad_hook(_follow_backward(ledger, phase))
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss, _alive = step.loss(model)
            ledger.phase = "loss backward"
            loss.backward()
    return ledger.phases


def trace_inference(
    model: nn.Module, towers: Mapping[str, str], step: "Step", apart: Mapping[str, int] | None = None
) -> Phases:
    """Run the forward pass of a first answer.

    Arguments and result are as for :func:`trace_training`; the model is an ordinary one on the meta device.
    """
    model.eval()
    with step.tracing(model) as mode, torch.no_grad():
        parameters = without_contents(model, mode)
        with Ledger(step.widths(model)) as ledger:
            _enter_parameters(ledger, parameters)
            _follow_forward(ledger, model, towers, apart or {})
            step.predict(model, ledger.enter)
    return ledger.phases


class EnteredCache(DynamicCache):
    """A KV cache that enters its tensors in the ledger.

    Args:
        enter: :meth:`Ledger.enter`.
        config: of the model.
    """

    def __init__(self, enter: Callable[[torch.Tensor, str], None], config: Any) -> None:
        super().__init__(config=config)
        self._enter = enter

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Add keys and values, and enter them."""
        keys, values = super().update(*args, **kwargs)
        for tensor in (keys, values):
            self._enter(tensor, "kv_cache")
        return keys, values


def _enter_parameters(ledger: Ledger, parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        ledger.enter(parameter, "adapter" if parameter.requires_grad else "weights")


def _follow_forward(ledger: Ledger, model: Any, towers: Mapping[str, str], apart: Mapping[str, int]) -> None:
    """Set the phases of the forward pass: one per tower, and one after the last block of the last tower."""

    def reach(phase: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if "backward" not in ledger.phase:  # checkpointed blocks run again
                ledger.phase = phase

        return hook

    for path, tower in towers.items():
        blocks, first = model.get_submodule(path), apart.get(path, 0)
        if first:
            blocks[0].register_forward_pre_hook(reach(f"{tower} forward, first blocks"))
        if first < len(blocks):
            blocks[first].register_forward_pre_hook(reach(f"{tower} forward"))
    model.get_submodule(list(towers)[-1])[-1].register_forward_hook(reach("logits and loss"))


def _backward_phase(name: str, towers: Mapping[str, str], blocks: Mapping[str, int], apart: Mapping[str, int]) -> str:
    """Return the phase that begins once the parameter ``name`` has its gradient."""
    for path, tower in towers.items():
        if name.startswith(f"{path}."):
            index, first = int(name.removeprefix(f"{path}.").partition(".")[0]), apart.get(path, 0)
            last = index == blocks[path] - 1
            place = "last block" if last else "blocks between" if index > first else "first blocks"
            return f"{tower} backward, {place}"
    return "backward"


def _follow_backward(ledger: Ledger, phase: str) -> Callable[[torch.Tensor], None]:
    """Return a hook for a LoRA's gradient, which tells the block that the backward pass has reached."""

    def hook(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        ledger.enter(parameter.grad, "gradients")
        ledger.phase = phase

    return hook
