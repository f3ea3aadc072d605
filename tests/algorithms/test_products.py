"""Products in single precision that another library computes."""

import pytest
import torch

from emloc_core.algorithms import products
from emloc_core.algorithms.products import by_onednn

SETTING = products._setting()
since_2_9 = pytest.mark.skipif(SETTING is None, reason="torch has no such setting")


def error() -> float:
    left, right = torch.randn(2, 300, 300, generator=torch.Generator().manual_seed(1))
    exact = left.double() @ right.double()
    return float((left @ right - exact).norm() / exact.norm())


def test_no_precision_is_lost():
    with by_onednn():
        assert error() < 2e-6


@since_2_9
def test_what_loses_precision_is_not_asked(monkeypatch):
    monkeypatch.setattr(products, "_SINGLE", 0.0)
    products._is_precise.cache_clear()
    before = SETTING.fp32_precision
    try:
        with by_onednn():
            assert SETTING.fp32_precision == before
    finally:
        products._is_precise.cache_clear()


@since_2_9
def test_the_setting_is_restored(monkeypatch):
    monkeypatch.setattr(products, "_is_precise", lambda: True)
    before = SETTING.fp32_precision
    with by_onednn():
        assert SETTING.fp32_precision == "bf16"
    with pytest.raises(ZeroDivisionError), by_onednn():
        raise ZeroDivisionError
    assert SETTING.fp32_precision == before
