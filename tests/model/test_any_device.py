"""A device is a name: stages compute the same on one that torch knows and EMLoC does not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from emloc_core import devices
from emloc_core.errors import EmlocError

SCRIPT = """
import json, sys
from pathlib import Path

import torch
from support.jobs import compress_job
from support.pretended import NAME, pretend

library = pretend()
model, rows, work = map(Path, sys.argv[1:4])

from emloc_core.model.device import choose_device, free_memory
from emloc_core.model.opened import open_model
from emloc_core.model.weights import FrozenWeights
from emloc_core.settings import CompressSettings

seen = {"auto": choose_device().type, "free": free_memory(NAME) > 0}
for kind in sys.argv[4:]:
    for name in ("cpu", NAME):
        settings = CompressSettings(kind=kind, samples=4, selection=0)
        emulator = compress_job(model, rows, work / f"{kind}-{name}", settings, device=name).run()
        linears = json.loads((Path(emulator) / "emloc.json").read_text())["result"]["linears"]
        seen.setdefault(kind, []).append([linear["relative_error"] for linear in linears])
skeleton = open_model(str(model), "cpu").skeleton
weights = FrozenWeights(skeleton, skeleton.blocks, torch.device(NAME))
for block in skeleton.blocks:
    with skeleton.parameters(skeleton.names(block)) as parameters:
        on_cpu = {name.removeprefix(f"{block}."): tensor.detach() for name, tensor in parameters.items()}
    there = weights.parameters(block)
    seen.setdefault("placed", []).append(sorted({tensor.device.type for tensor in there.values()}))
    seen.setdefault("equal", []).append(all(torch.equal(there[name].cpu(), on_cpu[name]) for name in on_cpu))
weights.close()
print(json.dumps(seen))
"""


def test_stages_compute_the_same_on_a_device_without_a_name_of_ours(tiny_model, rows_file, tmp_path):
    """Emulators with the same errors, and weights that are lent there; a tensor left elsewhere raises."""
    kinds = ["nf4", "trellis", "low-rank"]
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tiny_model), str(rows_file), str(tmp_path), *kinds]
    process = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert process.returncode == 0, process.stderr[-3000:]
    seen = json.loads(process.stdout.splitlines()[-1])
    assert seen["auto"] == "pretended"
    assert seen["free"]
    assert all(seen["equal"])
    assert all(place == ["pretended"] for place in seen["placed"])
    for kind in kinds:
        on_cpu, there = seen[kind]
        assert there[0] == pytest.approx(on_cpu[0]), kind
        # What follows is fitted to what was rounded before, and where two levels are as near, code may choose either.
        assert sum(there) == pytest.approx(sum(on_cpu), rel=0.02), kind


LAYERS = """
import json

import torch
from support.pretended import NAME, WAITS, pretend

library = pretend()
from emloc_core.standins.registry import format_named

seen = {}
for kind in ("nf4", "trellis", "low-rank", "low-rank-nf4", "low-rank-2-bit"):
    model = torch.nn.Sequential(torch.nn.Linear(512, 384, bias=False, dtype=torch.bfloat16))
    format = format_named(kind)
    format.replace(model, {"0": 64 if format.ratios else None})
    for name, part in list(model[0].named_parameters()):
        values = torch.ones(part.shape) if part.is_floating_point() else torch.zeros(part.shape)
        setattr(model[0], name, torch.nn.Parameter(values.to(part.dtype).to(NAME), requires_grad=False))
    x = torch.ones(4, 512, dtype=torch.bfloat16).to(NAME).requires_grad_()
    for _ in range(2):  # the first fills what is kept
        WAITS.clear()
        model(x).sum().backward()
    seen[kind] = list(WAITS)
print(json.dumps(seen))
"""


def test_no_packed_layer_makes_the_cpu_wait_for_an_accelerator():
    """Forward and backward, by torch's operations; a kernel waits for nothing."""
    command = [sys.executable, "-W", "ignore", "-c", LAYERS]
    process = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert process.returncode == 0, process.stderr[-3000:]
    seen = json.loads(process.stdout.splitlines()[-1])
    assert not any(seen.values()), seen


def test_a_type_of_device_is_one_that_torch_knows():
    assert devices.type_of("xpu:1") == "xpu"
    assert [devices.is_accelerator(name) for name in ("cpu", "cuda:1", "xpu", "mps")] == [False, True, True, True]
    with pytest.raises(EmlocError, match="'gpu' is not a device"):
        devices.type_of("gpu")
