"""Inputs that a tiny model of an unknown architecture may take: a row with an image, or a row of text."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from emloc_core.conformance.inputs import image_inputs, special_tokens, tiny_samples, vocabulary
from emloc_core.family import Family


@dataclass(frozen=True)
class Probe:
    """One way to call a model.

    Attributes:
        inputs: keyword arguments of the forward.
        make: what a family declares as ``tiny_inputs`` to get such inputs; None where the conformance kit has its own.
        source: the body of ``make``, a line each.
    """

    inputs: Mapping[str, Any]
    make: Callable[[Any], Mapping[str, Any]] | None = None
    source: Sequence[str] = ()


def probes(model: PreTrainedModel, family: Family) -> Iterator[tuple[str, Callable[[], Probe]]]:
    """Yield ways to call the model, the one that shows most first: a name, and what makes the inputs or raises."""
    config = model.config
    if family.modality == "image-text":
        yield "an image as the config describes it", lambda: Probe(image_inputs(config))
        yield "an image of the vision tower's size", lambda: _measured(model, 1)
        yield "a list of one image of the vision tower's size", lambda: _measured(model, 1, 1)
        # An image of any size is given whole, made smaller, and cut into such: here into one.
        yield "a list of an image and its only piece", lambda: _measured(model, 1, 2)
    text = tiny_samples(replace(family, modality="text"), config)[-1]
    yield "text", lambda: Probe(text.inputs("cpu"))


def _measured(model: PreTrainedModel, *leading: int) -> Probe:
    """Ask the model itself how many tokens an image becomes, whose ``pixel_values`` have these leading dimensions."""
    config: Any = model.config
    vision = config.vision_config
    size = vision.image_size
    shape = (*leading, getattr(vision, "num_channels", 3), *((size, size) if isinstance(size, int) else size))
    extract: Any = model.get_image_features
    sized = "image_sizes" in inspect.signature(extract).parameters
    extra = {"image_sizes": torch.tensor([shape[-2:]])} if sized else {}
    with torch.no_grad():
        features: Any = extract(pixel_values=torch.ones(shape), **extra)
    features = getattr(features, "pooler_output", features)
    tensors = [features] if isinstance(features, torch.Tensor) else list(features)
    tokens = sum(tensor.numel() for tensor in tensors) // config.get_text_config().hidden_size
    a, b, c, d = [token for token in range(vocabulary(config)) if token not in special_tokens(config.to_dict())][4:8]
    sizes = f', "image_sizes": torch.tensor([{list(shape[-2:])}])' if sized else ""
    source = (
        "import torch",
        "",
        f"ids = torch.tensor([[{a}, {b}, *[config.image_token_id] * {tokens}, {c}, {d}]])",
        f"pixels = torch.randn({', '.join(map(str, shape))}, generator=torch.Generator().manual_seed(0))",
        f'return {{"input_ids": ids, "pixel_values": pixels{sizes}}}',
    )

    def tiny_inputs(config: Any) -> dict[str, Any]:
        ids = torch.tensor([[a, b, *[config.image_token_id] * tokens, c, d]])
        pixels = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return {"input_ids": ids, "pixel_values": pixels, **extra}

    return Probe(tiny_inputs(config), tiny_inputs, source)
