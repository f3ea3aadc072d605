"""In which tower a Linear stands, read off its module path, and what to call the towers of a model."""

from collections.abc import Sequence


def place(path: str) -> tuple[str, int | None, str]:
    """Return the path of the list of blocks that a Linear is in, its block's number, and the last part of its path.

    Outside of blocks: an empty path, and None.
    """
    parts = path.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    if number is None:
        return "", None, parts[-1]
    return ".".join(parts[:number]), int(parts[number]), parts[-1]


def short_names(towers: Sequence[str]) -> dict[str, str]:
    """Return what tells paths of towers apart: the first part in which they differ; nothing where there is one."""
    parts = [tower.split(".") for tower in towers]
    common = next((index for index, same in enumerate(zip(*parts, strict=False)) if len(set(same)) > 1), None)
    if len(towers) < 2 or common is None:
        return dict.fromkeys(towers, "")
    return {tower: path[common] for tower, path in zip(towers, parts, strict=True)}
