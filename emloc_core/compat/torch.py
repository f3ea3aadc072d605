"""torch: fake tensors, which have shapes but no contents; storages, writes in place, and children of modules.

``FakeTensorMode`` is what ``torch.export`` and ``torch.compile`` run on, and lies in a private package all the same.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import nn

from emloc_core.compat.private import patched, private

with private("torch"):
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeTensor,
        FakeTensorMode,
    )
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["FakeTensorMode", "TorchDispatchMode", "tree_leaves", "tree_map"]


@contextmanager
def fake_tensors(*, whole_numbers: bool) -> Iterator[FakeTensorMode]:
    """Make all tensors that are created in the context fake.

    Args:
        whole_numbers: whether known integers keep their contents; see :class:`_WholeNumbers`.
    """
    kind = _WholeNumbers if whole_numbers else FakeTensorMode
    # Models check that there are as many image tokens as image features, which fake tensors cannot tell.
    unchecked = patched("torch", "torch", _check_tensor_all_with=lambda *_, **__: None)
    # transformers' product of each expert with its tokens takes real tensors in fp32, but not fake ones.
    experts = patched("transformers", "transformers.integrations.moe", _grouped_mm=_first_expert)
    with unchecked, experts, kind(allow_non_fake_inputs=True) as mode:
        yield mode


class _WholeNumbers(FakeTensorMode):
    """Fake tensors, except that integers from ``arange``, or computed from known integers, keep their contents.

    For models that read the number of patches from an image's grid, or the positions of its tokens in a row. Large
    tensors, such as a mask of all pairs of tokens, are fake too.
    """

    _LARGEST = 1 << 22  # elements

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        are_known = all(_is_known(tensor) for tensor in operands)
        if not are_known or not (operands or func is torch.ops.aten.arange.default):
            if func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_):
                args = (args[0], _without_masks(args[1]), *args[2:])
            return super().__torch_dispatch__(func, types, args, kwargs)
        try:
            fake = super().__torch_dispatch__(func, types, args, kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            return func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves(fake) if isinstance(leaf, torch.Tensor)]
        if any(tensor.is_floating_point() or tensor.numel() > self._LARGEST for tensor in tensors):
            return fake
        return func(*args, **kwargs)


def _is_known(tensor: torch.Tensor) -> bool:
    return not isinstance(tensor, FakeTensor) and not tensor.is_floating_point()


def _without_masks(indices: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Return indices with every known mask replaced by the indices of its elements."""
    replaced: list[torch.Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool and _is_known(index):
            replaced += index.nonzero().unbind(1)
        else:
            replaced.append(index)
    return replaced


def _first_expert(tokens: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
    """Multiply all tokens by the first expert: the same result size, the same tensors saved."""
    with torch.autocast("cpu", enabled=False):
        return tokens.to(weight.dtype) @ weight[0]


def has_contents(tensor: torch.Tensor) -> bool:
    """Return whether a tensor has numbers, and not only a shape."""
    return not isinstance(tensor, FakeTensor) and not tensor.is_meta


def is_device_call(operation: Any) -> bool:
    """Return whether an operation that a ``TorchDispatchMode`` sees asks for a tensor's device: most of them do."""
    return operation is torch.ops.prim.device.default


class HollowTensor(torch.Tensor):
    """A tensor with a shape, a dtype and a device, and no numbers: its subclass computes operations on it."""

    with private("torch"):
        __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def hollow(cls, size: Sequence[int], like: torch.Tensor) -> Self:
        """Return one of this shape, with the dtype and the device of another tensor."""
        with private("torch"):
            make: Any = torch.Tensor._make_wrapper_subclass
        return make(cls, size, dtype=like.dtype, device=like.device)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return cls.compute(func, *args)

    @classmethod
    def compute(cls, operation: Any, *args: Any) -> Any:
        """Return the result of an operation of ``torch.ops.aten`` with one of these tensors among its arguments."""
        raise NotImplementedError


def children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the direct children of a module with their names; one with two names twice, unlike ``named_children``."""
    return [(name, child) for name, child in module._modules.items() if child is not None]


def storage_id(storage: torch.UntypedStorage) -> int:
    """Return a number that no other storage has while this one lives; addresses of fake ones are all 0."""
    return storage._cdata


def writes(tensor: torch.Tensor) -> int:
    """Return how often a tensor, or a view of it, was written to in place: autograd counts it."""
    return tensor._version
