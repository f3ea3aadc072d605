"""Fake tensors, which have shapes but no contents, and what transformers' models need to run on them.

torch's ``FakeTensorMode`` runs operations for their shapes only. This module handles models that need a value (the
number of an image's patches, the positions of its tokens in a row), and kernels that refuse fake tensors.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._pytree import tree_leaves

from emloc_core.model.image_shape import ImageShape


def fake_inputs(
    rows: int, length: int, padded: bool, images: int = 0, image: ImageShape | None = None, image_token: int = 0
) -> dict[str, torch.Tensor]:
    """Return a collator's output: token ids, a mask if rows are padded, and pixels if there are images.

    Args:
        rows: rows per batch.
        length: tokens per row.
        padded: whether rows differ in length, so that attention needs a mask.
        images: images per row.
        image: the shape of each image.
        image_token: the id of image tokens.
    """
    ids = torch.zeros(rows, length, dtype=torch.int64)
    inputs = {"attention_mask": torch.ones_like(ids)} if padded else {}
    if image is not None:
        first, *rest = image.pixels
        inputs["pixel_values"] = torch.zeros(rows * images * first, *rest)
        if image.grid:  # such models look up the images' positions
            ids = ((torch.arange(length) < images * image.tokens).long() * image_token).repeat(rows, 1)
            inputs["image_grid_thw"] = torch.tensor([image.grid]).repeat(rows * images, 1)
            inputs["position_ids"] = torch.zeros(3, rows, length, dtype=torch.int64)  # in time, height and width
    return {"input_ids": ids, **inputs}


class _WholeNumbers(FakeTensorMode):
    """Fake tensors, except that integers from ``arange``, or computed from known integers, have their contents.

    For models that read the number of patches from an image's grid, or the positions of its tokens in a row. Large
    tensors, such as a mask of all pairs of tokens, are fake too.
    """

    _LARGEST = 1 << 22  # elements

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        known = all(_is_known(tensor) for tensor in given)
        if not known or not (given or func is torch.ops.aten.arange.default):
            if func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_):
                args = (args[0], _without_masks(args[1]), *args[2:])
            return super().__torch_dispatch__(func, types, args, kwargs)
        try:
            made = super().__torch_dispatch__(func, types, args, kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            return func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]
        if any(tensor.is_floating_point() or tensor.numel() > self._LARGEST for tensor in tensors):
            return made
        return func(*args, **kwargs)


def _is_known(tensor: torch.Tensor) -> bool:
    return not isinstance(tensor, FakeTensor) and not tensor.is_floating_point()


def _without_masks(indices: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Return indices with every known mask replaced by the indices of its elements."""
    found: list[torch.Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool and _is_known(index):
            found += index.nonzero().unbind(1)
        else:
            found.append(index)
    return found


def _experts(tokens: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
    """Replace transformers' product of each expert with its tokens: same result size, same tensors saved.

    The kernel takes real tensors in fp32, but not fake ones.
    """
    with torch.autocast("cpu", enabled=False):
        return tokens.to(weight.dtype) @ weight[0]


@contextmanager
def fake(inputs: Mapping[str, Any]) -> Iterator[FakeTensorMode]:
    """Make all tensors created in the context fake; ``inputs`` as for :func:`fake_inputs`."""
    # Models check that there are as many image tokens as image features, which fake tensors cannot tell.
    unchecked = mock.patch("torch._check_tensor_all_with", return_value=None)
    experts = mock.patch("transformers.integrations.moe._grouped_mm", _experts)
    image = inputs.get("image")
    kind = _WholeNumbers if image is not None and image.grid else FakeTensorMode
    with unchecked, experts, kind(allow_non_fake_inputs=True) as mode:
        yield mode


@contextmanager
def fused_tiles(fused: bool) -> Iterator[None]:
    """Allocate only the tile of logits itself: on a GPU, a Triton kernel reduces each tile in place."""
    if not fused:
        yield
        return
    kernels = "trl.kernels.chunked_logprob"

    def in_place(*_: Any, **__: Any) -> None:
        return None

    with (
        mock.patch(f"{kernels}._forward_tile", in_place),
        mock.patch(f"{kernels}._backward_tile", in_place),
        mock.patch(f"{kernels}._addmm_fp32", in_place),
    ):
        yield


def without_contents(model: nn.Module, mode: FakeTensorMode) -> list[nn.Parameter]:
    """Replace all parameters and buffers with fake tensors; return the parameters, each once."""
    made: dict[int, nn.Parameter] = {}
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if getattr(module, "rope_type", None) == "dynamic":  # depends on the length of the row
            module.rope_type = "default"
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                    made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                real = torch.empty(buffer.shape, dtype=buffer.dtype) if buffer.is_meta else mode.from_tensor(buffer)
                module._buffers[name] = real
    return list(made.values())
