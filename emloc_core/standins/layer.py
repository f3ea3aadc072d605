"""The layers that stand in for Linears in the model of an emulator, and putting them there."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from emloc_core import devices
from emloc_core.compat.torch import has_contents
from emloc_core.compat.transformers import grouped_product
from emloc_core.errors import EmlocError
from emloc_core.standins.transposed import TransposedLinear, as_conv1d, as_linear

#: Bytes that the matrices of experts, unpacked, may take at a time; a single one may be larger.
_UNPACKED = 256 << 20
#: Shape and dtype of what a layer keeps, by the name of the parameter.
Parts = dict[str, tuple[tuple[int, ...], torch.dtype]]


class StandInLinear(nn.Linear):
    """A Linear that keeps something other than its weight: a parameter ``weight``, and perhaps others.

    It is an ``nn.Linear``, so that PEFT puts a LoRA on it as on any Linear, with the keys of the base, and
    ``all-linear`` finds no inner Linears to target.

    Attributes:
        rank: of the factors that it keeps; None where it keeps none.
        dtype: that it computes in.
        transposed: whether the base has a Conv1D in its place.
    """

    #: Whether what it keeps may be trained, as a weight may.
    trainable = False
    transposed = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would allocate the weight
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.dtype = dtype or torch.get_default_dtype()
        for name, (shape, part_dtype) in self.parts(self.shape, rank, self.dtype).items():
            part = torch.empty(*shape, dtype=part_dtype, device=device)
            self.register_parameter(name, nn.Parameter(part, requires_grad=self.trainable))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )

    @classmethod
    def parts(cls, shape: tuple[int, int], rank: int | None, dtype: torch.dtype) -> Parts:
        """Return what is kept of a weight of this shape, which is of this dtype on the base; ``weight`` comes first."""
        raise NotImplementedError

    @staticmethod
    def unpack(*parts: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """Return the weight, of this shape and dtype, that the parts stand for."""
        raise NotImplementedError

    @classmethod
    def unpack_stack(cls, *parts: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """Return matrices of this shape and dtype, (E, m, n), from their parts, which have a leading E."""
        return torch.stack([cls.unpack(*tensors, shape=shape, dtype=dtype) for tensors in zip(*parts, strict=True)])

    @classmethod
    def grouped(
        cls, x: torch.Tensor, groups: "Groups", *parts: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype
    ) -> torch.Tensor:
        """Multiply rows that are sorted by expert, each group by its own matrix.

        Args:
            x: (rows, n).
            parts: of the matrices, with a leading E.

        Returns:
            (rows, m). Parts get no gradient.
        """
        unpack = partial(cls.unpack_stack, shape=shape, dtype=dtype)
        most = _most(shape, dtype)
        return _GroupedProduct.apply(x, groups, unpack, most, *parts)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight."""
        return self.out_features, self.in_features

    def tensors(self) -> list[torch.Tensor]:
        """Return what it keeps, in the order of :meth:`parts`."""
        return [getattr(self, name) for name in self.parts(self.shape, self.rank, self.dtype)]

    def unpacked(self) -> torch.Tensor:
        """Return the weight, (out_features, in_features)."""
        return self.unpack(*self.tensors(), shape=self.shape, dtype=self.dtype)

    def dense(self) -> nn.Module:
        """Return what the base has in its place, with the unpacked weight: an ordinary Linear, or a Conv1D."""
        weight = self.unpacked()
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, weight.device, weight.dtype)
        with torch.no_grad():
            linear.weight.copy_(weight)
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return as_conv1d(linear) if self.transposed else linear

    def extra_repr(self) -> str:
        """Describe the layer in the model's printout."""
        return super().extra_repr() if self.rank is None else f"{super().extra_repr()}, rank={self.rank}"


class PackedLinear(StandInLinear):
    """A Linear whose weight is unpacked in the forward pass, and again in the backward, and never kept."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (..., in_features) to (..., out_features)."""
        output = product(input, partial(self.unpack, shape=self.shape, dtype=self.dtype), *self.tensors())
        return output if self.bias is None else output + self.bias


def product(x: torch.Tensor, unpack: Callable[..., torch.Tensor], *parts: torch.Tensor) -> torch.Tensor:
    """Return ``x M^T``, (..., m), in the dtype of M, (m, n), or of autocast where that is on. M gets no gradient.

    Args:
        x: (..., n), any floating dtype.
        unpack: returns M from its parts.

    Raises:
        EmlocError: x is of whole numbers.
    """
    if not x.is_floating_point():
        raise EmlocError(
            "A packed Linear was given integers: the model's code casts its inputs to the dtype of its weight.",
            "List that Linear in keep_dense of the family's declaration, or choose the kind 'low-rank'.",
            code="unsupported",
        )
    return _Product.apply(x, unpack, *parts)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, unpack: Callable[..., torch.Tensor], *parts: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*parts)
        ctx.unpack = unpack
        matrix = unpack(*parts)
        return functional.linear(x if torch.is_autocast_enabled(x.device.type) else x.to(matrix.dtype), matrix)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        parts = ctx.saved_tensors  # checkpointing gives them once
        matrix = ctx.unpack(*parts)
        if matrix.dtype == torch.float16:  # in which gradients that autocast takes in bf16 would vanish
            matrix = matrix.to(gradient.dtype)
        return gradient.to(matrix.dtype) @ matrix, None, *(None for _ in parts)


def take_what_autocast_takes(model: nn.Module) -> None:
    """Let the packed Linears of a model in fp16 take it in autocast's dtype, as its other Linears do.

    bitsandbytes' return the dtype that they are given, and autocast to bfloat16 refuses to concatenate fp16.
    """
    if all(parameter.dtype != torch.float16 for parameter in model.parameters()):
        return

    def cast(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *others = args
        device = x.device.type
        is_cast = x.dtype == torch.float16 and torch.is_autocast_enabled(device)
        return (x.to(torch.get_autocast_dtype(device)) if is_cast else x, *others)

    for module in model.modules():
        if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward:
            module.register_forward_pre_hook(cast)


def _most(shape: tuple[int, int], dtype: torch.dtype) -> int:
    """Return how many matrices of experts are unpacked at a time."""
    return max(1, _UNPACKED // (shape[0] * shape[1] * dtype.itemsize))


def unpacked_bytes(shape: tuple[int, int], count: int, dtype: torch.dtype) -> int:
    """Return the bytes of the matrices that are unpacked at a time, of a stack of ``count``."""
    return min(count, _most(shape, dtype)) * shape[0] * shape[1] * dtype.itemsize


class Groups:
    """Rows that are sorted by expert.

    Args:
        ends: (E), int32: where the rows of each expert end.
    """

    def __init__(self, ends: torch.Tensor) -> None:
        self.ends = ends

    @cached_property
    def stops(self) -> list[int] | None:
        """The ends as Python's numbers; None where only shapes are known.

        This waits for a GPU: once for all products with these rows, forward and backward.
        """
        return self.ends.tolist() if has_contents(self.ends) else None

    def chunks(
        self, most: int, parts: Sequence[torch.Tensor], rows: int
    ) -> Iterator[tuple[slice, torch.Tensor, list[torch.Tensor]]]:
        """Yield rows, their ends and their experts' parts, for at most so many experts that have rows at a time.

        Where only shapes are known, the first chunk stands for all: the same result size, the same peak.

        Args:
            parts: of all experts' matrices, with a leading E.
        """
        last = self.stops
        if last is None:
            yield slice(0, rows), self.ends[:most], [part[:most] for part in parts]
            return
        first = [0, *last[:-1]]
        hit = [expert for expert, (start, stop) in enumerate(zip(first, last, strict=True)) if stop > start]
        for offset in range(0, max(1, len(hit)), most):
            experts = hit[offset : offset + most] or [0]  # rows of no expert have a width too
            index = _indices(experts, self.ends.device)
            start, stop = first[experts[0]], last[experts[-1]]
            yield slice(start, stop), self.ends[index] - start, [part[index] for part in parts]


def _indices(numbers: list[int], device: torch.device) -> torch.Tensor:
    """Return numbers as a tensor on a device, without waiting for a GPU: they are copied from pinned memory."""
    indices = torch.tensor(numbers, pin_memory=devices.copies_alongside(device))
    return indices.to(device, non_blocking=True)


class _GroupedProduct(torch.autograd.Function):
    """Rows times the matrices of their experts, of which only those that have rows are unpacked, some at a time."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, groups: Groups, unpack: Callable[..., torch.Tensor], most: int, *parts: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(*parts)
        ctx.groups, ctx.unpack, ctx.most = groups, unpack, most
        chunks = groups.chunks(most, parts, len(x))
        products = [grouped_product(x[rows], unpack(*tensors), ends) for rows, ends, tensors in chunks]
        with torch.autocast(x.device.type, enabled=False):  # to bfloat16, which refuses to concatenate fp16
            return torch.cat(products)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        parts = ctx.saved_tensors  # checkpointing gives them once
        chunks = ctx.groups.chunks(ctx.most, parts, len(gradient))
        gradients = [grouped_product(gradient[rows], ctx.unpack(*tensors).mT, ends) for rows, ends, tensors in chunks]
        return torch.cat(gradients), None, None, None, *(None for _ in parts)


def replace_linear(model: nn.Module, path: str, layer: type[StandInLinear], rank: int | None = None) -> None:
    """Replace one Linear with its empty stand-in, on the same device.

    Raises:
        EmlocError: the model has no Linear there.
    """
    try:
        linear = as_linear(model.get_submodule(path))
    except AttributeError:
        linear = None
    if not isinstance(linear, nn.Linear):
        raise EmlocError(
            f"The model has no Linear at {path}.",
            "The emulator belongs to another architecture: copy it again in full, or make it again.",
            code="mismatch",
        )
    device, dtype = linear.weight.device, linear.weight.dtype
    stand_in = layer(linear.in_features, linear.out_features, rank, linear.bias is not None, device, dtype)
    if layer.trainable:
        stand_in.requires_grad_(linear.weight.requires_grad)
    stand_in.transposed = isinstance(linear, TransposedLinear)
    stand_in.train(linear.training)
    model.set_submodule(path, stand_in)
