"""No two commands give different advice for the same model, memory and rows."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.run import call_here

from emloc_core import api
from emloc_core.files.documents import write_json
from emloc_core.memory.budget import Budget
from emloc_core.memory.decision import fitted
from emloc_core.memory.model import MemoryModel, Need
from emloc_core.memory.workload import make_workload
from emloc_core.plugins.manager import plugin_manager
from emloc_core.recipe.decided import decided
from emloc_core.recipe.recipe import DataSection, ModelSection, Recipe
from emloc_core.recipe.tune import Tune
from emloc_core.registry.fit import fit
from emloc_core.registry.registry import load_entries
from emloc_core.requests import CompressRequest

#: Settings of the presets that a plan takes.
OF_PLAN = {"lora_rank", "target_modules", "batch_size"}


def entries():
    """Draw entries of models of tokens that are declared: what a row of pictures costs is another matter."""
    declared = set().union(
        *(family.model_types for family in plugin_manager().families() if family.objective == "tokens")
    )
    return st.sampled_from([entry for entry in load_entries() if entry.config["model_type"] in declared])


def tuning(model, plan=None, **_):
    """Stand in for a trace, which takes seconds: exact weights, and activations that grow as real ones do."""
    weights = model.parameters() * model.dtype.itemsize if plan is None else model.emulator_bytes(plan)
    rows = model.workload.batch_size * model.workload.sequences_per_row
    text = model.config.get_text_config()
    activations = rows * model.workload.length * text.hidden_size * (text.num_hidden_layers + 12) * 2
    return Need("LoRA", {"weights": weights, "adapter": 12 * model.adapter_parameters(), "activations": activations})


@contextmanager
def stood_in(config: Path, length: int) -> Iterator[None]:
    """Let requests be planned for an entry of the registry, whose weights and tokenizer are nowhere."""

    def workload(file, train, device, **_):
        return make_workload(file, train, device, length=length)

    patches = {
        "emloc_core.memory.model.MemoryModel.tuning": tuning,
        "emloc_core.memory.model.MemoryModel.inference": lambda self: Need("inference", {"weights": self.parameters()}),
        "emloc_core.memory.decision.make_workload": workload,
        "emloc_core.files.checkpoint.open_checkpoint": lambda _: SimpleNamespace(directory=config.parent),
        "emloc_core.recipe.decided.call": call_here,
        "emloc_core.recipe.run.call": lambda *_: iter(()),  # what a model names its modules, for which it is opened
    }
    with ExitStack() as stack:
        for name, replacement in patches.items():
            stack.enter_context(mock.patch(name, replacement))
        yield


@pytest.mark.thorough
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    entry=st.deferred(entries),
    share=st.floats(0.08, 1.6),
    batch=st.integers(1, 16),
    length=st.sampled_from([300, 512, 1024, 2048]),
    headroom=st.sampled_from([None, "0", "10%"]),
    device=st.sampled_from(["cpu", "cuda"]),
)
def test_no_two_commands_disagree(tmp_path_factory, rows_file, entry, share, batch, length, headroom, device):
    config = tmp_path_factory.mktemp("entry") / "config.json"
    write_json(config, entry.config)
    train = entry.preset().train.model_copy(update={"batch_size": batch})
    with stood_in(config, length):
        size = str(
            int(share * 2 * MemoryModel(config, make_workload(config, train, length=length)).parameters()) + 10**9
        )
        budget = {"memory": size, "headroom": headroom}
        planned = api.plan(
            entry.id, **budget, length=length, device=device, **train.model_dump(include=OF_PLAN, exclude_unset=True)
        ).decision
        in_zoo = fit(entry, Budget.parse(size, headroom), batch_size=batch, length=length, device=device)
        way, emulator = planned.way, planned.emulator
        assert in_zoo.way == (way and way.name)
        assert (in_zoo.kind, in_zoo.ratio) == (emulator and emulator.kind, emulator and emulator.ratio)
        if emulator:
            request = CompressRequest(
                model=entry.id, data=str(rows_file), output=Path("emulator"), tuning=train, tuned_on=device, **budget
            )
            final = fitted(request)
            assert (final.settings.kind, final.settings.ratio) == (emulator.kind, emulator.ratio)
            assert (final.tuning.batch_size, final.tuning.accumulation) == (emulator.micro_batch, emulator.accumulation)
        if way and device == planned.base.workload.device == "cpu":  # where recipes are run, without a GPU
            recipe = Recipe(
                model=ModelSection(base=entry.id, **budget), data=DataSection(train=str(rows_file)), train=train
            )
            tune = Tune(model=entry.id, data=str(rows_file), output=Path("tuned"), settings=train, **budget)
            for decision in (decided(recipe, lambda _: None), tune.plan()[0]):
                assert decision.way == way.key
                assert (decision.train.batch_size, decision.train.accumulation) == (way.micro_batch, way.accumulation)
                if way.kind:
                    assert (decision.compress.kind, decision.compress.ratio) == (way.kind, way.ratio)
            assert bool(decision.polish) == way.is_polished  # tune adds exact steps where they pay
