"""Shrinks the sizes of a config so that they still divide each other.

Sizes are recognised by their names in transformers' configs, and by which other sizes they equal.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from itertools import product
from typing import Any

from emloc_core.scaffold.blocks import is_by_index

HEADS, HEAD_DIM, WIDTH, VOCABULARY = 4, 16, 64, 128
#: Patches per side of an image.
PATCHES = 8
#: Sizes of images; and which vision block's output is used: the last one's, so that no block is unused.
PIXELS = {"image_size": 2 * PATCHES, "patch_size": 2, "vision_feature_layer": -1}

#: Name of a size -> what it becomes, if it is larger. The first pattern that matches counts.
_SIZES: Mapping[str, int] = {
    r"base_channels": 32,
    r"(\w+_)?channels?": WIDTH,
    r"moe_intermediate_size|shared_expert_intermediate_size": 48,
    r"(\w+_)?intermediate_size(_\w+)?|(\w+_)?ffn_(dim|hidden_size)": 96,
    r"word_embed_proj_dim": WIDTH // 2,  # unless it is another name for the width
    r"(block_)?ff_dim|n_inner|d_inner|d_?ff|dim_ff|mlp_dim": 96,
    r"(\w+_)?hidden_(sizes?|dim)(_\w+)?|n_embd|d_model|(\w+_)?emb(ed)?(_proj)?_dim|projection_dim": WIDTH,
    r"linear_num_key_heads": HEADS // 2,
    r"(\w+_)?(attention_heads|n_heads?|num_heads|num_value_heads)": HEADS,
    r"(?!qk_head)(\w+_)?head_dim|d_head": HEAD_DIM,
    r"qk_head_dim": 2 * HEAD_DIM,
    r"rotary_dim": HEAD_DIM // 2,
    r"(q|kv|o)_lora_rank": 24,
    r"(\w+_)?vocab(_size(_\w+)?)?|num_embeddings": VOCABULARY,
    r"max_position_embeddings|n_positions|max_seq_len|max_sequence_length|context_length": 256,
    r"original_max_position_embeddings": 128,
    r"\w+_(input|output)_dim": 2 * WIDTH,
    r"sliding_window(_size)?|attention_chunk_size|(attention_)?window_size|index_topk|indexer_budget": 8,
    r"index_kpool|indexer_compress_ratio": 4,
    r"(num|n)_(local_|routed_)?experts|moe_num_experts": 4,
    r"zero_expert_num": 2,
    r"num_res_blocks|n_layers_per_\w+": 1,
    r"num_experts_per_tok(en)?|moe_(top_?)?k|n_group|num_expert_groups?": 2,
    r"topk_group|first_k_dense_replace|max_window_layers": 1,
    r"state_size|mamba_d_state|ssm_state_size": 16,
    r"time_step_rank|mamba_dt_rank": 8,
    r"num_position_embeddings": PATCHES**2,
    r"max_(image|img)_size": 4 * PATCHES,
}  # fmt: skip
#: Some kinds of block have their own heads, whose names share a prefix.
_KEY_VALUE_HEADS = re.compile(r"(\w+_)?(num_key_value_heads|num_kv_heads|n_kv_heads)")
_HEADS = ("num_attention_heads", "n_head", "n_heads")
_WIDTHS = re.compile(r"hidden_size|n_embd|d_model")
#: Sizes that may be another part's width under another name.
_AS_WIDE = re.compile(r"\w+_(dim|size|width|features)")


def widths(content: Mapping[str, Any]) -> Iterator[int]:
    """Yield the widths of all parts of a model."""
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from widths(value)
        elif isinstance(value, int) and _WIDTHS.fullmatch(str(name)):
            yield value


def small_size(name: str, value: int, content: Mapping[str, Any], widths: Collection[int]) -> int:
    """Return what a size becomes.

    Args:
        widths: the widths of all parts of the model: a size that equals one is another name for it.
    """
    if name in PIXELS:
        return PIXELS[name]
    related = _related(name, value, content, widths)
    if related is not None:
        return related
    sizes = (size for pattern, size in _SIZES.items() if re.fullmatch(pattern, name))
    return min(value, next(sizes, value))


def _related(name: str, value: int, content: Mapping[str, Any], widths: Collection[int]) -> int | None:
    """Return what a size becomes that depends on others; None if it does not."""
    expand = content.get("mamba_expand", content.get("expand"))
    size = _state_space(name, int(expand) * WIDTH) if expand else None
    if _AS_WIDE.fullmatch(name) and not _WIDTHS.fullmatch(name):
        times = _multiple(value, content) if name.endswith("hidden_size") else 0
        size = WIDTH if value in widths else times * WIDTH or size
    if name.endswith("head_dim") and value in _rotated_and_not(content):
        size = 2 * HEAD_DIM
    if name.endswith("_head_dim"):  # all heads may be wider than the model
        size = _multiple(content.get(name.replace("head_dim", "hidden_size"), 0), content) * HEAD_DIM or size
    if name == "intermediate_size" and value == 4 * content.get("hidden_size", 0):
        size = 4 * WIDTH  # some models count on it
    if match := _KEY_VALUE_HEADS.fullmatch(name):
        heads = (content[field] for suffix in _HEADS if content.get(field := (match[1] or "") + suffix))
        size = HEADS if value >= next(heads, value) else min(value, HEADS // 2)
    return size


def _multiple(value: int, content: Mapping[str, Any]) -> int:
    """Return how many times the width of its own part, or of the vision tower, a size is: 2 to 4, else 0."""
    widths = [section.get("hidden_size") or 0 for section in (content, content.get("vision_config") or {})]
    return next((value // width for width in widths if width and value in range(2 * width, 5 * width, width)), 0)


def _rotated_and_not(content: Mapping[str, Any]) -> set[int]:
    """Return the sums of a head's rotated and unrotated features: for all blocks, and for single ones."""
    single = [item for value in content.values() if is_by_index(value) for item in value.values()]
    names = ("qk_nope_head_dim", "qk_rope_head_dim")
    sizes = [
        [{**content, **overrides}.get(name) or 0 for name in names]
        for overrides in ({}, *single)
        if isinstance(overrides, Mapping)
    ]
    return {sum(features) for features in sizes if all(features)}


def _state_space(name: str, width: int) -> int | None:
    """Return a size of a state-space layer of this width, which its heads divide."""
    heads = {r"(mamba_)?(n|num)_heads|n_mamba_heads": width // HEAD_DIM, r"mamba_d_head|mamba_head_?dim": HEAD_DIM}
    sizes = {**heads, r"mamba_d_ssm": width}
    return next((size for pattern, size in sizes.items() if re.fullmatch(pattern, name)), None)


def small_sections(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Divide half a head's features among the sections of a rotary embedding, in the same proportions."""
    sections = rope["mrope_section"]
    half = int(HEAD_DIM * (rope.get("partial_rotary_factor") or 1)) // 2
    ideal = {section: section * half / sum(sections) for section in sections}
    shares = (dict(zip(ideal, lengths, strict=True)) for lengths in product(range(1, half + 1), repeat=len(ideal)))
    fitting = [share for share in shares if sum(share[section] for section in sections) == half]
    if not fitting:  # more sections than features
        return dict(rope)
    best = min(fitting, key=lambda share: sum((share[section] - ideal[section]) ** 2 for section in sections))
    return {**rope, "mrope_section": [best[section] for section in sections]}
