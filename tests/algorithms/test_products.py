"""Products in single precision that another library computes."""

import pytest
import torch

from emloc_core.algorithms import products
from emloc_core.algorithms.products import by_onednn
from emloc_core.algorithms.statistics import Gram

SETTING = torch.backends.mkldnn.matmul


def error() -> float:
    left, right = torch.randn(2, 300, 300, generator=torch.Generator().manual_seed(1))
    exact = left.double() @ right.double()
    return float((left @ right - exact).norm() / exact.norm())


def test_no_precision_is_lost():
    with by_onednn():
        assert error() < 2e-6


def test_what_loses_precision_is_not_asked(monkeypatch):
    monkeypatch.setattr(products, "_SINGLE", 0.0)
    products._is_precise.cache_clear()
    before = SETTING.fp32_precision
    try:
        with by_onednn():
            assert SETTING.fp32_precision == before
    finally:
        products._is_precise.cache_clear()


@pytest.mark.parametrize("halves", [1, 2])
def test_no_precision_of_factors_in_bfloat16_is_lost(halves):
    """Two of them may be multiplied as such; one of another dtype may not."""
    left, right = torch.randn(2, 300, 300, generator=torch.Generator().manual_seed(1))
    left, right = left.bfloat16(), right.bfloat16() if halves == 2 else right
    exact = left.double() @ right.double()
    with by_onednn(left, right):
        product = left.float() @ right.float()
    assert float((product - exact).norm() / exact.norm()) < 2e-6


def test_rows_in_bfloat16_are_summed_as_in_single_precision():
    rows = torch.randn(3000, 40, generator=torch.Generator().manual_seed(1)).bfloat16()
    gram = Gram("input", 40)
    for part in rows.split(700):
        mine = part.clone()
        gram.add(mine)
        mine.zero_()  # the caller's, who may use its memory again
    exact = rows.double().T @ rows.double()
    assert float((gram.matrix - exact).norm() / exact.norm()) < 2e-6


def test_the_setting_is_restored(monkeypatch):
    monkeypatch.setattr(products, "_is_precise", lambda: True)
    before = SETTING.fp32_precision
    with by_onednn():
        assert SETTING.fp32_precision == "bf16"
    with pytest.raises(ZeroDivisionError), by_onednn():
        raise ZeroDivisionError
    assert SETTING.fp32_precision == before
