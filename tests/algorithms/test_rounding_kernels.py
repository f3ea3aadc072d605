"""Kernels that round blocks of columns give what torch gives: those of a GPU, in Triton's interpreter, and in C."""

import stat

import pytest
import torch
from support.marks import thorough

from emloc_core.algorithms import feedback, kernels, native
from emloc_core.algorithms.feedback import Damped, descended, descent, with_feedback
from emloc_core.algorithms.grid import Grid


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def grid(count, width, m, n, stay):
    levels = torch.linspace(-2, 2, count)
    scales = draw(-(-n // width), m, seed=1).abs() + 0.3
    kept = (draw(n, m, seed=2) > 1, draw(n, m, seed=3)) if stay else None
    return Grid(levels, scales, width, kept)


@pytest.fixture
def native_library():
    """Compile again: another test may have had no compiler."""
    if native.compiler() is None:
        pytest.skip("there is no C compiler")
    native.library.cache_clear()
    assert native.library(native.GRID)
    yield
    native.library.cache_clear()


@pytest.mark.parametrize("compiled", [native, kernels], ids=["native", "triton"])
@pytest.mark.parametrize(
    ("m", "n", "count", "width", "stay"),
    [(5, 70, 16, 1, True), (33, 9, 6, 256, False), *thorough((40, 130, 3, 64, False))],
)
def test_kernels_round_as_torch_does(compiled, m, n, count, width, stay, monkeypatch, request):
    if compiled is native:
        request.getfixturevalue("native_library")
    matrix, gram = draw(m, n), Damped(torch.cov(draw(3 * n, n, seed=4).T))
    to = grid(count, width, m, n, stay)

    def rounded(kernels):
        monkeypatch.setattr(feedback, "kernels_for", lambda _: kernels)
        once = with_feedback(matrix, gram, to)
        return once, descended(once, descent(matrix, once, gram), gram, to)

    for there, here in zip(rounded(compiled), rounded(None), strict=True):
        if compiled is native:
            assert torch.equal(there, here)
        # Sums are taken in another order, so a number at a border may be rounded the other way, and others after it.
        assert (there - here).abs().lt(1e-5).float().mean() > 0.99
        losses = [float(((matrix - part) @ (matrix - part).T).diagonal().sum()) for part in (there, here)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-2)


@pytest.mark.usefixtures("native_library")
def test_what_is_no_number_is_rounded_to_the_least_level():
    block = torch.full((1, 3), torch.nan)
    native.round_block(block, torch.zeros(1, 3), torch.eye(1), torch.tensor([0]), Grid(torch.tensor([-1.0, 1.0]),
                                                                                      torch.ones(1, 3)))  # fmt: skip
    assert block.tolist() == [[-1, -1, -1]]


@pytest.mark.usefixtures("native_library")
def test_c_rounds_numbers_in_fp32_on_a_cpu_alone():
    others = draw(1), draw(1).double(), torch.empty(1, device="meta")
    assert [feedback.kernels_for(numbers) for numbers in others] == [native, None, None]


@pytest.mark.usefixtures("native_library")
@pytest.mark.parametrize(
    "content", [None, "#!/bin/sh\nexit 1\n", '#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho > "$2"\n']
)
def test_without_a_compiler_torch_rounds(content, tmp_path, monkeypatch):
    native.library.cache_clear()
    compiler = tmp_path / "cc"
    if content:
        compiler.write_text(content)
        compiler.chmod(stat.S_IRWXU)
    monkeypatch.setenv("CC", str(compiler))
    assert feedback.kernels_for(draw(1)) is None
