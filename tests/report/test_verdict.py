"""What a correction came to, in words: whatever was compared, the sentence says what was chosen and why."""

import pytest
import torch

from emloc_core.adapters.candidates import CANDIDATES, choose, comparison
from emloc_core.report.verdict import verdict


def sentence(gains, rows=16, spread=1.0):
    """The sentence for candidates by their gains, in standard errors of the rows' differences."""
    noise = torch.linspace(-1, 1, rows, dtype=torch.float64)
    noise = noise / noise.std() * spread if rows > 1 else torch.zeros(1)
    losses = torch.full((len(CANDIDATES), rows, 2), 10.0, dtype=torch.float64)
    for candidate, gain in gains.items():
        index = next(i for i, other in enumerate(CANDIDATES) if (other.clamp, other.scale) == candidate)
        losses[index, :, 0] -= gain * spread / rows**0.5 + noise
    chosen = choose(losses)
    return verdict({**CANDIDATES[chosen].describe(), **comparison(CANDIDATES, losses, chosen)})


KEPT = "kept as trained: no candidate was better"
SURE = "the surest of 8 candidates: 1.000 ± 0.500 nats gained per row"


@pytest.mark.parametrize(
    ("gains", "rows", "expected"),
    [
        ({(0, 0.85): 1.0}, 16, f"{KEPT} by two standard errors (the best, scale 0.85, by 1.0)"),
        ({(3, 1.0): -1.0, (0, 1.5): -4.0}, 16, KEPT),
        ({(0, 1.3): 5.0}, 1, "kept as trained: from a single held-out row nothing is sure"),
        ({(0, 1.3): 4.0}, 16, f"scale 1.3, {SURE}"),
        ({(1, 1.0): 4.0, (0, 0.85): 3.0}, 16, f"clamp 1, {SURE}"),
    ],
)  # fmt: skip
def test_it_says_what_was_chosen_and_by_how_much(gains, rows, expected):
    assert sentence(gains, rows) == expected


@pytest.mark.parametrize(
    ("clamp", "expected"),
    [(0.0, "left as trained, by clamp 0"), (3.0, "corrected with clamp 3, without comparison"),
     ("none", "corrected with clamp none, without comparison")],
)  # fmt: skip
def test_a_fixed_clamp_is_compared_with_nothing(clamp, expected):
    assert verdict({"clamp": clamp, "scale": 1.0}) == expected
