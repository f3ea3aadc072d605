"""Kernels that round blocks of columns, run by Triton's interpreter: they give what torch gives."""

import pytest
import torch
from support.marks import thorough

from emloc_core.algorithms import feedback
from emloc_core.algorithms.feedback import Damped, descended, descent, with_feedback
from emloc_core.algorithms.grid import Grid


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def grid(count, width, m, n, stay):
    levels = torch.linspace(-2, 2, count)
    scales = draw(-(-n // width), m, seed=1).abs() + 0.3
    kept = (draw(n, m, seed=2) > 1, draw(n, m, seed=3)) if stay else None
    return Grid(levels, scales, width, kept)


@pytest.mark.parametrize(
    ("m", "n", "count", "width", "stay"),
    [(5, 70, 16, 1, True), (33, 9, 6, 256, False), *thorough((40, 130, 3, 64, False))],
)
def test_kernels_round_as_torch_does(m, n, count, width, stay, monkeypatch):
    matrix, gram = draw(m, n), Damped(torch.cov(draw(3 * n, n, seed=4).T))
    to = grid(count, width, m, n, stay)

    def rounded():
        once = with_feedback(matrix, gram, to)
        return once, descended(once, descent(matrix, once, gram), gram, to)

    expected = rounded()
    monkeypatch.setattr(feedback, "by_kernels", lambda *_: True)
    actual = rounded()
    for there, here in zip(actual, expected, strict=True):
        # Sums are taken in another order, so a number at a border may be rounded the other way, and others after it.
        assert (there - here).abs().lt(1e-5).float().mean() > 0.99
        losses = [float(((matrix - part) @ (matrix - part).T).diagonal().sum()) for part in (there, here)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-2)
