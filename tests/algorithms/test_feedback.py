"""Rounding with feedback: every part of it lowers the loss of the outputs; and where it ends."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emloc_core.algorithms import feedback, levels
from emloc_core.algorithms.feedback import Damped, damped, descended, descent, with_feedback
from emloc_core.algorithms.scales import GROUP, fitted_scales, lookup
from emloc_core.algorithms.statistics import Gram
from emloc_core.standins import NF4, FourBitLowRank, Trellis, TwoBitLowRank


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs_gram(n, seed=0, rows=50):
    inputs = draw(rows, n, seed=seed) @ draw(n, n, seed=seed + 1)
    return inputs.T @ inputs


def loss(matrix, rounded, damped):
    apart = (matrix - rounded).double()
    with damped.matrix() as gram:
        return float((apart @ gram.double() * apart).sum())


def to_integers(numbers, _column):
    return numbers.round()


cases = given(m=st.integers(1, 6), n=st.integers(1, 200), seed=st.integers(0, 2**16))


@settings(max_examples=25, deadline=None)
@cases
def test_no_pass_of_descent_raises_the_loss(m, n, seed):
    matrix, gram = 2 * draw(m, n, seed=seed), Damped(inputs_gram(n, seed))
    rounded = matrix.round()
    for _ in range(3):
        before = loss(matrix, rounded, gram)
        rounded = descended(rounded, descent(matrix, rounded, gram), gram, to_integers)
        assert loss(matrix, rounded, gram) <= before * (1 + 1e-5)
        assert torch.equal(rounded, rounded.round())


def test_descent_ends_where_no_number_alone_can_be_better():
    matrix, gram = 2 * draw(4, 150), Damped(inputs_gram(150))
    rounded, before = with_feedback(matrix, gram, to_integers), None
    while before is None or not torch.equal(rounded, before):
        before, slopes = rounded, descent(matrix, rounded, gram)
        rounded = descended(rounded.clone(), slopes, gram, to_integers)
    least = loss(matrix, rounded, gram)
    for row in range(4):
        for column in range(150):
            for step in (-1, 1):
                other = rounded.clone()
                other[row, column] += step
                assert loss(matrix, other, gram) > least


def test_descent_finds_the_best_of_all_choices_where_there_are_few():
    gram = Damped(inputs_gram(3, rows=3))
    matrix = 2 * draw(20, 3, seed=5)
    near = matrix.floor()[:, None] + torch.cartesian_prod(*[torch.arange(-1.0, 3.0)] * 3)
    apart = matrix[:, None] - near
    with gram.matrix() as gram_matrix:
        best = (apart @ gram_matrix * apart).sum(-1).amin(1)
    plain = matrix.round()
    fitted = with_feedback(matrix, gram, to_integers)
    for _ in range(5):
        fitted = descended(fitted, descent(matrix, fitted, gram), gram, to_integers)
    apart, plain = matrix - fitted, matrix - plain
    with gram.matrix() as gram_matrix:
        reached, rounded = ((difference @ gram_matrix * difference).sum(1) for difference in (apart, plain))
    assert bool((reached >= best * (1 - 1e-5)).all())
    assert float((reached - best).sum()) < 0.1 * float((rounded - best).sum())


@pytest.mark.parametrize("n", [1, 64, 700])
def test_the_factor_of_a_gram_gives_it_again(n):
    gram = Damped(inputs_gram(n, rows=2 * n))
    factor = gram.factor.triu().double()
    assert torch.allclose(factor.diagonal(), torch.ones(n).double())
    with gram.matrix() as gram_matrix:
        ordered = gram_matrix[gram.order][:, gram.order].double()
    solved = torch.linalg.solve_triangular(factor, ordered, upper=True)
    middle = torch.linalg.solve_triangular(factor.T, solved, upper=False, left=False)  # U^-1 G U^-T is diagonal
    scale = middle.diagonal().rsqrt()
    apart = scale[:, None] * middle * scale - torch.eye(n)
    assert float(apart.norm()) < 1e-3 * n**0.5


def test_columns_are_rounded_as_one_by_one():
    """Changes are passed on some columns at a time, at two distances."""
    matrix, gram = 2 * draw(40, 600), Damped(inputs_gram(600, rows=1200))
    work, weights = matrix[:, gram.order].double(), gram.factor.double()
    for column in range(600):
        change = work[:, column].round() - matrix[:, gram.order[column]]
        work[:, column] = work[:, column].round()
        work[:, column + 1 :] -= change[:, None] * weights[column, column + 1 :]
    rounded = with_feedback(matrix, gram, to_integers)
    one_by_one = torch.empty_like(matrix)
    one_by_one[:, gram.order] = work.float()
    assert loss(matrix, rounded, gram) == pytest.approx(loss(matrix, one_by_one, gram), rel=1e-3)

    with gram.matrix() as matrix_of_gram:
        for column in range(600):
            slope = (matrix - one_by_one).double() @ matrix_of_gram[:, column].double()
            one_by_one[:, column] = (one_by_one[:, column] + slope / float(gram.diagonal[column])).round()
    rounded = descended(rounded, descent(matrix, rounded, gram), gram, to_integers)
    assert loss(matrix, rounded, gram) == pytest.approx(loss(matrix, one_by_one, gram), rel=1e-3)


def test_columns_with_the_largest_inputs_come_first():
    seen = []

    def nearest(numbers, column):
        seen.append(column)
        return numbers.round()

    with_feedback(draw(2, 5), Damped(torch.diag(torch.tensor([2.0, 9.0, 1.0, 5.0, 4.0]))), nearest)
    assert seen == [1, 3, 4, 0, 2]


def test_the_order_of_the_inputs_does_not_matter():
    matrix, gram = draw(16, 64, seed=2), Damped(inputs_gram(64))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    there = torch.empty_like(matrix)
    with gram.matrix() as gram_matrix:
        other = Damped(gram_matrix[order][:, order], 0)
    there[:, order] = with_feedback(matrix[:, order], other, to_integers)
    assert torch.equal(with_feedback(matrix, gram, to_integers), there)


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 5),
    n=st.integers(1, 2 * GROUP + 3),
    seed=st.integers(0, 2**16),
)
def test_scales_are_those_of_least_squares(m, n, seed):
    matrix, gram = draw(m, n, seed=seed), Damped(inputs_gram(n, seed))
    scales = levels._scales(matrix)
    grid = levels._Grid(scales, n)
    units = lookup(grid.levels, grid.indices(matrix.T))
    with gram.matrix() as gram_matrix:
        better, descent = fitted_scales(gram_matrix @ matrix.T, units, gram_matrix, scales)
        rest = matrix.T - levels._Grid(better, n).numbers(units.clone())
        assert torch.allclose(descent, gram_matrix @ rest, atol=1e-4 * float((gram_matrix @ matrix.T).abs().max()))
        fitted, units = better.float(), units.T
        root = torch.linalg.cholesky(gram_matrix.double())
    for row in range(m):
        columns = torch.stack([
            units[row, start : start + GROUP].double() @ root[start : start + GROUP]
            for start in range(0, n, GROUP)
        ], dim=1)  # fmt: skip
        best = torch.linalg.lstsq(columns, (matrix[row].double() @ root)[:, None], driver="gelsd").solution[:, 0]
        if bool((best > 1e-3).all()):
            # In bf16. What counts is the outputs: the scale of a few numbers that hardly matter is found less exactly.
            apart = columns @ (fitted[row].double() - best)
            assert apart.norm() <= 5e-3 * (columns @ best).norm()
        elif bool((best < -1e-3).any()):
            assert torch.equal(fitted[row], scales[row].float())


@pytest.mark.parametrize(
    "kind",
    [NF4(), Trellis(), FourBitLowRank(), TwoBitLowRank()],
    ids=lambda kind: kind.name,
)
def test_matrices_with_the_same_inputs_are_rounded_together_as_one_by_one(kind):
    gram = Gram("input", 300)
    gram.add(draw(400, 300) @ draw(300, 300, seed=1))
    weights, ranks = [draw(m, 300, seed=m) for m in (40, 24, 70)], [6, 4, 9]
    fit = kind.fit
    together = fit(weights, gram, ranks)
    for weight, rank, joint in zip(weights, ranks, together, strict=True):
        (alone,) = fit([weight], gram, [rank])
        packed = [kind.pack(fitted, torch.float32) for fitted in (joint, alone)]
        assert all(torch.equal(part, packed[1][name]) for name, part in packed[0].items())


def test_what_only_the_gram_decides_is_computed_once_and_is_the_same():
    gram = Gram("input", 90)
    gram.add(draw(200, 90))
    first, before = damped(gram), gram.matrix.clone()
    assert damped(gram) is first
    assert torch.equal(first.factor, Damped(before.clone()).factor)
    with_feedback(draw(3, 90), first, to_integers)
    descended(draw(3, 90).round(), draw(3, 90), first, to_integers)
    assert torch.equal(gram.matrix, before)  # only its diagonal was changed, and restored
    gram.add(draw(1, 90))
    assert damped(gram) is not first


def test_some_rows_at_a_time_round_to_what_all_do(monkeypatch):
    generator = torch.Generator().manual_seed(3)
    matrix, inputs = torch.randn(50, 40, generator=generator), torch.randn(90, 40, generator=generator)
    gram, levels_of_four_bits = Damped(inputs.T @ inputs), torch.linspace(-1, 1, 16)
    scales = matrix.abs().amax(1, keepdim=True).expand_as(matrix)
    together = levels.rounded(matrix, gram), feedback.to_levels(matrix, gram, levels_of_four_bits, scales)
    monkeypatch.setitem(feedback.ROWS, "cpu", 16)
    parts = levels.rounded(matrix, gram), feedback.to_levels(matrix, gram, levels_of_four_bits, scales)
    assert torch.equal(together[0].indices, parts[0].indices)
    assert torch.equal(together[0].scales, parts[0].scales)
    assert torch.equal(together[1], parts[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("massive", [0, 3e4])
def test_a_gram_in_single_precision_is_the_rounded_sum(dtype, massive):
    rows = torch.randn(900, 700, generator=torch.Generator().manual_seed(0))
    rows[0, 5] += massive
    rows[1, 9] -= massive
    gram = Gram("input", 700, dtype)
    gram.add(rows)
    exact = gram.matrix
    assert exact.dtype == (torch.float64 if massive else dtype)
    assert gram.single.dtype == torch.float32
    assert torch.allclose(gram.single, exact.float(), rtol=2**-23, atol=0)
    assert torch.equal(gram.single, gram.single.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_narrowed_gram_is_its_sum_in_fp32(dtype):
    gram = Gram("input", 40, dtype)
    rows = torch.randn(200, 40)
    rows[3] *= 1000
    gram.add(rows)
    before = gram.single.clone()
    gram.narrow()
    assert gram.dtype == torch.float32
    assert torch.equal(gram.single, before)
    assert not len(gram.parts()[1])
