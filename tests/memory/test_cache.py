"""What is cached of models equals what they are; a damaged, old or unwritable cache is done without."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from emloc_qwen import QWEN_VL
from support.planned import CASES, label, workload, write_config

from emloc_core.api import plan
from emloc_core.family import Family
from emloc_core.memory import cache, planned_model
from emloc_core.memory.cache import VARIABLE, Cache
from emloc_core.memory.model import MemoryModel, Need
from emloc_core.memory.outline import Outline, described
from emloc_core.memory.tracing import Phases
from emloc_core.registry.registry import load_entries


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    planned_model._cached.cache_clear()
    return tmp_path / "cache"


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that grows with every trace."""
    names: list[str] = []
    follow = MemoryModel._follow

    def followed(self: MemoryModel, *args: Any) -> Phases:
        names.append(self.format.name)
        return follow(self, *args)

    monkeypatch.setattr(MemoryModel, "_follow", followed)
    return names


def planned(file: Path) -> dict[str, Any]:
    """Return a plan, in a process that knows no more than what is kept."""
    planned_model._cached.cache_clear()
    return plan(file.parent, memory="1GiB", device="cpu", length=64, batch_size=2).describe()


def inference(file: Path) -> Need:
    """Return what an answer needs, in such a process."""
    planned_model._cached.cache_clear()
    return MemoryModel(file, workload()).inference()


def test_what_was_traced_once_is_not_traced_again(directory: Path, shallow_model: Path, traces: list[str]) -> None:
    fresh = planned(shallow_model / "config.json")
    assert traces
    traces.clear()
    assert planned(shallow_model / "config.json") == fresh
    assert not traces
    assert {path.name.partition("-")[2] for path in directory.iterdir()} == {"outline.json", "traces.json"}


@pytest.mark.usefixtures("directory")
@pytest.mark.parametrize("change", ["config", "rows", "version", "code", "family"])
def test_what_depends_on_something_else_is_traced(
    change: str, tiny_model: Path, tmp_path: Path, traces: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tiny_model / "config.json"
    before = MemoryModel(file, workload()).inference()
    load, traced = workload(), len(traces)
    if change == "config":
        content = {**json.loads(file.read_text()), "rms_norm_eps": 1e-4}
        file = tmp_path / "config.json"
        file.write_text(json.dumps(content))
    elif change == "rows":
        load = workload(batch=5)
    elif change == "version":
        monkeypatch.setattr(cache, "versions", lambda: {"torch": "99"})
    elif change == "code":
        monkeypatch.setattr(cache, "_code", lambda _: "other")
    else:
        family = replace(MemoryModel(file, load).family, keep_dense={"model.layers.0.*": "first"})
        monkeypatch.setattr(planned_model.plugin_manager(), "family_for", lambda _: family)
    again = MemoryModel(file, load).inference()
    assert len(traces) == 2 * traced
    assert (again == before) == (change != "rows")


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "cut": lambda path: path.write_text("{"),
    "binary": lambda path: path.write_bytes(b"\xff\x00"),
    "list": lambda path: path.write_text("[]"),
    "empty": lambda path: path.write_text("{}"),
    "other": lambda path: path.write_text(json.dumps(dict.fromkeys(json.loads(path.read_text()), 7))),
    "gone": lambda path: path.unlink(),
}


def test_a_damaged_file_is_made_again(directory: Path, shallow_model: Path, traces: list[str]) -> None:
    fresh = inference(shallow_model / "config.json")
    for name, damage in DAMAGE.items():
        traces.clear()
        for path in directory.glob("*.json"):
            damage(path)
        assert inference(shallow_model / "config.json") == fresh
        assert len(traces) == 1, name
        assert inference(shallow_model / "config.json") == fresh
        assert len(traces) == 1, name


def test_a_place_that_cannot_be_written_is_done_without(
    tmp_path: Path, shallow_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "")
    fresh = inference(shallow_model / "config.json")
    (tmp_path / "file").touch()
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file" / "below"))
    assert inference(shallow_model / "config.json") == fresh
    assert (tmp_path / "file").read_bytes() == b""


def test_processes_add_to_what_others_keep_and_the_oldest_files_go(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, other = Cache("some"), Cache("some")
    other.add({"b": 2})
    mine.add({"a": 1})
    assert Cache("some").values == {"a": 1, "b": 2}
    monkeypatch.setattr(cache, "_MOST", 2)
    Cache("more").add({"c": 3})
    Cache("most").add({"d": 4})
    assert sorted(path.name for path in directory.iterdir()) == ["more.json", "most.json"]


@pytest.mark.parametrize(
    ("variables", "path"),
    [
        ({VARIABLE: "/somewhere"}, Path("/somewhere")),
        ({VARIABLE: ""}, None),
        ({"XDG_CACHE_HOME": "/var/mine"}, Path("/var/mine/emloc")),
        ({"HOME": "/home/me"}, Path("/home/me/.cache/emloc")),
    ],
)
def test_the_place_is_the_users(variables: dict[str, str], path: Path | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache.directory() == path


def assert_same(outline: Outline, model: Any) -> None:
    """Compare an outline with the model."""
    ours, theirs = dict(outline.named_modules()), dict(model.named_modules())
    assert list(ours) == list(theirs)
    assert [type(module).__name__ for module in list(ours.values())[1:]] == [
        type(module).__name__ for module in list(theirs.values())[1:]
    ]
    for duplicates in (True, False):
        outlined, real = (
            [(name, p.shape, p.dtype) for name, p in source.named_parameters(remove_duplicate=not duplicates)]
            for source in (outline, model)
        )
        assert outlined == real
    head = getattr(model, "get_output_embeddings", lambda: None)()  # a model of pictures has none
    assert [path for path, module in ours.items() if module is outline.get_output_embeddings()] == [
        path for path, module in theirs.items() if module is head
    ]


@pytest.mark.usefixtures("directory")
@pytest.mark.parametrize(("family", "settings"), CASES, ids=label)
def test_an_outline_is_that_of_the_model(family: Family, settings: dict, tmp_path: Path) -> None:
    file = write_config(tmp_path / "model", family, **settings)
    model = planned_model.planned_model(file).model
    outline = Outline(json.loads(json.dumps(described(model), sort_keys=True)))
    assert_same(outline, model)
    images = int(family.modality == "image-text")
    load = replace(workload(batch=2, length=48, images=images), image_size=(16, 24) if family is QWEN_VL else None)
    fresh = MemoryModel(file, load)
    need = fresh.tuning(fresh.plan(0.5))
    planned_model._cached.cache_clear()
    again = MemoryModel(file, load)
    assert again.tuning(again.plan(0.5)) == need
    assert again.plan(0.5) == fresh.plan(0.5)
    assert again.coverage == fresh.coverage
    assert again.image == fresh.image


@pytest.mark.usefixtures("directory")
@pytest.mark.thorough
@pytest.mark.parametrize("entry", load_entries()[::6], ids=lambda entry: entry.id)
def test_the_outline_of_an_entry_is_that_of_its_model(entry: Any) -> None:
    with entry.config_file() as file:
        fresh = planned_model.planned_model(file)
        outline, model = fresh.outline, fresh.model  # the outline is made of the model, and kept
        planned_model._cached.cache_clear()
        reloaded = planned_model.planned_model(file).outline
    assert_same(outline, model)
    assert_same(reloaded, model)
    planned_model._cached.cache_clear()
    with entry.config_file() as file:
        later = planned_model.planned_model(file)
    assert_same(reloaded, later.model)  # which is built when the file is gone
    assert vars(reloaded.config) == vars(outline.config)
