"""The pictures of ``quality.py``: the demo's small InternVL, which reads digits, learns to name them in order."""

import json
from pathlib import Path
from typing import Any

from quality_rows import SIZES, TEST, Row

#: As many as the digits of the demo's calibration part allow.
SELECTION = 32


def picture_sets(seed: int, directory: Path) -> dict[str, list[Row]]:
    """Return the rows: ``calibration``, ``tuning`` and ``selection``, drawn for every seed, and the same ``test`` rows.

    No two sets share a digit.

    Args:
        seed: of the pictures.
        directory: where they are kept, as files.
    """
    from emloc_demo.vision.pictures import load_digits
    from emloc_demo.vision.rows import split, write_data

    parts = split(load_digits())  # those of the base's training are never in another part

    def picture_directory(seed: int) -> Path:
        path = directory.absolute() / f"pictures-{seed}"
        return path if path.exists() else write_data(path, parts, seed)

    own, first = picture_directory(seed), picture_directory(0)
    calibration = _rows(own, "calibration")
    return {
        "calibration": calibration[: SIZES["calibration"]],
        "selection": calibration[SIZES["calibration"] :][:SELECTION],
        "tuning": _rows(own, "train")[: SIZES["tuning"]],
        "test": _rows(first, "test")[:TEST],
    }


def _rows(directory: Path, name: str) -> list[Row]:
    rows: list[dict[str, Any]] = list(map(json.loads, (directory / f"{name}.jsonl").read_text().splitlines()))
    return [{**row, "images": [str(directory / image) for image in row["images"]]} for row in rows]


def write_reader(directory: Path, *, experts: bool) -> Path:
    """Train the demo's model, or one with a mixture of experts; the same every time on processors of one type."""
    import torch
    from emloc_demo.vision.pictures import TURNS, load_digits
    from emloc_demo.vision.pretraining import pretrain
    from emloc_demo.vision.rows import split

    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # sums in another order would give another model
    try:
        return pretrain(directory, split(load_digits(TURNS))["pretraining"], experts=experts)
    finally:
        torch.set_num_threads(threads)
