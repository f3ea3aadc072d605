"""Kernels compile for cards that are not at hand, spill no registers, and store as wide as cards can."""

import json
import os
import subprocess
import sys

import pytest
from support.marks import thorough
from support.paths import ROOT


@pytest.mark.parametrize("targets", ["80 90", *thorough("75 86 89 100 120 gfx942")])
def test_no_kernel_spills(targets, tmp_path):
    targets = targets.split()
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "support.kernels", "--few", *targets],
        cwd=ROOT / "tests", env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert {(row["kernel"], row["target"]) for row in rows} == {
        (kernel, target) for kernel in ("trellis", "levels", "round", "descend") for target in targets
    }
    assert [row for row in rows if row["spilled"] or row["shared"] > 48 << 10] == []
    assert {tuple(row["stores"]) for row in rows if "14336" in row["instantiation"] and "stores" in row} == {("16",)}
