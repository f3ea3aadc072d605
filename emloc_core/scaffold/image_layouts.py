"""The ways in which processors lay out the pixels of an image, and the inputs that go with them."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

Argument = TypeVar("Argument")

#: Numbers of pieces that an image is cut into, including the whole image; models differ.
_PIECES = (1, 2, 3, 5)
#: Sides of the squares of patches that become one token: the config's, or one of these.
_MERGES = (2, 4)


@dataclass(frozen=True)
class SourcedTensor:
    """A tensor, and the Python expression that makes it."""

    tensor: torch.Tensor
    source: str


def noise(*shape: int) -> SourcedTensor:
    """Return seeded random pixels of this shape."""
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return SourcedTensor(
        pixels, f"torch.randn({', '.join(map(str, shape))}, generator=torch.Generator().manual_seed(0))"
    )


def ones(*shape: int, dtype: torch.dtype = torch.bool) -> SourcedTensor:
    """Return a mask of this shape that leaves nothing out."""
    return SourcedTensor(torch.ones(shape, dtype=dtype), f"torch.ones({', '.join(map(str, shape))}, dtype={dtype})")


def numbers(content: Sequence[Any]) -> SourcedTensor:
    """Return a tensor of these whole numbers."""
    return SourcedTensor(torch.tensor(content), f"torch.tensor({content})")


def layouts(config: Any) -> Iterator[dict[str, SourcedTensor]]:
    """Yield the ways to lay out one image, as arguments of a forward pass; a model takes those that it has names for.

    The names are those of transformers' processors. Images of a fixed size come as an image, or as a list of an image
    and its pieces; images of any size as a list of patches.
    """
    vision = getattr(config, "vision_config", None)
    channels = _first(vision, "num_channels", "in_channels", "in_chans") or 3
    if size := _pair(_first(vision, "image_size")):
        fine = _pair(_first(getattr(config, "high_res_vision_config", None), "image_size")) or size
        if tiles := _first(vision, "max_num_tiles"):
            yield _tiles(channels, size, tiles)
        yield from _images(channels, size, fine)
    if patch := _pair(_first(vision, "patch_size")):
        yield from _patches(vision, channels, patch[0])


def _tiles(channels: int, size: tuple[int, int], tiles: int) -> dict[str, SourcedTensor]:
    """Return an image in tiles."""
    return {
        "pixel_values": noise(1, 1, tiles, channels, *size),
        "aspect_ratio_ids": ones(1, 1, dtype=torch.long),
        "aspect_ratio_mask": ones(1, 1, tiles, dtype=torch.long),
    }


def _images(channels: int, size: tuple[int, int], fine: tuple[int, int]) -> Iterator[dict[str, SourcedTensor]]:
    sizes = {"image_sizes": numbers([list(size)]), "qformer_input_ids": numbers([[5, 6, 7]])}
    image, high = noise(1, channels, *size), noise(1, channels, *fine)
    yield {"pixel_values": image, "high_res_pixel_values": high, **sizes}
    for pieces in _PIECES:
        pixels = {"pixel_values": noise(1, pieces, channels, *size), **sizes}
        yield pixels
        yield {**pixels, "pixel_attention_mask": ones(1, pieces)}


def _patches(vision: Any, channels: int, patch: int) -> Iterator[dict[str, SourcedTensor]]:
    """Yield layouts of an image of any size: of 2 x 3 tokens, so that swapped height and width are noticed."""
    merge = _pair(_first(vision, "spatial_merge_size", "merge_kernel_size", "merge_size"))
    times = list(dict.fromkeys((1, _first(vision, "temporal_patch_size", "patch_temporal") or 1)))[::-1]
    for side in (merge[0],) if merge else _MERGES:
        height, width = 2 * side, 3 * side
        count = height * width
        grid = {
            "image_grid_thw": numbers([[1, height, width]]),
            "image_grid_hw": numbers([[height, width]]),
            "spatial_shapes": numbers([[height, width]]),
            "target_sizes": numbers([[height, width]]),
            "image_sizes": numbers([[height * patch, width * patch]]),
            "image_merge_sizes": numbers([side]),
        }
        for time in times:
            yield {"pixel_values": noise(count, channels * time * patch**2), **grid}
            shape = (channels, *((time,) if time > 1 else ()), patch, patch)
            yield {"pixel_values": noise(count, *shape), **grid}
            yield {"pixel_values": noise(count, *shape[1:], channels), **grid}
        padded = ones(1, count, dtype=torch.long)
        yield {"pixel_values": noise(1, count, channels * patch**2), "pixel_attention_mask": padded, **grid}
        yield {"pixel_values": noise(count // side**2, side * patch, side * patch, channels), **grid}
        yield {"pixel_values": noise(1, count, channels, patch, patch), **grid}
        yield {"pixel_values": noise(1, channels, patch, count * patch), **grid}
        yield {"pixel_values": noise(1, channels, height * patch, width * patch), **grid}


def accepted(arguments: Mapping[str, Argument], names: Collection[str]) -> dict[str, Argument]:
    """Return the arguments, for example of a layout, whose names are among those of a function."""
    return {name: argument for name, argument in arguments.items() if name in names}


def _first(section: Any, *names: str) -> Any:
    """Return the first of these fields that a config, or a section of it, has; None if there is none."""
    if section is None:
        return None
    parts = [section, *(getattr(section, name, None) for name in getattr(section, "sub_configs", None) or {})]
    return next((value for part in parts for name in names if (value := getattr(part, name, None)) is not None), None)


def _pair(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[-1]))
