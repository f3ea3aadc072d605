"""Forward hooks, and forwards that replace a module's own, as context managers."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from emloc_core.algorithms.statistics import Side

#: Called with a Linear's path and activations of shape (..., features).
Sink = Callable[[str, torch.Tensor], None]


@contextmanager
def tapped(linears: Mapping[str, nn.Module], taps: Mapping[str, Side], sink: Sink) -> Iterator[None]:
    """Hook Linears so that every forward passes their activations to ``sink``.

    Args:
        taps: path -> ``"input"``, or ``"output"``, which is passed without the bias.
    """

    def hook(path: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def receive(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if taps[path] == "input":
                sink(path, args[0])
            else:
                bias = getattr(module, "bias", None)
                sink(path, output if bias is None else output.float() - bias.float())

        return receive

    with forward_hooks(((module, hook(path)) for path, module in linears.items()), first=True):
        yield


@contextmanager
def forward_hooks(
    hooks: Iterable[tuple[nn.Module, Callable[..., Any]]],
    *,
    before: bool = False,
    with_kwargs: bool = False,
    first: bool = False,
) -> Iterator[None]:
    """Register forward hooks, or pre-hooks, while the context is active.

    A hook's result, unless None, replaces the output; a pre-hook's (``before``) replaces the inputs.

    Args:
        first: they run before hooks that are there: they get what a module itself returns, without what is added to it.
    """
    with ExitStack() as stack:
        for module, hook in hooks:
            register: Any = module.register_forward_pre_hook if before else module.register_forward_hook
            stack.callback(register(hook, with_kwargs=with_kwargs, prepend=first).remove)
        yield


@contextmanager
def forwards(replacements: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Let other functions be the forwards of modules while the context is active: the modules' own are not computed.

    A module's hooks run as ever.
    """
    with ExitStack() as stack:
        for module, forward in replacements:
            own = module.__dict__.get("forward")  # one that another context has put there
            restored = partial(setattr, module, "forward", own) if own else partial(delattr, module, "forward")
            module.forward = forward
            stack.callback(restored)
        yield
