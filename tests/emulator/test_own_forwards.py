"""A Linear with a forward of its own is compressed if that computes the same, and refused otherwise."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from emloc_core.emulator.forwards import requiring_products
from emloc_core.emulator.ranks import LinearPlan
from emloc_core.errors import EmlocError


class Same(nn.Linear):
    """Computes what a Linear does, in another order."""

    def forward(self, input):
        return self.bias + input @ self.weight.T


class Scaled(nn.Linear):
    """Computes more."""

    def forward(self, input):
        return 1.05 * super().forward(input)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [nn.Linear, Same, Scaled])
def test_what_a_linear_returns_is_its_product(kind, dtype):
    model = nn.ModuleDict({"linear": kind(256, 64, dtype=dtype)})
    planned = [LinearPlan("linear", "block", ("linear",), 64, 256, None, "input")]

    def run(sample):
        stream = SimpleNamespace(skeleton=SimpleNamespace(model=model), sample=sample)
        with torch.no_grad(), requiring_products(stream, planned, rows=1):
            model["linear"](torch.randn(9, 256, dtype=dtype))

    run(sample=1)  # of the emulator, whose stand-ins answer
    if kind is Scaled:
        with pytest.raises(EmlocError, match="is a Scaled, which computes something else"):
            run(sample=0)
    else:
        run(sample=0)
