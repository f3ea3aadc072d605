"""A device that is none: torch's ``privateuse1`` by another name, whose tensors keep their numbers on the CPU.

It has no streams, no pinned memory and no count of its memory: the least that an accelerator may be. It is registered
for good, so a test uses it in a process of its own.
"""

from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "pretended"
#: Operations that a real device would have made the CPU wait for, as they were computed: their results, or the shapes
#: of these, are needed there.
WAITS: list[str] = []
_TOLD = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::is_nonzero", "aten::equal"}


class Pretended(torch.Tensor):
    """A tensor there."""

    numbers: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def of(cls, numbers: torch.Tensor) -> "Pretended":
        """Return a tensor there with the numbers of one on the CPU."""
        place = {"strides": numbers.stride(), "storage_offset": numbers.storage_offset(), "dtype": numbers.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, numbers.shape, device=torch.device(NAME, 0), **place)
        tensor.numbers = numbers
        return tensor

    def tolist(self) -> Any:
        """Return the numbers, which torch gives of no subclass."""
        WAITS.append("tolist")
        return self.numbers.tolist()

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(operation, *args, **(kwargs or {}))


class _Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def pretend() -> list[torch.library.Library]:
    """Have torch know the device, as long as the result lives."""
    _setup_privateuseone_for_python_backend(NAME, _Backend())
    every, some = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    every.fallback(_compute, "PrivateUse1")
    # `torch.tensor(..., device=)` does not find the other; `torch.eye` would resize what it has made.
    for operation in (torch.ops.aten._to_copy.default, torch.ops.aten.eye.default):
        some.impl(operation, partial(_compute, operation), "PrivateUse1")
    return [every, some]


def _compute(operation: Any, *args: Any, **kwargs: Any) -> Any:
    """Compute an operation on the CPU; its results are there if its arguments are, or if it is asked for them there."""
    given = {id(leaf.numbers): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Pretended)}
    device = kwargs.get("device")
    is_there = bool(given) if device is None else torch.device(device).type == NAME
    if is_there and any(_is_elsewhere(leaf) for leaf in args) and "copy" not in operation.name():
        raise RuntimeError(f"{operation} mixes devices")
    to_cpu = bool(given) and device is not None and not is_there
    if given and (operation.name().partition(".")[0] in _TOLD or (to_cpu and not kwargs.get("non_blocking"))):
        WAITS.append(operation.name())
    results = operation(*tree_map(_numbers, args), **tree_map(_numbers, kwargs))

    def placed(result: Any) -> Any:
        if not is_there or not isinstance(result, torch.Tensor):
            return result
        return given[id(result)] if id(result) in given else Pretended.of(result)  # what was written to in place

    return tree_map(placed, results)


def _is_elsewhere(value: Any) -> bool:
    """Return whether a value is a tensor that a real device would not find in its memory; scalars it takes."""
    return isinstance(value, torch.Tensor) and not isinstance(value, Pretended) and value.dim() > 0


def _numbers(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == NAME:
        return torch.device("cpu")
    return value.numbers if isinstance(value, Pretended) else value
