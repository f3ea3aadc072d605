"""Rows that a tiny model can learn."""

import json
from pathlib import Path

ANIMALS = ["cat", "dog", "horse", "cow", "goat", "duck", "hen", "fox", "bear", "wolf", "mouse", "frog"]
COLOURS = ["red", "blue", "green", "black", "white", "brown", "grey", "pink", "gold", "teal"]


def example_rows() -> list[dict[str, str]]:
    """120 distinct rows: a sentence to write from an animal and a colour."""
    return [
        {"prompt": f"animal: {animal}, colour: {colour}. sentence:", "completion": f" a {colour} {animal} runs."}
        for animal in ANIMALS
        for colour in COLOURS
    ]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    """Write ``rows`` to ``path``, one JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tokenized_row(row, processing):
    """Return the sample of one row, not cut."""
    from emloc_core.data.tokenize import tokenized

    (sample,) = tokenized([row], processing)
    return sample
