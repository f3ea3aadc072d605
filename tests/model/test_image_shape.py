"""The tokens and pixels of an image: as many as the model's processor makes."""

from pathlib import Path

import numpy
import pytest
from support.planned import HEADLINE
from transformers import AutoConfig, Qwen2VLImageProcessor

from emloc_core.errors import EmlocError
from emloc_core.model.image_shape import image_shape, parse_size


@pytest.mark.parametrize(
    ("model_type", "size", "tokens", "pixels", "grid"),
    [
        ("qwen2_vl", None, 256, (1024, 3 * 2 * 14 * 14), (1, 32, 32)),
        ("qwen2_5_vl", (720, 1280), 26 * 46, (52 * 92, 3 * 2 * 14 * 14), (1, 52, 92)),
        ("qwen3_vl", (448, 448), 196, (784, 3 * 2 * 16 * 16), (1, 28, 28)),
        ("internvl", None, 256, (1, 3, 448, 448), ()),
        ("internvl", (448, 448), 256, (1, 3, 448, 448), ()),
        ("gemma3", None, 256, (1, 3, 224, 224), ()),
    ],
)
def test_an_image_is_as_many_tokens_as_the_processor_makes_of_it(
    model_type: str, size: tuple[int, int] | None, tokens: int, pixels: tuple[int, ...], grid: tuple[int, ...]
) -> None:
    shape = image_shape(Path("config.json"), AutoConfig.for_model(model_type), size)
    assert (shape.tokens, shape.pixels, shape.grid) == (tokens, pixels, grid)
    if grid:
        patch = {"qwen3_vl": 16}.get(model_type, 14)
        picture = numpy.zeros((*(size or (448, 448)), 3), dtype=numpy.uint8)
        processed = Qwen2VLImageProcessor(patch_size=patch)(picture, return_tensors="pt")
        assert tuple(processed["pixel_values"].shape) == pixels
        assert tuple(processed["image_grid_thw"][0].tolist()) == grid


def test_sizes_of_images() -> None:
    assert parse_size("1280x720") == (720, 1280)
    for text in ("", "448", "0x448", "448x", "-1x2", "448x448x3"):
        with pytest.raises(EmlocError, match="not an image size"):
            parse_size(text)
    with pytest.raises(EmlocError, match="images of 448 x 448 pixels"):
        image_shape(HEADLINE, AutoConfig.from_pretrained(HEADLINE), (720, 1280))
