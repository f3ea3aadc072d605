"""A tiny config of the same architecture: few blocks, of every kind, and small sizes that still divide.

A config with names for its sizes that :mod:`emloc_core.scaffold.sizes` does not know stays too large; the error lists
them, and the user then writes a small config.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from emloc_core.scaffold.blocks import few_blocks, is_by_index
from emloc_core.scaffold.config_arguments import minimal, structure
from emloc_core.scaffold.sizes import PATCHES, PIXELS, VOCABULARY, small_sections, small_size, widths

#: Beyond this many parameters a model is not tiny; up to it, a config is used unchanged.
TINY_PARAMETERS = 4_000_000
_IMAGE_TOKENS = r"mm_tokens_per_image|image_seq_length|vision_soft_tokens_per_image"
#: Lists of sizes of a tower's stages, or of the blocks.
_LISTS_OF_SIZES = re.compile(r"hidden_sizes|\w+_channels|intermediate_size")
_IMAGE_MARK = re.compile(r"image_token_(id|index)")
_TOKEN_ID = re.compile(r".*_token_(id|ids|index)")


def shrink(config: Any, of_each: int = 1) -> dict[str, Any]:
    """Return keyword arguments of ``AutoConfig.for_model`` for a tiny model of the architecture of ``config``.

    Heads still divide widths and key-value heads divide heads. Lists with one entry per block keep blocks of each
    kind. Values that equal the config class's default are left out.

    Raises:
        EmlocError: transformers refuses the smaller config.
    """
    content = structure(config.to_dict())
    return minimal(_Shrinking(set(widths(content)), of_each).section(content))


class _Shrinking:
    """Shrinks the sections of one config; a token gets the same id in all of them.

    Args:
        widths: widths of the model's parts: a size that equals one is another name for it.
        of_each: how many blocks of each kind are kept.
    """

    def __init__(self, widths: Collection[int], of_each: int) -> None:
        self._widths, self._of_each = widths, of_each
        self._ids: dict[int | None, int] = {}

    def section(self, content: Mapping[str, Any]) -> dict[str, Any]:
        small = {name: self._value(str(name), value, content) for name, value in content.items()}
        if is_by_index(content):
            return small
        small = few_blocks(content, small, self._of_each)
        if pinpoints := content.get("image_grid_pinpoints"):
            small["image_grid_pinpoints"] = _pinpoints(pinpoints, content.get("vision_config") or {})
        if (side := content.get("scale_factor")) and "image_size" in (small.get("vision_config") or {}):
            small["vision_config"]["image_size"] = PIXELS["patch_size"] * side * math.ceil(PATCHES / side)  # of squares
        if old := _patches(content.get("vision_config") or {}):
            for name, value in content.items():
                if is_by_index(value) and (queries := {int(key): count for key, count in value.items()}.get(old)):
                    small[name] = {str(PATCHES**2): min(queries, PATCHES)}  # queries for that many patches
            for name in filter(re.compile(_IMAGE_TOKENS).fullmatch, small):
                tokens = content[name] * PATCHES**2 // old
                # As many as patches without pooling; configs with only defaults may have more, which is impossible.
                small[name] = max(1, tokens) if tokens <= PATCHES**2 else PATCHES**2 // 4
        return small

    def _value(self, name: str, value: Any, content: Mapping[str, Any]) -> Any:
        if name == "rope_parameters" and "mrope_section" in value:
            return small_sections(value)
        if isinstance(value, Mapping):
            return self.section(value)
        if isinstance(value, list | tuple) and _is_list_of_sizes(name, value):
            return [self._number(name, item, content) for item in value]
        if isinstance(value, int) and not isinstance(value, bool):
            return self._number(name, value, content)
        open_mark = value is None and _IMAGE_MARK.fullmatch(name) and "vision_config" in content
        return self._token(None) if open_mark else value  # without an id, no image could be placed

    def _number(self, name: str, value: int, content: Mapping[str, Any]) -> int:
        return self._token(value) if _TOKEN_ID.fullmatch(name) else small_size(name, value, content, self._widths)

    def _token(self, token: int | None) -> int:
        """Move ids beyond the vocabulary to its end, each to another position."""
        if token is not None and token < VOCABULARY - 16:
            return token
        return self._ids.setdefault(token, VOCABULARY - 1 - len(self._ids))


def _is_list_of_sizes(name: str, value: Sequence[Any]) -> bool:
    all_integers = all(isinstance(item, int) for item in value)
    return all_integers and bool(name in PIXELS or _TOKEN_ID.fullmatch(name) or _LISTS_OF_SIZES.fullmatch(name))


def _patches(vision: Mapping[str, Any]) -> int:
    """Return how many patches an image has; 0 if the section does not say."""
    sides = []
    for name in ("image_size", "patch_size"):
        value = vision.get(name) or 0
        sides.append(list(value)[-1] if isinstance(value, Sequence) else value)
    return (sides[0] // sides[1]) ** 2 if all(sides) else 0


def _pinpoints(sizes: Sequence[Sequence[int]], vision: Mapping[str, Any]) -> list[list[int]]:
    """Return the sizes that images are scaled to before they are cut: one or two of the tower's images per side."""
    side = vision.get("image_size") or max(max(size) for size in sizes)
    tiny = PIXELS["image_size"]
    reduced = {tuple(min(2, max(1, length // side)) * tiny for length in size): None for size in sizes}
    return [list(size) for size in reduced]
