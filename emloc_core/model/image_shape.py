"""What an image is to a model, by its config: how many tokens of the language model, and tensors of which shape.

Some vision towers take images of one size, and a processor resizes every image, or cuts it into tiles of that size.
Others take images of any size, as a list of patches with the grid that they come from: there the size must be said.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emloc_core.errors import EmlocError

#: Height and width in pixels that are planned for where a tower takes any size: a usual tile.
IMAGE_SIZE = (448, 448)


@dataclass(frozen=True)
class ImageShape:
    """One image of a given size.

    Attributes:
        size: height and width in pixels, as the tower gets it.
        tokens: how many tokens of the language model it becomes.
        pixels: shape of ``pixel_values``; that of several images is as many times as long in the first dimension.
        grid: its patches in time, height and width, a row of ``image_grid_thw``; empty where the size is fixed.
    """

    size: tuple[int, int]
    tokens: int
    pixels: tuple[int, ...]
    grid: tuple[int, ...] = ()

    def describe(self) -> dict[str, int]:
        """Return its size and tokens as JSON values."""
        return {"height": self.size[0], "width": self.size[1], "tokens": self.tokens}


def image_shape(config_file: Path, config: Any, size: tuple[int, int] | None = None) -> ImageShape:
    """Return the shape of an image to a model.

    Args:
        config_file: of the model, for messages.
        config: transformers' config of it.
        size: height and width in pixels; None: :data:`IMAGE_SIZE`, or the one size that the tower takes.

    Raises:
        EmlocError: the config does not say, or the tower takes another size.
    """
    vision = getattr(config, "vision_config", None)
    if hasattr(vision, "spatial_merge_size"):
        return _patches(config_file, vision, size or IMAGE_SIZE)
    tokens = _field(config_file, config, "image_seq_length")
    channels = _field(config_file, vision, "vision_config.num_channels")
    height, width = _pair(_field(config_file, vision, "vision_config.image_size"))
    if size is not None and size != (height, width):
        raise EmlocError(
            f"The vision tower of {config_file} takes images of {width} x {height} pixels alone.",
            "Leave out --image-size; a larger image is as many --images as its processor cuts tiles from it.",
        )
    return ImageShape((height, width), tokens, (1, channels, height, width))


def parse_size(text: str) -> tuple[int, int]:
    """Return height and width of ``"WIDTHxHEIGHT"``.

    Raises:
        EmlocError: it is no such text.
    """
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text.strip())
    if found is None or not all(sides := tuple(int(side) for side in found.groups())):
        raise EmlocError(f"{text!r} is no size of an image.", "Give its width and height in pixels: 448x448, say.")
    width, height = sides
    return height, width


def _patches(config_file: Path, vision: Any, size: tuple[int, int]) -> ImageShape:
    """Return the shape of an image that is cut into patches, of which a square becomes one token.

    Sides are rounded to whole tokens and an image is repeated to fill the patches' length in time, as
    transformers' processors with a ``smart_resize`` do it.
    """
    patch, merge = _field(config_file, vision, "patch_size"), vision.spatial_merge_size
    height, width = (max(1, round(side / (patch * merge))) * merge for side in size)
    channels = getattr(vision, "in_channels", None) or _field(config_file, vision, "vision_config.in_chans")
    values = channels * _field(config_file, vision, "vision_config.temporal_patch_size") * patch**2
    return ImageShape(
        (height * patch, width * patch), height * width // merge**2, (height * width, values), (1, height, width)
    )


def _field(config_file: Path, config: Any, name: str) -> Any:
    value = getattr(config, name.rpartition(".")[2], None)
    if value is None:
        raise EmlocError(f"{config_file} has no {name}, so images cannot be planned.", "Plan with --images 0.")
    return value


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
