"""The outcome of a correction in words."""

from collections.abc import Mapping
from typing import Any

_NONE = (0, 1)


def verdict(result: Mapping[str, Any]) -> str:
    """Return which candidate was chosen, and by how much it was better.

    Args:
        result: the correction's result; see :class:`emloc_core.stages.result.CorrectionResult`.
    """
    compared = {
        (candidate["clamp"], candidate.get("scale", 1)): candidate for candidate in result.get("candidates", [])
    }
    chosen = result.get("clamp"), result.get("scale", 1)
    if not compared:
        return (
            "left as trained, by clamp 0"
            if chosen == _NONE
            else f"corrected with {_describe(*chosen)}, without comparison"
        )
    if chosen != _NONE:
        gained = _gained(compared.get(chosen, {}))
        return f"{_describe(*chosen)}, the surest of {len(compared)} candidates{gained and ': '}{gained}"
    surest = {
        setting: candidate["gain"] / candidate["gain_stderr"]
        for setting, candidate in compared.items()
        if setting != _NONE and candidate.get("gain_stderr")
    }
    if not surest:
        return "kept as trained: from a single held-out row nothing is sure"
    best = max(surest, key=lambda setting: surest[setting])
    margin = f" (the best, {_describe(*best)}, by {surest[best]:.1f})" if surest[best] > 0 else ""
    return f"kept as trained: no candidate was better{' by two standard errors' if margin else ''}{margin}"


def _describe(clamp: float | str | None, scale: float) -> str:
    return (
        f"scale {scale:g}" if scale != 1 else f"clamp {clamp:g}" if isinstance(clamp, int | float) else f"clamp {clamp}"
    )


def _gained(row: Mapping[str, Any]) -> str:
    error = row.get("gain_stderr")  # unknown for a single row
    return f"{row['gain']:.3f} ± {2 * error:.3f} nats gained per row" if error else ""
