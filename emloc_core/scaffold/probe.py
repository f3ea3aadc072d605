"""Inputs that a tiny model of an unknown architecture may take: a row with an image, or a row of text."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from emloc_core.conformance.inputs import image_inputs, special_tokens, tiny_samples, vocabulary
from emloc_core.family import Family
from emloc_core.scaffold.image_layouts import SourcedTensor, accepted, layouts

#: Number of ordinary tokens in a row, besides those of its image.
_TEXT = 16
#: Inputs per token: their source, and a function that makes them from ids, the image's mark and the config.
_MASKS: Mapping[str, tuple[str, Callable[[torch.Tensor, int, Any], torch.Tensor]]] = {
    "mm_token_type_ids": ("(ids == mark).long()", lambda ids, mark, _: (ids == mark).long()),
    "image_embeds_position_mask": ("ids == mark", lambda ids, mark, _: ids == mark),
    "image_attention_mask": ("torch.ones(*ids.shape, 1)", lambda ids, *_: torch.ones(*ids.shape, 1)),
    "cross_attention_mask": (
        "torch.ones(*ids.shape, 1, config.vision_config.max_num_tiles)",
        lambda ids, _, config: torch.ones(*ids.shape, 1, config.vision_config.max_num_tiles),
    ),
}


@dataclass(frozen=True)
class Probe:
    """One way to call a model.

    Attributes:
        inputs: keyword arguments of the forward.
        make_inputs: the family's ``tiny_inputs`` for such inputs; None if the conformance kit makes them itself.
        source: lines of the body of ``make_inputs``.
    """

    inputs: Mapping[str, Any]
    make_inputs: Callable[[Any], Mapping[str, Any]] | None = None
    source: Sequence[str] = ()


def probes(model: PreTrainedModel, family: Family) -> Iterator[tuple[str, Callable[[], Probe]]]:
    """Yield ways to call the model, the most informative first: a name, and what makes the inputs or raises."""
    config = model.config
    if family.modality == "image-text":
        yield "an image as the config describes it", lambda: Probe(image_inputs(config))
        for layout in layouts(config):
            yield f"pixels of {list(layout['pixel_values'].tensor.shape)}", partial(_laid_out, model, layout)
    for text in tiny_samples(replace(family, modality="text"), config)[-1:]:
        yield "text", partial(Probe, text.inputs("cpu"))


def _laid_out(model: PreTrainedModel, layout: Mapping[str, SourcedTensor]) -> Probe:
    """Return a row with an image in a layout, with as many marks as the model itself says that the image needs."""
    config: Any = model.config
    names = set(inspect.signature(model.forward).parameters)
    image = accepted(layout, names)
    tokens = _tokens(model, layout)
    special = special_tokens(config.to_dict())
    spare, *text = [token for token in range(vocabulary(config)) if token not in special][4 : 5 + _TEXT]
    by_name = hasattr(config, "image_token_id")
    masks = accepted(_MASKS, names)
    arguments = {name: source for name, (source, _) in masks.items()} | {
        name: tensor.source for name, tensor in image.items()
    }
    source = (
        "import torch",
        "",
        f"mark = {'config.image_token_id' if by_name else spare}",
        f"ids = torch.tensor([[{text[0]}, *[mark] * {tokens}, {', '.join(map(str, text[1:]))}]])",
        "return {",
        '    "input_ids": ids,',
        *(f'    "{name}": {expression},' for name, expression in arguments.items()),
        "}",
    )

    def tiny_inputs(config: Any) -> dict[str, Any]:
        mark = config.image_token_id if by_name else spare
        ids = torch.tensor([[text[0], *[mark] * tokens, *text[1:]]])
        mask_inputs = {name: make_mask(ids, mark, config) for name, (_, make_mask) in masks.items()}
        return {"input_ids": ids, **mask_inputs, **{name: argument.tensor for name, argument in image.items()}}

    return Probe(tiny_inputs(config), tiny_inputs, source)


def _tokens(model: PreTrainedModel, layout: Mapping[str, SourcedTensor]) -> int:
    """Ask the model itself how many tokens an image becomes: none if it is attended to from outside the row."""
    owner: Any = next((module for module in (model.base_model, model) if hasattr(module, "get_image_features")), None)
    if owner is None:
        return 0
    extract = owner.get_image_features
    with torch.no_grad():
        image = accepted(layout, set(inspect.signature(extract).parameters))
        features: Any = extract(**{name: argument.tensor for name, argument in image.items()})
    for name in ("pooler_output", "last_hidden_state"):
        if getattr(features, name, None) is not None:
            features = getattr(features, name)
            break
    tensors = [features] if isinstance(features, torch.Tensor) else list(features)
    return sum(tensor.numel() // tensor.shape[-1] for tensor in tensors)
