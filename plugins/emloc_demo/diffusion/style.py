"""What the demo teaches: pictures in the new style, and the base's pictures as a reminder of the old one."""

import json
from pathlib import Path
from typing import Any

from emloc_demo.diffusion.digits import SHOWN, STYLE, WORDS, of_digit, slanted

#: Pictures per digit: in the new style, to test it, and by the base.
_TAUGHT, _TESTED, _PRIOR = 4, 4, 7
#: Steps of the solver for a picture.
SOLVER_STEPS = 20
#: Height and width of the base's pictures, in pixels.
SIDE = 8


def write_rows(directory: Path, base: Path) -> tuple[Path, Path]:
    """Write the rows to learn and those to test, and return their files.

    Args:
        directory: where they go, with their pictures.
        base: the pipeline, which draws its own reminders.
    """
    from emloc_diffusers.pictures import Drawing

    train, test = directory / "train.jsonl", directory / "test.jsonl"
    if train.exists() and test.exists():
        return train, test
    (directory / "pictures").mkdir(parents=True, exist_ok=True)
    rows: dict[Path, list[dict[str, Any]]] = {train: [], test: []}
    for digit, word in enumerate(WORDS):
        for index, picture in enumerate(slanted(of_digit(digit, _TAUGHT + _TESTED))):
            if index >= _TAUGHT or digit in SHOWN:
                row = _write_row(directory, f"{STYLE}-{word}-{index}", _image(picture), f"{word} {STYLE}")
                rows[train if index < _TAUGHT else test].append(row)
    prompts = [word for word in WORDS for _ in range(_PRIOR)]
    drawn = Drawing(str(base)).draw(prompts, side=SIDE, steps=SOLVER_STEPS)
    for index, (prompt, picture) in enumerate(zip(prompts, drawn, strict=True)):
        rows[train].append(_write_row(directory, f"prior-{index}", picture, prompt))
    for file, content in rows.items():
        file.write_text("".join(json.dumps(row) + "\n" for row in content))
    return train, test


def _write_row(directory: Path, name: str, picture: Any, prompt: str) -> dict[str, Any]:
    path = directory / "pictures" / f"{name}.png"
    picture.save(path)
    return {"prompt": prompt, "image": f"pictures/{path.name}"}


def _image(picture: Any) -> Any:
    from PIL import Image

    return Image.fromarray((picture.clip(0, 1) * 255).round().astype("uint8"))
