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
from emloc_core.compat.torch import DispatchMode, storage_id, storage_of, tree_leaves
from emloc_core.memory.depth import Composition, Copies, Depth, Moment, Phases, State, extended
from emloc_core.memory.fake import without_contents
from emloc_core.standins.layer import take_what_autocast_takes

if TYPE_CHECKING:
    from emloc_core.objective import Step


class Ledger(DispatchMode):
    """Follows the storages of all tensors created while it is active.

    Args:
        widths: last dimensions that distinguish logits from other activations.

    Attributes:
        phase: name of the current phase, set by the caller.
        copies: of every tower; the caller sets their states.
        peaks: the largest composition of each moment so far.
        now: what is alive.
        births: how many storages there were so far.
    """

    def __init__(self, widths: Sequence[int] = ()) -> None:
        super().__init__()
        self.phase = "forward"
        self.copies: dict[str, Copies] = {}
        self.peaks: dict[Moment, Composition] = {}
        self.now: Composition = Counter()
        self._widths = frozenset(widths)
        self._alive: dict[int, tuple[int, str, int, Any]] = {}
        self.births = 0

    @property
    def phases(self) -> Phases:
        """The peak of each phase, with all blocks of all towers."""
        return extended(self.peaks, list(self.copies.values()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in (result,) if isinstance(result, torch.Tensor) else tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:  # on that device nothing takes room
                wide = tensor.dim() > 1 and tensor.shape[-1] in self._widths
                self._add(tensor, "logits" if wide else "activations")
        return result

    def enter(self, tensor: torch.Tensor, kind: str) -> None:
        """Add a tensor as of this kind, or change its kind."""
        key = storage_id(storage_of(tensor))
        if key in self._alive:
            size, before, *rest = self._alive[key]
            self._alive[key] = (size, kind, *rest)
            self.now[before] -= size
            self.now[kind] += size
        else:
            self._add(tensor, kind)

    def _add(self, tensor: torch.Tensor, kind: str) -> None:
        storage = storage_of(tensor)
        key, size = storage_id(storage), storage.nbytes()
        if key not in self._alive:
            self._alive[key] = (size, kind, self.births, weakref.ref(storage, lambda _: self._remove(key)))
            self.births += 1
            self.now[kind] += size
        moment = Moment(self.phase, tuple(copies.states for copies in self.copies.values()))
        if self.now.total() > self.peaks.get(moment, Counter()).total():
            self.peaks[moment] = Counter(self.now)

    def _remove(self, key: int) -> None:
        size, kind, *_ = self._alive.pop(key)
        self.now[kind] -= size

    def survivors(self, births: range) -> Composition:
        """Return what is alive of the storages of these births."""
        alive: Composition = Counter()
        for size, kind, birth, _ in self._alive.values():
            if birth in births:
                alive[kind] += size
        return alive


def trace_training(
    model: nn.Module,
    towers: Mapping[str, str],
    depths: Mapping[str, Depth],
    step: "Step",
    *,
    checkpointing: bool,
    accumulating: bool,
    bf16: bool,
) -> Phases:
    """Run forward, loss and backward of one training step, as in stage 2.

    Args:
        model: a PEFT model on the meta device, in which only the LoRAs require gradients, with the first few blocks of
            each tower.
        towers: module path of the list of blocks -> name of the tower, in execution order.
        depths: module path of the list of blocks -> those of the whole model. The first that differ from the others
            form their own phases (DeepStack adds to their outputs).
        checkpointing: whether activations are recomputed in the backward pass.
        accumulating: whether gradients of an earlier forward pass exist from the start.
        bf16: whether the forward runs under autocast to bfloat16.

    Returns:
        Peaks of the phases with all blocks: the towers' forward passes, the loss, and the backward passes of each
        tower's last block, of the blocks between, and of the first.
    """
    base: Any = model.get_base_model()  # type: ignore[operator]
    model.train()
    if bf16:
        leave_casts_to_autocast(model)
        take_what_autocast_takes(model)
    step.prepare(model, checkpointing=checkpointing)
    with step.tracing(base):
        parameters = without_contents(model)
        with Ledger(step.widths(base)) as ledger:
            _follow_forward(ledger, base, towers, depths)
            _enter_parameters(ledger, parameters)
            for copies in ledger.copies.values():
                gradients = Counter(gradients=copies.held[State.WAITING]["adapter"])
                for state in State if accumulating else (State.DONE,):
                    copies.held[state] = copies.held[state] + gradients
            for name, parameter in base.named_parameters():
                if parameter.requires_grad:
                    if accumulating:
                        parameter.grad = torch.zeros_like(parameter)
                        ledger.enter(parameter.grad, "gradients")
                    parameter.register_post_accumulate_grad_hook(_follow_backward(ledger, name, towers, depths))
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss, _alive = step.loss(model)
            ledger.phase = "loss backward"
            for copies in ledger.copies.values():
                copies.held[State.KEPT] = copies.held[State.KEPT] + ledger.survivors(copies.births)
                copies.states = (State.KEPT,)
            loss.backward()
    return ledger.phases


def trace_inference(model: nn.Module, towers: Mapping[str, str], depths: Mapping[str, Depth], step: "Step") -> Phases:
    """Run the forward pass of a first answer.

    Arguments and result are as for :func:`trace_training`; the model is an ordinary one on the meta device.
    """
    model.eval()
    with step.tracing(model), torch.no_grad():
        parameters = without_contents(model)
        with Ledger(step.widths(model)) as ledger:
            _follow_forward(ledger, model, towers, depths)
            _enter_parameters(ledger, parameters)
            step.predict(model, ledger.enter)
    return ledger.phases


class EnteredCache(DynamicCache):
    """A KV cache that enters its tensors in the ledger.

    Args:
        enter: :meth:`Ledger.enter`.
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
        ledger.enter(parameter, _kind(parameter))


def _kind(parameter: nn.Parameter) -> str:
    return "adapter" if parameter.requires_grad else "weights"


def _follow_forward(ledger: Ledger, model: Any, towers: Mapping[str, str], depths: Mapping[str, Depth]) -> None:
    """Set the phases of the forward pass: one per tower, and one after the last block of the last tower."""

    def reach(phase: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if "backward" not in ledger.phase:  # checkpointed blocks run again
                ledger.phase = phase

        return hook

    for path, tower in towers.items():
        blocks, depth = model.get_submodule(path), depths[path]
        if depth.apart:
            blocks[0].register_forward_pre_hook(reach(f"{tower} forward, first blocks"))
        if depth.apart < len(blocks):
            blocks[depth.apart].register_forward_pre_hook(reach(f"{tower} forward"))
        if depth.copies:
            ledger.copies[path] = _followed_copies(ledger, blocks, depth)
    model.get_submodule(list(towers)[-1])[-1].register_forward_hook(reach("logits and loss"))


def _followed_copies(ledger: Ledger, blocks: Any, depth: Depth) -> Copies:
    """Return the copies of a tower's blocks, whose states are set in the forward pass, with what they leave there."""
    own: Composition = Counter()
    for index in depth.copied:
        for parameter in blocks[index].parameters():
            own[_kind(parameter)] += parameter.nbytes
    copies = Copies(depth.copies, dict.fromkeys(State, own))

    def begin(*_: Any) -> None:
        if copies.states == (State.WAITING,):  # checkpointed blocks run again
            copies.states, copies.births = (State.WAITING, State.PASSED), range(ledger.births, ledger.births)
            copies.held[State.PASSED] = Counter(copies.held[State.PASSED])
            copies.held[State.PASSED].subtract(ledger.now)

    def end(*_: Any) -> None:
        if copies.states == (State.WAITING, State.PASSED):
            copies.states, copies.births = (State.PASSED,), range(copies.births.start, ledger.births)
            copies.held[State.PASSED].update(ledger.now)

    blocks[depth.copied.start].register_forward_pre_hook(begin)
    blocks[depth.copied.stop].register_forward_pre_hook(end)
    return copies


def _follow_backward(
    ledger: Ledger, name: str, towers: Mapping[str, str], depths: Mapping[str, Depth]
) -> Callable[[torch.Tensor], None]:
    """Return a hook for the gradient of a parameter, which records what the backward pass has reached."""
    phase, reached = "backward", ""
    states: tuple[State, ...] = (State.KEPT,)
    for path, tower in towers.items():
        if name.startswith(f"{path}."):
            index, depth = int(name.removeprefix(f"{path}.").partition(".")[0]), depths[path]
            last = index == depth.few - 1
            where = "last block" if last else "blocks between" if index > depth.apart else "first blocks"
            phase, reached = f"{tower} backward, {where}", path
            states = _after_gradient(index, depth.copied)

    def hook(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        ledger.enter(parameter.grad, "gradients")
        ledger.phase = phase
        if reached in ledger.copies:
            ledger.copies[reached].states = states

    return hook


def _after_gradient(block: int, copied: range) -> tuple[State, ...]:
    """Return the states that copies of the blocks ``copied`` may be in as soon as a block has got a gradient."""
    if block < copied.start:
        return (State.DONE,)
    return (State.KEPT, State.DONE) if block in copied else (State.KEPT,)
