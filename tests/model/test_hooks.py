"""Forwards that stand in for a module's own."""

import pytest
import torch
from torch import nn

from emloc_core.model.hooks import forward_hooks, forwards


def test_another_forward_is_computed_in_place_of_the_own():
    linear, inputs, outputs = nn.Linear(3, 2), torch.ones(1, 3), []
    expected, own = linear(inputs), linear.forward
    linear.weight.data[0, 0] = torch.nan  # whatever computes with it shows

    def other(x):
        return x.sum(-1, keepdim=True)

    with forward_hooks([(linear, lambda *args: outputs.append(args[2].item()))]), forwards([(linear, other)]):
        assert linear(inputs).tolist() == [[3.0]]
        with forwards([(linear, lambda x: 2 * other(x))]):
            assert linear(inputs).tolist() == [[6.0]]
        assert linear(inputs).tolist() == [[3.0]]
    assert outputs == [3.0, 6.0, 3.0]
    assert linear.forward == own
    assert linear(inputs)[0].isnan().tolist() == [True, False]
    assert linear(inputs)[0, 1] == expected[0, 1]


def test_the_own_forward_comes_back_after_an_error():
    linear = nn.Linear(3, 2)
    with pytest.raises(ZeroDivisionError), forwards([(linear, lambda _x: 1 / 0)]):
        linear(torch.ones(1, 3))
    assert linear(torch.ones(1, 3)).shape == (1, 2)
