"""torch: tensors that have shapes but no contents; storages, writes in place, and children of modules."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Self

import torch
from torch import nn

from emloc_core.compat.private import patched, private

with private("torch"):
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["tree_leaves", "tree_map"]

_INDEXING = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)


class HollowTensor(torch.Tensor):
    """A tensor with a shape, a dtype and a device, and no numbers: its subclass computes operations on it."""

    with private("torch"):
        __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
        _make: Any = torch.Tensor._make_wrapper_subclass

    @classmethod
    def hollow(cls, size: Sequence[int], like: torch.Tensor, **layout: Any) -> Self:
        """Return one of this shape, with the dtype and the device of another tensor.

        Args:
            layout: ``strides``, ``storage_offset`` or another ``device``.
        """
        tensor: Self = cls._make(cls, size, **{"dtype": like.dtype, "device": like.device, **layout})
        return tensor

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return cls.compute(func, *args)

    @classmethod
    def compute(cls, operation: Any, *args: Any) -> Any:
        """Return the result of an operation of ``torch.ops.aten`` with one of these tensors among its arguments."""
        raise NotImplementedError


class FakeTensor(HollowTensor):
    """A tensor on the CPU with a shape and no contents; operations compute its ``outline``, on torch's meta device.

    An outline alone would not do: autocast does not know that device, and models treat it in their own ways.
    """

    outline: torch.Tensor

    @classmethod
    def of(cls, outline: torch.Tensor) -> "FakeTensor":
        """Return the tensor of an outline."""
        place = {"strides": outline.stride(), "storage_offset": outline.storage_offset(), "device": "cpu"}
        fake = cls.hollow(outline.shape, outline, **place)
        fake.outline = outline
        return fake


@contextmanager
def fake_tensors(*, whole_numbers: bool) -> Iterator[None]:
    """Make all tensors that are created in the context fake.

    torch has fake tensors of its own, for ``torch.export``, on which a step takes more than twice as long.

    Args:
        whole_numbers: whether numbers of ``arange`` are known: some models read the number of patches from an image's
            grid, or the positions of its tokens in a row.
    """
    # Models check that there are as many image tokens as image features, which shapes cannot tell.
    unchecked = patched("torch", "torch", _check_tensor_all_with=lambda *_, **__: None)
    # Where the contents of a mask decide what runs, transformers asks whether there are any.
    asked = patched("transformers", "transformers.utils.import_utils", is_fake_tensor=lambda x: not has_contents(x))
    # transformers' product of each expert with its tokens reads how many each has.
    experts = patched("transformers", "transformers.integrations.moe", _grouped_mm=_first_expert)
    with unchecked, asked, experts, _FakeMode(whole_numbers=whole_numbers):
        yield


class DispatchMode(TorchDispatchMode):
    """Sees every operation, below autograd and autocast.

    torch wraps such modes for its compiler, which takes half as long again per operation.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class _FakeMode(DispatchMode):
    """Computes outlines in place of tensors, except from tensors that are known, such as ``torch.tensor([1, 2])``.

    What is computed from these alone is known too, unless it is large, such as a mask of all pairs of tokens.
    """

    _LARGEST = 1 << 22  # elements

    def __init__(self, *, whole_numbers: bool) -> None:
        super().__init__()
        self._known = torch.ops.aten.arange if whole_numbers else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, HollowTensor) and not issubclass(kind, FakeTensor) for kind in types):
            return NotImplemented  # the other tensor computes the operation
        given, kwargs = args, kwargs or {}
        fakes: dict[int, FakeTensor] = {}
        others: list[torch.Tensor] = []
        if func.overloadpacket in _INDEXING:
            args = (args[0], _without_masks(args[1]), *args[2:])
        args = _outlined(args, fakes, others)
        options = {name: _outlined(value, fakes, others) for name, value in kwargs.items()}
        if _takes_device(func) and ("device" in options or not fakes):
            options["device"] = "meta"
        if fakes or not (others or func.overloadpacket is self._known):
            try:
                return _with_outlines(func(*args, **options), fakes)
            except NotImplementedError as error:  # whose words are for those who write operations
                raise NotImplementedError(f"{func} takes the numbers, not only their shapes") from error
        try:
            outlines = [leaf for leaf in tree_leaves(func(*args, **options)) if isinstance(leaf, torch.Tensor)]
        except RuntimeError:  # the shape depends on the contents
            outlines = []
        # Parameters that were left on the meta device stay there: only their shapes are asked for.
        if any(outline.numel() > self._LARGEST for outline in outlines) and any(map(has_contents, others)):
            return _with_outlines(func(*args, **options), fakes)
        return func(*given, **kwargs)


def _outlined(value: Any, fakes: dict[int, FakeTensor], others: list[torch.Tensor]) -> Any:
    """Return an argument with outlines in place of tensors; add these to ``fakes``, by outline, or to ``others``."""
    if isinstance(value, FakeTensor):
        fakes[id(value.outline)] = value
        return value.outline
    if isinstance(value, torch.Tensor):
        others.append(value)
        return value.to("meta")
    return [_outlined(item, fakes, others) for item in value] if isinstance(value, list | tuple) else value


def _with_outlines(value: Any, fakes: Mapping[int, FakeTensor]) -> Any:
    """Return a result with tensors in place of outlines: what was written in place is the tensor that it was."""
    if isinstance(value, torch.Tensor):
        return fakes[id(value)] if id(value) in fakes else FakeTensor.of(value)
    return type(value)(_with_outlines(item, fakes) for item in value) if isinstance(value, list | tuple) else value


@cache
def _takes_device(operation: Any) -> bool:
    with private("torch"):
        return any(argument.name == "device" for argument in operation._schema.arguments)


def _without_masks(indices: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Return indices with every known mask replaced by the indices of its elements."""
    replaced: list[torch.Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool and has_contents(index):
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
    return not isinstance(tensor, HollowTensor) and not tensor.is_meta


def children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the direct children of a module with their names; one with two names twice, unlike ``named_children``."""
    return [(name, child) for name, child in module._modules.items() if child is not None]


def storage_of(tensor: torch.Tensor) -> torch.UntypedStorage:
    """Return the storage that a tensor shares with its views; of one with a shape alone, its outline's."""
    return (tensor.outline if isinstance(tensor, FakeTensor) else tensor).untyped_storage()


def storage_id(storage: torch.UntypedStorage) -> int:
    """Return a number that no other storage has while this one lives; addresses of those without contents are all 0."""
    return storage._cdata


def writes(tensor: torch.Tensor) -> int:
    """Return how often a tensor, or a view of it, was written to in place: autograd counts it."""
    return tensor._version
