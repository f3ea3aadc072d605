"""Finds a Linear's tower from its module path, and short names for a model's towers."""

from collections.abc import Sequence


def split_path(path: str) -> tuple[str, int | None, str]:
    """Return the path of a Linear's list of blocks, the number of its block, and the last part of its path.

    Outside blocks, the first two are an empty path and None.
    """
    parts = path.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    if number is None:
        return "", None, parts[-1]
    return ".".join(parts[:number]), int(parts[number]), parts[-1]


def short_names(towers: Sequence[str]) -> dict[str, str]:
    """Return the first part in which the towers' paths differ; empty strings if there is only one tower."""
    parts = [tower.split(".") for tower in towers]
    common = next((index for index, same in enumerate(zip(*parts, strict=False)) if len(set(same)) > 1), None)
    if len(towers) < 2 or common is None:
        return dict.fromkeys(towers, "")
    return {tower: path[common] for tower, path in zip(towers, parts, strict=True)}
