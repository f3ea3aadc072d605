"""What a correction came to, in words."""

from collections.abc import Mapping
from typing import Any

_NONE = (0, 1)


def verdict(result: Mapping[str, Any]) -> str:
    """Return what was chosen among the ways to carry a LoRA over, and by how much it was better.

    Args:
        result: of a correction; see :class:`emloc_core.stages.result.CorrectionResult`.
    """
    compared = {(each["clamp"], each.get("scale", 1)): each for each in result.get("candidates", [])}
    chosen = result.get("clamp"), result.get("scale", 1)
    if not compared:
        return (
            "left as trained, by clamp 0"
            if chosen == _NONE
            else f"corrected with {_named(*chosen)}, without comparison"
        )
    if chosen != _NONE:
        gained = _gained(compared.get(chosen, {}))
        return f"{_named(*chosen)}, the surest of {len(compared)} candidates{gained and ': '}{gained}"
    surest = {
        way: each["gain"] / each["gain_stderr"]
        for way, each in compared.items()
        if way != _NONE and each.get("gain_stderr")
    }
    if not surest:
        return "kept as trained: from a single held-out row nothing is sure"
    best = max(surest, key=lambda way: surest[way])
    by = f" (the best, {_named(*best)}, by {surest[best]:.1f})" if surest[best] > 0 else ""
    return f"kept as trained: no candidate was better{' by two standard errors' if by else ''}{by}"


def _named(clamp: float | str | None, scale: float) -> str:
    return (
        f"scale {scale:g}" if scale != 1 else f"clamp {clamp:g}" if isinstance(clamp, int | float) else f"clamp {clamp}"
    )


def _gained(row: Mapping[str, Any]) -> str:
    error = row.get("gain_stderr")  # of a single row it is not known
    return f"{row['gain']:.3f} ± {2 * error:.3f} nats gained per row" if error else ""
