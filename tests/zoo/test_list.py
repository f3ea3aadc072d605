"""`emloc zoo list`, `show` and `plan`, over the registry and over entries of the user's own; what a dry run says."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.processes import planning_here

from emloc_core.cli import cli
from emloc_core.errors import EmlocError
from emloc_core.memory.budget import largest_ratio
from emloc_core.memory.model import MemoryModel
from emloc_core.memory.workload import Workload
from emloc_core.recipe.recipe import EvalSection
from emloc_core.registry.entry import read_entry
from emloc_core.registry.registry import load_entries
from emloc_core.settings import CompressSettings, PolishSettings, TrainSettings
from emloc_core.zoo.jobs.job import ZooJob
from emloc_core.zoo.jobs.planning import needs

ENTRY = """
id = "zoo-test/{name}"
family = "llama"
licence = "none [bold]at all[/bold]"

[parameters]
published = "1.9M"
source = "this test"

[presets.default]
length = 64

[presets.small]
memory = "3GB"
batch_size = 2
length = 32

[config]
model_type = "llama"
dtype = "float32"
vocab_size = 1000
hidden_size = 128
intermediate_size = 512
num_hidden_layers = {layers}
num_attention_heads = 4
num_key_value_heads = 2
max_position_embeddings = {limit}
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("entries")
    for name, layers, limit in (("one", 1, 256), ("two", 2, 256), ("short", 1, 16)):
        (directory / f"{name}.toml").write_text(ENTRY.format(name=name, layers=layers, limit=limit))
    return directory


def run(*argv: object) -> str:
    return CliRunner().invoke(cli, ["zoo", *map(str, argv)], catch_exceptions=False).stdout


def test_all_models_are_listed():
    entries = json.loads(run("list", "--json"))["entries"]
    assert [entry["id"] for entry in entries] == [entry.id for entry in load_entries()]
    table = run("list")
    assert all(entry["id"] in table for entry in entries)


def test_a_glob_and_entries_of_ones_own(own):
    lines = run("list", "zoo-test/*", "--registry", own).split("\n")
    rows = [line.split() for line in lines if "zoo-test" in line]
    assert [line[:3] for line in rows] == [["zoo-test/" + name, "llama", "1.9M"] for name in ("one", "short", "two")]
    assert "none [bold]at all[/bold]" in lines[-3]
    assert "default, small" in lines[-3]


def test_what_is_not_there_is_said(own):
    with pytest.raises(EmlocError, match=r"No entry of the registry is called 'zoo-test/tow'\. Did you mean"):
        run("list", "zoo-test/tow", "--registry", own)


def test_an_entry_is_shown_with_its_sources(own):
    path, _, text = run("show", "one", "--registry", own).partition("\n")
    assert (path, text.strip()) == (f"# {own / 'one.toml'}", (own / "one.toml").read_text().strip())
    content = json.loads(run("show", "zoo-test/one", "--registry", own, "--json"))
    entry = read_entry(own / "one.toml")
    assert content["config"] == entry.config
    assert content["fingerprint"] == entry.fingerprint


def test_one_is_shown_at_a_time(own):
    with pytest.raises(EmlocError, match="matches several models: zoo-test/one, zoo-test/short, zoo-test/two"):
        run("show", "zoo-test/*", "--registry", own)


def test_a_plan_is_that_of_the_memory_model(own, tmp_path):
    budget = 635_600_000
    options = ["--registry", own, "--memory", budget, "--headroom", 0, "--kind", "low-rank", "--json"]
    (planned,) = json.loads(run("plan", "zoo-test/one", *options))["models"]
    (tmp_path / "config.json").write_text(json.dumps(read_entry(own / "one.toml").config))
    train = TrainSettings(batch_size=1)
    model = MemoryModel(tmp_path / "config.json", Workload(1, 64, train=train), CompressSettings(kind="low-rank"))
    fit = largest_ratio(model, budget)
    assert planned["inference"] == model.inference().total
    assert planned["lora"] == model.tuning().total
    assert (planned["kind"], planned["ratio"]) == ("low-rank", fit.ratio)
    assert planned["tuning"] == fit.need.total <= budget
    assert planned["emulator"] == model.emulator_bytes(model.plan(fit.ratio))
    assert planned["parameters"] == model.parameters()


def test_batch_and_length_are_the_presets_or_the_users(own):
    for arguments, used in ((["--preset", "small"], (2, 32)), (["--batch-size", 3, "--length", 48], (3, 48))):
        options = ["--registry", own, "--kind", "nf4", *arguments, "--json"]
        (planned,) = json.loads(run("plan", "zoo-test/one", *options))["models"]
        assert (planned["batch_size"], planned["length"]) == used


def test_a_table_says_where_nothing_fits_and_where_no_emulator_is_needed(own):
    table = run("plan", "zoo-test/one", "--registry", own, "--memory", "1MB")
    (row,) = (line for line in table.split("\n") if "zoo-test/one" in line)
    assert row.split()[-4:] == ["-", "-", "-", "-"]
    assert "no emulator's tuning fits" in table
    table = run("plan", "zoo-test/one", "--registry", own, "--memory", "24GiB")
    assert "EMLoC in 24.7 GB" in table
    assert "Of 25.8 GB, of which 1.07 GB stay free." in table
    assert "nf4*" in table
    assert "a LoRA on the model itself fits too" in table


def test_a_model_that_cannot_be_planned_stops_no_other(own):
    argv = ["zoo", "plan", "zoo-test/*", "--registry", str(own), "--json"]
    result = CliRunner().invoke(cli, argv)
    assert str(result.exception) == "1 of 3 models could not be planned. Each says why."
    planned = {model["id"]: model for model in json.loads(result.stdout)["models"]}
    assert "takes at most 16 tokens, not 64" in planned["zoo-test/short"]["error"]
    assert planned["zoo-test/short"]["inference"] is None
    assert planned["zoo-test/one"]["inference"] < planned["zoo-test/two"]["inference"]


@pytest.mark.parametrize(
    ("options", "message"),
    [([], "no rows to calibrate on"), (["--memory", "100MB"], "it needs more than 100 MB of memory")],
)
def test_a_dry_run_says_what_would_fail(tiny_model, rows_file, tmp_path, options, message):
    argv = ["zoo", "convert", *[str(tiny_model)] * 2, "-o", str(tmp_path / "zoo"), *options, "--dry-run"]
    argv += ["--data", str(rows_file)] if options else []
    with planning_here():
        result = CliRunner().invoke(cli, argv)
        jobs = json.loads(CliRunner().invoke(cli, [*argv, "--json"]).stdout)["jobs"]
    assert str(result.exception).startswith(f"1 of 2 jobs would fail. tiny-llama: {message}.")
    assert f"({message})" in result.stdout
    assert [job["refused"] for job in jobs] == [message, ""]


def test_a_job_that_polishes_needs_room_for_it(shallow_model, rows_file):
    job = ZooJob(name="job", model=str(shallow_model), data=str(rows_file), train=TrainSettings(batch_size=1))
    compared = job.model_copy(update={"eval": EvalSection(tasks=["task.yaml"], full_lora=True)})
    steps = PolishSettings(batch_size=1, accumulation=100_000)  # all of whose boundaries wait
    alone, with_bound, polished = (
        needs(variant) for variant in (job, compared, job.model_copy(update={"polish": steps}))
    )
    assert polished.disk - alone.disk == with_bound.disk - alone.disk  # one LoRA more
    assert polished.memory > alone.memory
