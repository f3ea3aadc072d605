"""Regular expressions in an adapter's config: PEFT matches every module of the model against them.

A backtracking matcher may need exponential time for a short pattern, so those that might are refused before any is
matched. What matching costs at most is the product of its choices: how often each repetition may repeat, and how many
branches each alternation has.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

#: Fields of PEFT's configs with patterns: as keys, as entries, or the whole.
_FIELDS = ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save", "rank_pattern", "alpha_pattern")
#: Ways to match, of all patterns of a config together.
_MOST_WAYS = 300_000
_PATH, _NUMBER = 100, 4  # characters of a module's path, and of a number in it
_TOKEN = re.compile(
    r"(?P<open>\((\?[:!=])?)|(?P<close>\))|(?P<branch>\|)|(?P<repeat>[*+]\??)|(?P<maybe>\?)"
    r"|(?P<digits>\\d|\[0-9\])|(?P<one>\\[\W\w]|\[\^?[^\[\]\\]+\]|[^\\\[\](){}*+?|])"
)


def pattern_problems(config: Mapping[str, Any]) -> list[str]:
    """Say which patterns of an adapter's config may take too long to match, or are none; an empty list says none."""
    problems, total = [], 0
    for field, pattern in _patterns(config):
        total += ways(pattern)
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            problems.append(f"its {field} has {pattern[:80]!r}, which is no regular expression ({error})")
            continue
        if total > _MOST_WAYS:
            return [*problems, f"its {field} has {pattern[:80]!r}, which might take for ever to match"]
    return problems


def ways(pattern: str) -> int:
    """Return in how many ways a path can be matched at most; more than can be tried where that is not known."""
    if pattern.replace(".", "").replace("_", "").isalnum():
        return 1
    found, branches, before, place = 1, [1], "", 0
    while place < len(pattern):
        token = _TOKEN.match(pattern, place)
        kind = token.lastgroup if token else None
        if token is None or kind is None or (kind == "repeat" and before not in ("one", "digits")):
            return _MOST_WAYS + 1  # a repeated group, a count, a reference
        if kind == "one" and token[0][0] == "\\" and token[0][1].isdigit():
            return _MOST_WAYS + 1
        if kind == "open":
            branches.append(1)
        elif kind == "close" and len(branches) > 1:
            found *= branches.pop()
        elif kind == "branch":
            branches[-1] += 1
        elif kind == "repeat":
            found *= _NUMBER if before == "digits" else _PATH
        elif kind == "maybe":
            found *= 2
        before, place = kind, token.end()
    return found * math.prod(branches)


def _patterns(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for field in _FIELDS:
        given = config.get(field)
        for pattern in [given] if isinstance(given, str) else list(given) if isinstance(given, list | Mapping) else []:
            if isinstance(pattern, str):
                yield field, pattern
