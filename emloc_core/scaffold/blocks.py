"""Chooses the blocks that a tiny config keeps: one of each kind, and the other fields that count them."""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

_MOST_KINDS = 8
_COUNT = r"num_((hidden_|global_)?layers|blocks)|n_layers?|layers|depth|(en|de)coder_layers"
#: How many of the last blocks share what an earlier one computed.
_SHARING = r"num_kv_shared_layers"
#: The index of a block at which something happens that happens nowhere else.
_PLACE = r"\w+_layer_(id|idx|index)"
#: The number of blocks before the one from which on something else happens.
_BOUNDARY = r"num_dense_layers|first_k_dense_replace|\w+_layer_(id|idx|index)_(start|end)"
#: The kinds of a few blocks, which the others repeat.
_REPEATED = "block_types"
#: The number of blocks of one part of the stack, such as the recurrent one; they add up to all.
_PART = r"n(um)?_\w+_layers"


def few_blocks(content: Mapping[str, Any], small: dict[str, Any], of_each: int) -> dict[str, Any]:
    """Cut a section of a config to a few blocks of each kind, and at least two.

    Args:
        small: the same section with smaller sizes; it is changed, and returned.
        of_each: maximum number of blocks of each kind.
    """
    for section, inner in content.items():  # some nested sections repeat an index of this one
        if isinstance(inner, Mapping):
            small.update({name: small[section][name] for name, value in inner.items()
                          if re.fullmatch(_PLACE, str(name)) and content.get(name) == value})  # fmt: skip
    counts = [name for name in content if re.fullmatch(_COUNT, name) and isinstance(content[name], int)]
    if not counts:
        return small
    count = content[counts[0]]
    lists = {name: value for name, value in content.items() if isinstance(value, list) and value}
    indices = {name for name, value in lists.items() if _are_indices(value, count)}
    lists_by_block = {name for name, value in lists.items() if len(value) == count and name not in indices}
    numbers = [name for name, value in content.items() if type(value) is int and 0 <= value <= count]
    positions = [name for name in numbers if re.fullmatch(_PLACE, name) and content[name] < count]
    boundaries = [name for name in numbers if re.fullmatch(_BOUNDARY, name)]
    # Settings of single blocks, by their number.
    settings = {name: {int(key): key for key in value} for name, value in content.items() if is_by_index(value)}
    parts = _parts(content, counts, count)
    kinds = [
        [part[index] for part in parts]
        + [content[name][index] for name in lists_by_block]
        + [index in lists[name] for name in indices]
        + [index == content[name] for name in positions]
        + [index < content[name] for name in boundaries]
        + [content[name].get(keys.get(index)) for name, keys in settings.items()]
        for index in range(count)
    ]
    periods = [value for name, value in content.items() if name.endswith("_period") and isinstance(value, int)]
    periods += [len(value) for name, value in lists.items() if name == _REPEATED and len(value) < count]
    kept = _some_of_each(kinds, max(periods, default=0), of_each)
    if (indices or positions) and kept[-1] + 1 < count:  # what happens after those blocks happens between blocks
        kept.append(kept[-1] + 1)
    small.update(dict.fromkeys(counts, len(kept)))
    for name in indices:
        small[name] = [new for new, old in enumerate(kept) if old in lists[name]]
    small.update({name: kept.index(content[name]) for name in positions if content[name] in kept})
    small.update({name: sum(old < content[name] for old in kept) for name in boundaries})
    for name in lists_by_block:
        small[name] = [small[name][index] for index in kept]
    for part in parts:
        small.update({name: sum(part[index] == name for index in kept) for name in set(part) - {""}})
    for name, keys in settings.items():
        small[name] = {str(new): small[name][keys[old]] for new, old in enumerate(kept) if old in keys}
    return small


def is_by_index(value: Any) -> bool:
    """Say whether the keys of a config's section are numbers, such as those of blocks."""
    return isinstance(value, Mapping) and len(value) > 0 and all(str(key).isdigit() for key in value)


def _parts(content: Mapping[str, Any], counts: Sequence[str], count: int) -> list[list[str]]:
    """Return divisions of the stack: for every block the field that counts it, or an empty name."""
    integers = {name: value for name, value in content.items() if isinstance(value, int) and name not in counts}
    sharing = [[""] * (count - value) + [name] * value for name, value in integers.items()
               if re.fullmatch(_SHARING, name) and value < count]  # fmt: skip
    part_counts = {name: value for name, value in integers.items() if re.fullmatch(_PART, name)}
    divided = [[name for name, value in part_counts.items() for _ in range(value)]]
    return sharing + (divided if sum(part_counts.values()) == count else [])


def _some_of_each(kinds: Sequence[Any], period: int, of_each: int) -> list[int]:
    """Return the indices of the first blocks of each kind, or whole periods if kinds alternate; at least two."""
    if period > 1:
        return list(range(min(period * of_each, len(kinds))))
    first = [index for index, kind in enumerate(kinds) if kinds[:index].count(kind) < of_each]
    return first[: _MOST_KINDS * of_each] if len(first) > 1 else list(range(min(2, len(kinds))))


def _are_indices(value: Sequence[Any], count: int) -> bool:
    """Say whether a list contains indices of blocks: increasing integers below the number of blocks."""
    are_positions = all(isinstance(item, int) and not isinstance(item, bool) and 0 <= item < count for item in value)
    return are_positions and all(before < after for before, after in pairwise(value))
