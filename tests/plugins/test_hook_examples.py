"""The examples in the docstrings of hooks are whole plugins: each is loaded, and does what it says in a real run."""

import inspect
import re
import textwrap
from types import ModuleType

import pytest
import torch
from support.jobs import compress_job

from emloc_core import hookspecs
from emloc_core.algorithms import Lora
from emloc_core.files.checkpoint import Checkpoint
from emloc_core.files.manifest import read_manifest
from emloc_core.plugins.manager import plugin_manager
from emloc_core.settings import CompressSettings
from emloc_core.standins import StandIn

EXAMPLES = [
    textwrap.dedent(source)
    for hook in vars(hookspecs).values()
    for source in re.findall(r"```python\n(.*?)```", inspect.getdoc(hook) or "", re.DOTALL)
]


@pytest.fixture
def examples():
    """All examples, as installed plugins."""
    manager, modules = plugin_manager(), []
    for number, source in enumerate(EXAMPLES):
        module = ModuleType(f"example_{number}")
        exec(source, module.__dict__)
        manager.register(module, name=module.__name__)
        modules.append(module)
    yield manager
    for module in modules:
        manager.unregister(module)


def test_every_algorithm_hook_has_one(examples):
    hooks = ("emulators", "corrections")
    assert len(EXAMPLES) == len(hooks)
    for hook, name in zip(hooks, ("coarse", "shrinking"), strict=True):
        assert examples.algorithm(hook, name)


@pytest.mark.usefixtures("examples")
def test_an_emulator_is_made_by_the_example(tiny_model, rows_file, tmp_path):
    settings = CompressSettings(samples=4, selection=2, ratio=0.5, kind="coarse")
    path = compress_job(tiny_model, rows_file, tmp_path / "emulator", settings).run()
    result = read_manifest(path)["result"]
    assert len({linear["rank"] for linear in result["linears"]}) > 2
    assert all(0 < linear["relative_error"] < 1 for linear in result["linears"] if linear["rank"])
    with Checkpoint(path).slices(["model.layers.0.mlp.up_proj.weight"]) as slices:
        factor = slices["model.layers.0.mlp.up_proj.weight"][...]
    assert torch.equal(factor, (factor * 256).round() / 256)


def test_the_correction_of_the_examples_answers_for_every_clamp(examples):
    lora = Lora(torch.randn(2, 8), torch.randn(12, 2), 1.0)
    corrected = examples.algorithm("corrections", "shrinking")(
        torch.randn(12, 8), StandIn(torch.randn(12, 3), torch.randn(3, 8)), lora, [0, 1, None]
    )
    assert torch.equal(corrected[0].b, lora.b)
    assert corrected[1].b.norm() < lora.b.norm()
