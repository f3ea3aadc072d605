"""The size of an image to a model, according to its config: number of tokens, and shapes of the input tensors.

Some vision towers take images of a fixed size; their processor resizes every image, or cuts it into tiles of that size.
Others take images of any size, as a list of patches with the grid that they come from; there the size must be given.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emloc_core.errors import EmlocError

#: Default height and width in pixels for towers that take any size: a common tile.
IMAGE_SIZE = (448, 448)
#: Names in configs for the number of tokens of an image, where the tower takes only one size.
_TOKENS = ("image_seq_length", "mm_tokens_per_image")


@dataclass(frozen=True)
class ImageShape:
    """One image of a given size.

    Attributes:
        size: height and width in pixels, as the tower receives it.
        tokens: number of the language model's tokens that it becomes.
        patches: number of positions in the vision tower's blocks.
        pixels: shape of ``pixel_values``; several images are concatenated along the first dimension.
        grid: its patches in time, height and width, a row of ``image_grid_thw``; empty if the size is fixed.
    """

    size: tuple[int, int]
    tokens: int
    patches: int
    pixels: tuple[int, ...]
    grid: tuple[int, ...] = ()

    def describe(self) -> dict[str, int]:
        """Return its size and tokens as JSON values."""
        return {"height": self.size[0], "width": self.size[1], "tokens": self.tokens}


def image_shape(config_file: Path, config: Any, size: tuple[int, int] | None = None) -> ImageShape:
    """Return the shape of an image to a model.

    Args:
        config_file: the model's config file, for messages.
        size: height and width in pixels; by default the tower's fixed size, or :data:`IMAGE_SIZE`.

    Raises:
        EmlocError: the config lacks a field, or the tower takes another size.
    """
    vision = getattr(config, "vision_config", None)
    if hasattr(vision, "spatial_merge_size"):
        return _patches(config_file, vision, size or IMAGE_SIZE)
    tokens = _field(config_file, config, next((name for name in _TOKENS if hasattr(config, name)), _TOKENS[0]))
    channels = _field(config_file, vision, "vision_config.num_channels")
    height, width = _pair(_field(config_file, vision, "vision_config.image_size"))
    if size is not None and size != (height, width):
        raise EmlocError(
            f"The vision tower of {config_file} only takes images of {width} x {height} pixels.",
            "Leave out --image-size; count a larger image as the number of tiles that the processor cuts it into.",
            code="unsupported",
        )
    pixels = (1, channels, height, width)
    return ImageShape((height, width), tokens, count_patches(pixels, config), pixels)


def count_patches(pixels: Sequence[int], config: Any) -> int:
    """Return how many positions of the vision tower's blocks images become; 0 if the config has no patch size.

    Args:
        pixels: shape of ``pixel_values``: (patches, values) for a tower that takes images of any size, else
            (..., channels, height, width).
    """
    vision = getattr(config, "vision_config", None)
    if hasattr(vision, "spatial_merge_size"):
        return pixels[0]
    if getattr(vision, "patch_size", None) is None:
        return 0
    down, across = _pair(vision.patch_size)  # type: ignore[union-attr]
    *images, _, height, width = pixels
    return math.prod(images) * ((height // down) * (width // across) + 1)  # and a class token


def parse_size(text: str) -> tuple[int, int]:
    """Return height and width of ``"WIDTHxHEIGHT"``.

    Raises:
        EmlocError: it has another form.
    """
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text.strip())
    if match is None or not all(sides := tuple(int(side) for side in match.groups())):
        raise EmlocError(f"{text!r} is not an image size.", "Give width and height in pixels, such as 448x448.")
    width, height = sides
    return height, width


def _patches(config_file: Path, vision: Any, size: tuple[int, int]) -> ImageShape:
    """Return the shape of an image that is cut into patches, where each square of patches becomes one token.

    Sides are rounded to a number of tokens, and an image is repeated to fill the patches' length in time, as in
    transformers' processors with a ``smart_resize``.
    """
    patch, merge = _field(config_file, vision, "patch_size"), vision.spatial_merge_size
    height, width = (max(1, round(side / (patch * merge))) * merge for side in size)
    channels = getattr(vision, "in_channels", None) or _field(config_file, vision, "vision_config.in_chans")
    values = channels * _field(config_file, vision, "vision_config.temporal_patch_size") * patch**2
    return ImageShape(
        (height * patch, width * patch),
        height * width // merge**2,
        height * width,
        (height * width, values),
        (1, height, width),
    )


def _field(config_file: Path, config: Any, name: str) -> Any:
    value = getattr(config, name.rpartition(".")[2], None)
    if value is None:
        raise EmlocError(
            f"{config_file} has no {name}, so images cannot be planned.", "Plan with --images 0.", code="unsupported"
        )
    return value


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
