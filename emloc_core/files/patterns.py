"""Regular expressions in an adapter's config, which PEFT matches against every module of the model.

A backtracking matcher may need exponential time for a short pattern, so patterns that might are refused before any is
matched. The cost of matching is bounded by the product of its choices: how often each repetition may repeat, and how
many branches each alternation has.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

#: Fields of PEFT's and bitsandbytes' configs that hold patterns: as keys, as entries, or as the value itself.
_FIELDS = (
    "target_modules",
    "exclude_modules",
    "layers_pattern",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "llm_int8_skip_modules",
)
#: Limit on the ways to match all patterns of a config together.
_MOST_WAYS = 300_000
_PATH, _NUMBER = 100, 4  # characters of a module's path, and of a number in it
_TOKEN = re.compile(
    r"(?P<open>\((\?[:!=])?)|(?P<close>\))|(?P<branch>\|)|(?P<repeat>[*+]\??)|(?P<maybe>\?)"
    r"|(?P<digits>\\d|\[0-9\])|(?P<one>\\[\W\w]|\[\^?[^\[\]\\]+\]|[^\\\[\](){}*+?|])"
)


def pattern_problems(config: Mapping[str, Any]) -> list[str]:
    """Return one text for every pattern in an adapter's config that is invalid or may take too long to match."""
    problems, total = [], 0
    for field, pattern in _patterns(config):
        total += ways(pattern)
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            problems.append(f"its {field} has {pattern[:80]!r}, which is not a valid regular expression ({error})")
            continue
        if total > _MOST_WAYS:
            return [*problems, f"its {field} has {pattern[:80]!r}, which might take forever to match"]
    return problems


def ways(pattern: str) -> int:
    """Return an upper bound on the ways to match a path; more than the limit if unknown."""
    if pattern.replace(".", "").replace("_", "").isalnum():
        return 1
    count, branches, before, position = 1, [1], "", 0
    while position < len(pattern):
        token = _TOKEN.match(pattern, position)
        kind = token.lastgroup if token else None
        if token is None or kind is None or (kind == "repeat" and before not in ("one", "digits")):
            return _MOST_WAYS + 1  # a repeated group, a count, a reference
        if kind == "one" and token[0][0] == "\\" and token[0][1].isdigit():
            return _MOST_WAYS + 1
        if kind == "open":
            branches.append(1)
        elif kind == "close" and len(branches) > 1:
            count *= branches.pop()
        elif kind == "branch":
            branches[-1] += 1
        elif kind == "repeat":
            count *= _NUMBER if before == "digits" else _PATH
        elif kind == "maybe":
            count *= 2
        before, position = kind, token.end()
    return count * math.prod(branches)


def _patterns(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for field in _FIELDS:
        value = config.get(field)
        for pattern in [value] if isinstance(value, str) else list(value) if isinstance(value, list | Mapping) else []:
            if isinstance(pattern, str):
                yield field, pattern
