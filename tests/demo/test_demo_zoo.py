"""The demo's zoo: its models are of several families, one is damaged and one the same again, and what it compares."""

import shutil
from contextlib import closing
from pathlib import Path

import emloc_demo.zoo.command
import emloc_internvl
import emloc_llama
import emloc_qwen
import pytest
from emloc_demo.zoo.command import compare, convert, digest
from emloc_demo.zoo.models import AGAIN, BROKEN, EXPERTS, JOBS, PICTURES, SMALL, SMOLLM2, prepare

from emloc_core.data.rows import load_rows
from emloc_core.data.tokenize import load_processing
from emloc_core.errors import EmlocError
from emloc_core.files.checkpoint import Checkpoint
from emloc_core.files.output import TIMING
from emloc_core.plugins.builtin import ALGORITHMS
from emloc_core.plugins.manager import plugin_manager
from emloc_core.zoo.jobs.job import ZooJob
from emloc_core.zoo.jobs.outcome import Outcome
from emloc_core.zoo.jobs.sources import Defaults, resolve
from emloc_core.zoo.state.store import Store


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The demo's directory without SmolLM2."""
    directory = tmp_path_factory.mktemp("demo-zoo")
    assert prepare(directory, smollm2=False) == directory / JOBS
    return directory


def test_all_families_of_the_tree(prepared):
    models = [Checkpoint(prepared / "models" / name) for name in (*SMALL, PICTURES)]
    assert len(models) >= 8
    shown = {plugin_manager().family_for(model.config).name for model in models}
    in_tree = [family for plugin in (emloc_llama, emloc_qwen, emloc_internvl) for family in plugin.emloc_families()]
    assert shown == {family.name for family in in_tree}


def test_jobs(prepared, tmp_path):
    jobs = {job.name: job for job in resolve([str(prepared / JOBS)], Defaults(offline=True))}
    kinds = {name: job.compress.kind for name, job in jobs.items() if Path(job.model).name == EXPERTS}
    assert set(kinds.values()) == set(ALGORITHMS["emulators"])
    assert [name for name in jobs if name not in list(kinds)[1:]] == [*SMALL, PICTURES, BROKEN, AGAIN]
    prints = {name: jobs[name].fingerprint(tmp_path) for name in ("llama", "mistral", AGAIN, BROKEN)}
    assert prints["mistral"] == prints[AGAIN]
    assert len(set(prints.values())) == 3
    assert [name for name, job in jobs.items() if job.train and job.merge and job.eval] == ["llama"]
    with pytest.raises(EmlocError, match="is truncated"):
        _ = Checkpoint(jobs[BROKEN].model).tensors
    assert load_rows(jobs[PICTURES].data)[0].images


@pytest.mark.parametrize("name", [*SMALL, PICTURES])
def test_models_read_their_rows(prepared, name):
    model = Checkpoint(prepared / "models" / name)
    family = plugin_manager().family_for(model.config)
    file = "pictures/calibration.jsonl" if name == PICTURES else "data/train.jsonl"
    rows = load_rows(str(prepared / file))[:2]
    assert load_processing(model.directory, family, rows)


def test_what_is_there_is_not_made_again(prepared):
    stamps = {path: path.stat().st_mtime_ns for path in prepared.rglob("*")}
    prepare(prepared, smollm2=False)
    assert {path: path.stat().st_mtime_ns for path in prepared.rglob("*")} == stamps


def test_smollm2_is_among_the_jobs(prepared, tmp_path, monkeypatch):
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    (tmp_path / JOBS).unlink()
    monkeypatch.setattr("emloc_demo.model.write_base", Path.mkdir)
    assert f"models/{SMOLLM2}" in prepare(tmp_path).read_text()


def finished(zoo, **files):
    """A zoo with one finished job, whose emulator has these files."""
    emulator = zoo / "jobs" / "one" / "emulator"
    emulator.mkdir(parents=True)
    for name, content in files.items():
        (emulator / f"{name}.json").write_text(content)
    with closing(Store(zoo, create=True)) as store:
        store.add([ZooJob(name="one", model="m")], ["f"])
        store.start("one", 1, "logs/one.1.log")
        store.finish("one", 1, 1.0, Outcome(None, result={"bytes": {"emulator": 5}}))
    return zoo


def test_compares_all_files_but_timings(tmp_path):
    zoos = [finished(tmp_path / name, emloc="same", timing=name) for name in ("a", "b")]
    assert "1 emulators, every file the same bytes" in compare(*zoos)
    assert (zoos[0] / "jobs" / "one" / "emulator" / TIMING).exists()
    other = finished(tmp_path / "c", emloc="other", timing="a")
    with pytest.raises(EmlocError, match="different emulators of one"):
        compare(zoos[0], other)


def test_a_missing_file_is_a_difference(tmp_path):
    one, two = finished(tmp_path / "a", emloc="same", more="x"), finished(tmp_path / "b", emloc="same")
    assert digest(one / "jobs" / "one" / "emulator") != digest(two / "jobs" / "one" / "emulator")


@pytest.mark.parametrize(("name", "good"), [("one", True), (BROKEN, False)])
def test_says_what_went_otherwise(tmp_path, monkeypatch, name, good):
    """The damaged model must fail, the others must not."""
    monkeypatch.setattr(emloc_demo.zoo.command, "emloc", lambda *_, **__: None)
    with closing(Store(tmp_path, create=True)) as store:
        store.add([ZooJob(name=name, model="m")], ["f"])
        store.start(name, 1, "log")
        store.finish(name, 1, 1.0, Outcome(None))
    if good:
        convert(tmp_path / JOBS, tmp_path)
    else:
        with pytest.raises(EmlocError, match=f"{BROKEN} is done"):
            convert(tmp_path / JOBS, tmp_path)
