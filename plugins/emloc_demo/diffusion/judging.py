"""Scores of a system: the loss on held-out pictures of the style, and what a judge reads in those that it draws."""

from pathlib import Path
from typing import Any

from emloc_demo.diffusion.digits import SHOWN, STYLE, WORDS, judge
from emloc_demo.diffusion.style import SIDE, SOLVER_STEPS

#: Pictures of every prompt.
_EACH = 20


def scores(base: Path, adapter: Path | None, test: Path) -> tuple[dict[str, float], dict[str, list[Any]]]:
    """Return the scores of the base, or of the base with an adapter, and one picture of every prompt.

    Returns:
        ``loss``; ``seen`` and ``unseen``: how often style and digit are right, for digits that were shown in the
        style and those that were not; ``plain``: how often a digit asked for without the style is right and upright.
    """
    import numpy
    from emloc_diffusers.pictures import Drawing
    from emloc_diffusers.scores import Losses

    from emloc_core.data.rows import load_rows

    drawing = Drawing(str(base), adapter)
    prompts = [word + style for style in (f" {STYLE}", "") for word in WORDS for _ in range(_EACH)]
    drawn = drawing.draw(prompts, side=SIDE, steps=SOLVER_STEPS, seed=10_000)
    pixels = numpy.stack([numpy.asarray(picture) for picture in drawn]).reshape(len(drawn), -1) / 255
    expected = numpy.repeat([*range(10, 20), *range(10)], _EACH)
    right = (judge().predict(pixels) == expected).reshape(2, len(WORDS), _EACH)
    shown = list(SHOWN)
    unseen = [digit for digit in range(len(WORDS)) if digit not in SHOWN]
    results = {
        "loss": Losses(str(base), load_rows(str(test)), SIDE).mean(adapter),
        "seen": float(right[0, shown].mean()),
        "unseen": float(right[0, unseen].mean()),
        "plain": float(right[1].mean()),
    }
    return results, {"style": drawn[: len(prompts) // 2 : _EACH], "plain": drawn[len(prompts) // 2 :: _EACH]}
