"""The sensitivity of a block to a Linear's error, against values computed by hand."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from transformers.cache_utils import KVSharingDict

from emloc_core.algorithms.factorize import factorize
from emloc_core.algorithms.statistics import Gram
from emloc_core.emulator.sensitivity import copied, sensitivities


class Block(nn.Module):
    """``x + scale * linear(x)``, with a tuple for an answer as some models have it."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16, bias=False)
        self.scale = scale

    def forward(self, x: torch.Tensor, *, mask: torch.Tensor | None = None) -> tuple[torch.Tensor]:
        return (x + self.scale * self.linear(x) * (1 if mask is None else mask),)


def measured(scale, inputs, mask=None):
    """The sensitivity of the block's only Linear, and its factors at the rank that was tried."""
    torch.manual_seed(0)
    block = Block(scale)
    gram = Gram("output", 16)

    @contextmanager
    def answering(path, stand_in):
        assert path == "linear"
        kept = block.linear.weight.data
        block.linear.weight.data = stand_in.weight().float()
        yield
        block.linear.weight.data = kept

    with torch.no_grad():
        gram.add(block.linear(inputs))
        calls = [((row,), {"mask": mask}) for row in inputs]
        factors = factorize(block.linear.weight, gram, 7)
        return sensitivities(block, calls, {"linear": factors}, answering)["linear"], block, factors


def test_it_is_the_relative_change_of_every_token_for_a_unit_of_error():
    inputs = torch.randn(8, 5, 16, generator=torch.Generator().manual_seed(1)) * torch.logspace(0, 3, 5)[:, None]
    sensitivity, block, factors = measured(0.5, inputs)
    with torch.no_grad():
        u, v = factors.u[:, :4], factors.v[:4]  # rank 4 is half of the 16 x 16 parameters
        change = 0.5 * (inputs @ (block.linear.weight - u @ v).T)
        share = (change.norm(dim=-1) / block(inputs)[0].norm(dim=-1)).square().mean()
    assert sensitivity == pytest.approx(float(share) / factors.relative_error(4) ** 2, rel=1e-4)


def test_a_linear_that_is_hardly_used_hardly_disturbs():
    inputs = torch.randn(8, 5, 16, generator=torch.Generator().manual_seed(1))
    assert measured(0.01, inputs)[0] < 1e-3 * measured(1.0, inputs)[0]


def test_copies_stay_as_they_were():
    x, mask = torch.ones(2, 16), {"causal": (torch.zeros(2, 1), None)}
    shared = KVSharingDict({"full": (torch.ones(2),)})
    args, kwargs = copied(((x,), {"mask": mask, "use_cache": False, "shared": shared}))
    x.zero_()
    mask["causal"][0].fill_(1)
    shared["full"][0].zero_()
    shared["sliding"] = ()
    assert list(kwargs["shared"]) == ["full"]
    assert torch.equal(kwargs["shared"]["full"][0], torch.ones(2))
    assert torch.equal(args[0], torch.ones(2, 16))
    assert torch.equal(kwargs["mask"]["causal"][0], torch.zeros(2, 1))
    assert kwargs["use_cache"] is False


def test_where_half_the_ranks_leave_no_error_fewer_are_tried():
    direction = torch.randn(2, 16, generator=torch.Generator().manual_seed(2))
    inputs = torch.randn(8, 5, 2, generator=torch.Generator().manual_seed(1)) @ direction
    assert measured(1.0, inputs)[0] > 0


def test_a_linear_that_answers_nothing_has_none():
    assert measured(1.0, torch.zeros(8, 5, 16))[0] == 0
