"""Inputs for tiny models: token ids from a tokenizer of plain numbers, and random images that fit the config.

The config says how an image becomes tokens; a family whose models do it in another way declares ``tiny_inputs``.
"""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from emloc_core.data.row import Row
from emloc_core.data.tokenize import Sample
from emloc_core.errors import EmlocError
from emloc_core.family import Family
from emloc_core.model.image_shape import image_shape

#: Tokens of each row; two lengths, because masks and windows depend on them.
LENGTHS = (13, 24)


def tiny_samples(family: Family, config: Any) -> list[Sample]:
    """Return samples of text, followed by samples with an image if the family has images.

    Raises:
        EmlocError: the config does not say how an image becomes tokens.
    """
    rows = [_text(config, length, seed) for seed, length in enumerate(LENGTHS)]
    samples = [as_sample({"input_ids": ids}, row) for row, ids in enumerate(rows)]
    if _needs_images(config):
        samples = []
    if family.modality == "text":
        return samples
    make_inputs = family.tiny_inputs or image_inputs
    return [*samples, as_sample(make_inputs(config), len(samples))]


def runnable(model: Any, samples: Sequence[Any]) -> list[Any]:
    """Return the samples, without those of only text that a model refuses if there are images too."""

    def runs(sample: Any) -> bool:
        try:
            with torch.no_grad():
                sample.run(model, "cpu")
        except Exception:  # whatever an unknown model's code raises
            return False
        return True

    if all(map(is_text, samples)):
        return list(samples)
    return [sample for sample in samples if not is_text(sample) or runs(sample)]


def is_text(sample: Any) -> bool:
    """Say whether a sample consists only of tokens."""
    return isinstance(sample, Sample) and not sample.others


def _needs_images(config: Any) -> bool:
    """Say whether a forward without an image is an error."""
    pixels = _arguments(config).get("pixel_values")
    return pixels is not None and pixels.default is inspect.Parameter.empty


def _arguments(config: Any) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of the image-text model's forward for a config; empty if there is no such model."""
    model: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    return inspect.signature(model.forward).parameters if model else {}


def as_sample(inputs: Mapping[str, torch.Tensor], row: int) -> Sample:
    """Return the arguments of a forward of one row as a sample."""
    ids = inputs["input_ids"][0].tolist()
    extra = {name: tensor for name, tensor in inputs.items() if name != "input_ids"}
    return Sample(ids, [1] * len(ids), f"Row {row + 1}", extra)


def image_inputs(config: Any) -> dict[str, torch.Tensor]:
    """Return the keyword arguments of a forward of one row of text with one image in it.

    Returns:
        ``input_ids``, (1, T), with the config's marks of an image; ``pixel_values``; ``image_grid_thw``, (1, 3), if
        pixels are patches; ``mm_token_type_ids``, (1, T), if positions depend on them.

    Raises:
        EmlocError: the config does not say how an image becomes tokens.
    """
    mark, vision = getattr(config, "image_token_id", None), getattr(config, "vision_config", None)
    try:
        # Towers of patches take any size: 2 x 3 tokens, so that swapped height and width are noticed.
        token = getattr(vision, "patch_size", 1) * getattr(vision, "spatial_merge_size", 0)
        shape = image_shape(Path("config.json"), config, (2 * token, 3 * token) if token else None)
    except EmlocError as error:
        raise _unknown_images(config) from error
    if mark is None:
        raise _unknown_images(config)
    pixels = torch.randn(shape.pixels, generator=torch.Generator().manual_seed(7))
    grid = {"image_grid_thw": torch.tensor([shape.grid])} if shape.grid else {}
    start, end = ([getattr(config, f"vision_{side}_token_id", None)] for side in ("start", "end"))
    marked = [number for number in (*start, *[mark] * shape.tokens, *end) if number is not None]
    text = _text(config, LENGTHS[0], seed=len(LENGTHS))
    ids = torch.cat([text[:, :3], torch.tensor([marked]), text[:, 3:]], dim=1)
    return {"input_ids": ids, "pixel_values": pixels, **grid, **_token_types(config, ids == mark)}


def _token_types(config: Any, is_image: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return which tokens are an image's, for models that position such tokens by height and width."""
    return {"mm_token_type_ids": is_image.long()} if "mm_token_type_ids" in _arguments(config) else {}


def _unknown_images(config: Any) -> EmlocError:
    return EmlocError(
        f"The config of this {config.model_type!r} does not say how an image becomes tokens: it needs image_token_id, "
        "and image_seq_length or a vision_config with spatial_merge_size.",
        "Declare tiny_inputs in the family: a function of the config that returns the inputs of one row with an image.",
    )


def _text(config: Any, length: int, seed: int) -> torch.Tensor:
    """Return ordinary token ids, (1, length)."""
    ordinary = torch.tensor(sorted(set(range(vocabulary(config))) - special_tokens(config.to_dict())))
    picked = torch.randint(len(ordinary), (1, length), generator=torch.Generator().manual_seed(seed))
    return ordinary[picked]


def vocabulary(config: Any) -> int:
    """Return the size of the language model's vocabulary."""
    return config.get_text_config().vocab_size


def special_tokens(config: Mapping[str, Any]) -> set[int]:
    """Return every id that a config gives a meaning, at any depth: ``eos_token_id``, ``image_token_id``."""
    ids: set[int] = set()
    for name, value in config.items():
        if isinstance(value, Mapping):
            ids |= special_tokens(value)
        elif str(name).endswith(("_token_id", "_token_index")):
            ids.update(number for number in (value if isinstance(value, list) else [value]) if number is not None)
    return ids


def number_tokenizer(config: Any) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are numbers: ``"5 17"`` becomes the ids 5 and 17."""
    words = {str(number): number for number in range(vocabulary(config))}
    end = getattr(config.get_text_config(), "eos_token_id", None)
    end = end[0] if isinstance(end, list) else end
    unknown = "0"
    backend = Tokenizer(models.WordLevel(words, unk_token=unknown))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    last = str(len(words) - 1 if end is None else end)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=last, pad_token=last, unk_token=unknown)


def text_rows(samples: list[Sample]) -> list[Row]:
    """Return the samples of text as a user's rows, for the tokenizer of numbers."""
    rows = [
        Row(number, text=" ".join(str(token) for token in sample.input_ids))
        for number, sample in enumerate(samples, start=1)
        if not sample.others
    ]
    return rows or [Row(1, text="4 5 6")]  # a stage reads one before it gets the samples with images
