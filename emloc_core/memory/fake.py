"""A model and its inputs as fake tensors, which have shapes but no contents: its steps allocate nothing."""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from emloc_core.compat.torch import fake_tensors
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


def fake(inputs: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Make all tensors created in the context fake; ``inputs`` as for :func:`fake_inputs`."""
    image = inputs.get("image")
    return fake_tensors(whole_numbers=image is not None and bool(image.grid))


def without_contents(model: nn.Module) -> list[nn.Parameter]:
    """Replace all parameters and buffers with fake tensors; return the parameters, each once."""
    replaced: dict[int, nn.Parameter] = {}
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if getattr(module, "rope_type", None) == "dynamic":  # depends on the length of the row
            module.rope_type = "default"
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) not in replaced:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                replaced[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            setattr(module, name, replaced[id(parameter)])
        for name, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
    return list(replaced.values())
