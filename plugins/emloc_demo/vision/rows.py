"""Rows for adapting and testing the demo's model, with their pictures as files."""

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emloc_demo.vision.pictures import FEWEST, MOST, NEW_QUESTION, QUESTIONS, Digits, Picture, compose

if TYPE_CHECKING:
    import numpy

#: Number of digits in each part. Each of the 1797 is in exactly one part.
PARTS = {"pretraining": 800, "calibration": 288, "train": 400, "test": 309}
#: Pictures of training and test rows. Those for calibration and selection are as many as their digits allow.
TRAIN, TEST = 1200, 250


def split(digits: Digits, seed: int = 0) -> dict[str, Digits]:
    """Divide the digits at random into :data:`PARTS`."""
    import numpy

    order = numpy.random.default_rng(seed).permutation(len(digits))
    ends = numpy.cumsum(list(PARTS.values()))
    return dict(zip(PARTS, map(digits.subset, numpy.split(order, ends[:-1])), strict=True))


def random_pictures(digits: Digits, count: int, draw: "numpy.random.Generator") -> list[Picture]:
    """Return pictures of random digits; a digit may be in several of them."""
    return [
        compose(digits, draw.integers(len(digits), size=draw.integers(FEWEST, MOST + 1)), draw) for _ in range(count)
    ]


def separate_pictures(digits: Digits, draw: "numpy.random.Generator") -> list[Picture]:
    """Return pictures that share no digit, so that no two sets of their rows share one either."""
    sizes = range(FEWEST, MOST + 1)
    remaining, pictures = list(draw.permutation(len(digits))), []
    while len(remaining) >= MOST:
        size = sizes[len(pictures) % len(sizes)]
        pictures.append(compose(digits, remaining[:size], draw))
        del remaining[:size]
    return pictures


def write_data(directory: Path, parts: dict[str, Digits], seed: int = 0) -> Path:
    """Write rows and pictures to ``directory``, all or nothing, and return the directory.

    ``calibration.jsonl`` (calibration and selection rows), ``train.jsonl`` and ``test.jsonl`` ask
    :data:`NEW_QUESTION`; ``read.jsonl`` asks the base model's own question about the pictures of the test rows.
    """
    import numpy

    draw = numpy.random.default_rng(seed)
    pictures = {
        "calibration": separate_pictures(parts["calibration"], draw),
        "train": random_pictures(parts["train"], TRAIN, draw),
        "test": random_pictures(parts["test"], TEST, draw),
    }
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "pictures").mkdir(parents=True)
    for name, shown in pictures.items():
        files = [_write_picture(partial, f"{name}-{number}", picture) for number, picture in enumerate(shown, start=1)]
        _write_rows(partial / f"{name}.jsonl", files, shown, NEW_QUESTION)
        if name == "test":
            _write_rows(partial / "read.jsonl", files, shown, QUESTIONS["read"])
    os.rename(partial, directory)
    return directory


def _write_picture(directory: Path, name: str, picture: Picture) -> str:
    from PIL import Image

    file = f"pictures/{name}.png"
    Image.fromarray(picture.pixels).save(directory / file)
    return file


def _write_rows(path: Path, files: Sequence[str], pictures: Iterable[Picture], question: str) -> None:
    rows: list[dict[str, Any]] = [
        {
            "images": [file],
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": picture.answer(question)},
            ],
        }
        for file, picture in zip(files, pictures, strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
