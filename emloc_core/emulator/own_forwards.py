"""Refuses Linears of classes that compute something else than ``W x + b``, which is all that stands in for them.

A family's tiny models need not have them: only some blocks of a large model may.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from emloc_core.emulator.ranks import LinearPlan
from emloc_core.errors import EmlocError
from emloc_core.model.hooks import forward_hooks
from emloc_core.model.streaming import Stream

#: How far two ways to compute a product may lie apart, as a share; in dtypes that round more, two roundings.
_ROUNDING = 1e-5


@contextmanager
def requiring_products(stream: Stream, planned: Sequence[LinearPlan], rows: int) -> Iterator[None]:
    """Watch samples pass through a block, and compare what such Linears return with ``W x + b``.

    Args:
        stream: samples ``0 .. rows - 1`` pass through the base.

    Raises:
        EmlocError: at the end, if one returned something else.
    """
    modules = {linear.path: stream.skeleton.model.get_submodule(linear.path) for linear in planned}
    others = {path: module for path, module in modules.items() if type(module).forward is not nn.Linear.forward}
    odd: list[str] = []

    def watching(path: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], output: Any) -> None:
            if stream.sample < rows and not _is_product(module, args, output):
                odd.append(path)

        return hook

    with forward_hooks((module, watching(path)) for path, module in others.items()):
        yield
    if odd:
        raise EmlocError(
            f"{odd[0]} is a {type(modules[odd[0]]).__name__}, which computes something else than W x + b.",
            "List it in keep_dense of the family's declaration.",
            code="plugin",
        )


def _is_product(module: Any, args: tuple[Any, ...], output: Any) -> bool:
    wanted = functional.linear(args[0], module.weight, module.bias)
    if not isinstance(output, torch.Tensor) or output.shape != wanted.shape:
        return False
    room = max(_ROUNDING, 2 * torch.finfo(wanted.dtype).eps)
    return float((output - wanted).double().norm()) <= room * float(wanted.double().norm())
