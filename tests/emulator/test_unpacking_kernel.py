"""The kernel that unpacks levels gives what torch gives, by Triton's interpreter. All kernels compile for cards."""

import os
import subprocess
import sys

import pytest
import torch
from support.paths import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode

from emloc_core.algorithms.levels import GROUP, LEVELS
from emloc_core.standins import kernels
from emloc_core.standins.levels import digits, unpack


def packed(m, n, count, *stack):
    codes = torch.randint(count ** digits(count), (*stack, -(-m * n // digits(count)), 1), dtype=torch.uint8)
    return codes, torch.rand(*stack, m, -(-n // GROUP)).bfloat16()


# The interpreter truncates to bf16, where a GPU rounds.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("count", LEVELS)
@pytest.mark.parametrize("stack", [(), (3,)], ids=["matrix", "stack"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 300), (3, 1280)], ids=str)
def test_it_unpacks_what_torch_does(shape, stack, count, dtype):
    codes, scales = packed(*shape, count, *stack)
    unpacked = kernels.unpack_levels(codes, scales, dtype, *shape, count, digits(count))
    assert torch.equal(unpacked, unpack(codes, scales, dtype, shape, count))


def test_torch_knows_the_operator():
    with FakeTensorMode() as mode:
        codes, scales = (mode.from_tensor(part) for part in packed(7, 300, 3))
        unpacked = kernels.unpack_levels(codes, scales, torch.bfloat16, 7, 300, 3, 5)
    assert (unpacked.shape, unpacked.dtype) == ((7, 300), torch.bfloat16)


@pytest.mark.thorough
def test_all_kernels_compile_for_cards(tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "support.kernels", "80", "90"]
    out = subprocess.run(
        command, cwd=ROOT / "tests", env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert [line.split()[0] for line in out.splitlines()] == ["80"] * 7 + ["90"] * 7
