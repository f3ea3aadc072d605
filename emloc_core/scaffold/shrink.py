"""A tiny config of the same architecture: few blocks, one of each kind, and small sizes that still divide.

Sizes are recognised by their names in transformers' configs. A config with other names for its sizes stays too large;
the error lists them, and the user then writes a small config.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from emloc_core.scaffold.config_arguments import needed, structure

#: Beyond this many parameters a model is not tiny; up to it, a given config is taken as it is.
TINY_PARAMETERS = 4_000_000
HEADS, HEAD_DIM, WIDTH, VOCABULARY = 4, 16, 64, 128
_PATCHES = 8  # a side
_MOST_KINDS = 8  # of blocks
_BLOCKS = r"num_hidden_layers|n_layers?|num_layers|depth"

#: Name of a size -> what it becomes, if it is larger. The first pattern that matches counts.
_SIZES: Mapping[str, int] = {
    r"((attention_|out_)?hidden_size|n_embd|d_model|(word_)?embed(_proj)?_dim|projection_dim)": WIDTH,
    r"moe_intermediate_size|shared_expert_intermediate_size": 48,
    r"(\w+_)?intermediate_size(_\w+)?|(block_)?ff_dim|ffn_dim|ffn_hidden_size|n_inner|d_ff|dim_ff|mlp_dim": 96,
    r"num_attention_heads|n_heads?|num_heads": HEADS,
    r"(qk_nope_|qk_rope_|v_)?head_dim": HEAD_DIM,
    r"qk_head_dim": 2 * HEAD_DIM,
    r"rotary_dim": HEAD_DIM // 2,
    r"(q|kv)_lora_rank": 24,
    r"vocab_size(_\w+)?|num_embeddings": VOCABULARY,
    r"max_position_embeddings|n_positions|max_seq_len|max_sequence_length|context_length": 256,
    r"original_max_position_embeddings": 128,
    r"\w+_(input|output)_dim": 2 * WIDTH,
    r"sliding_window|attention_chunk_size|window_size": 8,
    r"(num|n)_(local_|routed_)?experts|moe_num_experts": 4,
    r"num_experts_per_tok|moe_top_?k|n_group": 2,
    r"topk_group|first_k_dense_replace|max_window_layers": 1,
    r"state_size|mamba_d_state|ssm_state_size": 16,
    r"time_step_rank|mamba_dt_rank": 8,
    r"num_position_embeddings": _PATCHES**2,
}  # fmt: skip
_KEY_VALUE_HEADS = r"num_key_value_heads|num_kv_heads|n_kv_heads"
_IMAGE_TOKENS = r"mm_tokens_per_image|image_seq_length|vision_soft_tokens_per_image"
#: Sizes of images, a number or a pair; and which vision blocks' outputs are used: the last, or it would be for nothing.
_PIXELS = {"image_size": 2 * _PATCHES, "patch_size": 2, "vision_feature_layer": -1}
_TOKEN_ID = re.compile(r".*_token_(id|ids|index)")


def shrink(config: Any) -> dict[str, Any]:
    """Return keyword arguments of ``AutoConfig.for_model`` for a tiny model of the architecture of ``config``.

    Heads still divide widths and key-value heads divide heads. Lists with one entry per block keep one block of each
    kind. Values that equal the config class's default are left out.

    Raises:
        EmlocError: transformers refuses the smaller config.
    """
    return needed(_Shrinking().section(structure(config.to_dict())))


class _Shrinking:
    """Shrinks the sections of one config; the same token keeps one id in all of them."""

    def __init__(self) -> None:
        self._ids: dict[int, int] = {}

    def section(self, content: Mapping[str, Any]) -> dict[str, Any]:
        small = {name: self._value(str(name), value, content) for name, value in content.items()}
        if _is_by_index(content):
            return small
        small = _few_blocks(content, small)
        if pinpoints := content.get("image_grid_pinpoints"):
            small["image_grid_pinpoints"] = _pinpoints(pinpoints, content.get("vision_config") or {})
        if old := _patches(content.get("vision_config") or {}):
            for name in filter(re.compile(_IMAGE_TOKENS).fullmatch, small):
                tokens = content[name] * _PATCHES**2 // old
                # As many as patches without pooling; configs of defaults alone may have more, which cannot be.
                small[name] = max(1, tokens) if tokens <= _PATCHES**2 else _PATCHES**2 // 4
        return small

    def _value(self, name: str, value: Any, content: Mapping[str, Any]) -> Any:
        if name == "rope_parameters" and "mrope_section" in value:
            return _sections(value)
        if isinstance(value, Mapping):
            return self.section(value)
        if isinstance(value, list | tuple) and (name in _PIXELS or _TOKEN_ID.fullmatch(name)):
            return [self._value(name, one, content) for one in value]
        if not isinstance(value, int) or isinstance(value, bool):
            return value
        return self._token(value) if _TOKEN_ID.fullmatch(name) else _size(name, value, content)

    def _token(self, token: int) -> int:
        """Move ids beyond the vocabulary to its end, each to a place of its own."""
        if token < VOCABULARY - 16:
            return token
        return self._ids.setdefault(token, VOCABULARY - 1 - len(self._ids))


def _size(name: str, value: int, content: Mapping[str, Any]) -> int:
    if name in _PIXELS:
        return _PIXELS[name]
    if name == "intermediate_size" and value == 4 * content.get("hidden_size", 0):
        return 4 * WIDTH  # some models count on it
    if re.fullmatch(_KEY_VALUE_HEADS, name):
        heads = (content[other] for other in ("num_attention_heads", "n_head", "n_heads") if content.get(other))
        return HEADS if value >= next(heads, value) else min(value, HEADS // 2)
    expand = content.get("mamba_expand", content.get("expand"))
    if expand and (size := _state_space(name, int(expand) * WIDTH)):
        return size
    sizes = (size for pattern, size in _SIZES.items() if re.fullmatch(pattern, name))
    return min(value, next(sizes, value))


def _state_space(name: str, width: int) -> int | None:
    """Return a size of a state-space layer of this width, whose heads share it out."""
    heads = {r"(mamba_)?(n|num)_heads|n_mamba_heads": width // HEAD_DIM, r"mamba_d_head|mamba_headdim": HEAD_DIM}
    known = {**heads, r"mamba_d_ssm": width}
    return next((size for pattern, size in known.items() if re.fullmatch(pattern, name)), None)


def _sections(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Share out half a head's features among the sections of a rotary embedding, as before."""
    sections = rope["mrope_section"]
    half = HEAD_DIM // 2
    small = [max(1, part * half // sum(sections)) for part in sections]
    return {**rope, "mrope_section": [half - sum(small[1:]), *small[1:]]}


def _patches(vision: Mapping[str, Any]) -> int:
    """Return how many patches an image has; 0 where the section does not say."""
    sides = []
    for name in ("image_size", "patch_size"):
        value = vision.get(name) or 0
        sides.append(list(value)[-1] if isinstance(value, Sequence) else value)
    return (sides[0] // sides[1]) ** 2 if all(sides) else 0


def _pinpoints(sizes: Sequence[Sequence[int]], vision: Mapping[str, Any]) -> list[list[int]]:
    """Return the sizes that images are brought to before they are cut: of one or two of the tower's images a side."""
    side = vision.get("image_size") or max(max(size) for size in sizes)
    tiny = _PIXELS["image_size"]
    found = {tuple(min(2, max(1, length // side)) * tiny for length in size): None for size in sizes}
    return [list(size) for size in found]


def _few_blocks(content: Mapping[str, Any], small: dict[str, Any]) -> dict[str, Any]:
    """Cut a section to one block of each kind, and at least two."""
    counts = [name for name in content if re.fullmatch(_BLOCKS, name) and isinstance(content[name], int)]
    if not counts:
        return small
    count = content[counts[0]]
    lists = {name: value for name, value in content.items() if isinstance(value, list) and value}
    indices = {name for name, value in lists.items() if _are_indices(value, count)}
    lists_by_block = {name for name, value in lists.items() if len(value) == count and name not in indices}
    # What some blocks alone have, by their number.
    settings = {name: {int(key): key for key in value} for name, value in content.items() if _is_by_index(value)}
    kinds = [
        [content[name][index] for name in lists_by_block]
        + [index in lists[name] for name in indices]
        + [content[name].get(keys.get(index)) for name, keys in settings.items()]
        for index in range(count)
    ]
    periods = [value for name, value in content.items() if name.endswith("_period") and isinstance(value, int)]
    kept = _one_of_each(kinds, max(periods, default=0))
    if indices and kept[-1] + 1 < count:  # what is done behind the blocks of a list is done in between blocks
        kept.append(kept[-1] + 1)
    small.update(dict.fromkeys(counts, len(kept)))
    for name in indices:
        small[name] = [new for new, old in enumerate(kept) if old in lists[name]]
    for name in lists_by_block:
        small[name] = [content[name][index] for index in kept]
    for name, keys in settings.items():
        small[name] = {str(new): small[name][keys[old]] for new, old in enumerate(kept) if old in keys}
    return small


def _one_of_each(kinds: Sequence[Any], period: int) -> list[int]:
    """Return where each kind of block stands first; a whole period of blocks that alternate by one; two at least."""
    if period > 1:
        return list(range(min(period, len(kinds))))
    first = [index for index, kind in enumerate(kinds) if kind not in kinds[:index]]
    return first[:_MOST_KINDS] if len(first) > 1 else list(range(min(2, len(kinds))))


def _is_by_index(value: Any) -> bool:
    return isinstance(value, Mapping) and len(value) > 0 and all(str(key).isdigit() for key in value)


def _are_indices(value: Sequence[Any], count: int) -> bool:
    """Say whether a list names blocks: whole numbers that rise, below the number of blocks."""
    whole = all(isinstance(item, int) and not isinstance(item, bool) and 0 <= item < count for item in value)
    return whole and all(before < after for before, after in pairwise(value))
