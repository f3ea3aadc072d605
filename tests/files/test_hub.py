"""Outputs go to a hub and come back from it: a double of the hub, spoken to by huggingface_hub itself."""

import json
import shlex

import pytest
from peft import PeftModel
from support.adapters import make_adapter
from support.hub import local_hub
from support.rows import example_rows
from transformers import AutoModelForCausalLM

import emloc_core
from emloc_core.adapters.adapter import Adapter
from emloc_core.errors import EmlocError
from emloc_core.units import human_bytes

BASE, ADAPTER, EMULATOR = "people/base", "people/adapter", "people/emulator"


@pytest.fixture
def hub(tmp_path):
    with local_hub(tmp_path / "cache") as hub:
        yield hub


def corrected(model, directory):
    """A corrected adapter, all from rows in memory."""
    emulator = emloc_core.compress(
        model, example_rows(), directory / "emulator", kind="low-rank", samples=8, selection=4
    )
    adapter = emloc_core.train(emulator, example_rows(), directory / "adapter", steps=1, batch_size=2)
    return emloc_core.correct(adapter, directory / "corrected")


def test_from_a_base_on_the_hub_to_an_adapter_on_the_hub(hub, shallow_model, tmp_path, emloc):
    hub.add(BASE, shallow_model)
    adapter = corrected(BASE, tmp_path)
    assert Adapter(adapter.path).model_name == BASE
    code, out, err = emloc("push", adapter, ADAPTER, "--dry-run")
    assert code == 0, err
    planned = json.loads(emloc("push", adapter, ADAPTER, "--dry-run", "--json")[1])
    assert f"{human_bytes(planned['bytes'])}, to {ADAPTER}, private if new" in out
    assert ADAPTER not in hub.files
    code, out, err = emloc("push", adapter, ADAPTER)
    assert (code, ADAPTER in out) == (0, True), err
    assert hub.private[ADAPTER]
    published = hub.files[ADAPTER]
    assert planned["files"] == {name: len(content) for name, content in published.items()}
    assert published.keys() == {path.name for path in adapter.path.iterdir()}
    assert not any(str(tmp_path).encode() in content for content in published.values())
    assert f"base_model: {BASE}\n".encode() in published["README.md"]
    assert b"rows in memory" in published["README.md"]
    fetched = tmp_path / "fetched"
    fetched.mkdir()
    for name, content in published.items():
        (fetched / name).write_bytes(content)
    assert len(Adapter(fetched).loras) == len(Adapter(adapter.path).loras)  # its manifest still fits it
    full = emloc_core.train(BASE, example_rows(), tmp_path / "full", steps=1, batch_size=2)
    assert Adapter(full.path).model_name == BASE
    merged = emloc_core.merge(full, tmp_path / "merged")
    assert emloc_core.push(merged, "people/merged", private=False).endswith("c" * 40)
    assert not hub.private["people/merged"]


@pytest.mark.thorough
def test_an_emulator_from_the_hub_is_tuned_and_corrected(hub, shallow_model, tmp_path):
    hub.add(BASE, shallow_model)
    emulator = emloc_core.compress(BASE, example_rows(), tmp_path / "emulator", samples=8, selection=4)
    with pytest.raises(EmlocError, match=r"holds rows of your data \(calibration.jsonl, selection.jsonl\)"):
        emloc_core.push(emulator, EMULATOR)
    assert EMULATOR not in hub.files
    emloc_core.push(emulator, EMULATOR, with_rows=True)
    adapter = emloc_core.train(EMULATOR, example_rows(), tmp_path / "adapter", steps=1, batch_size=2)
    assert adapter.result["excluded_rows"] == 12
    assert emloc_core.correct(adapter).result["candidates"][0]["rows"] == 4


@pytest.mark.thorough
def test_a_local_base_gets_its_name_on_the_hub(hub, shallow_model, tmp_path):
    adapter = corrected(shallow_model, tmp_path)
    emloc_core.push(adapter, ADAPTER, base=BASE)
    published = hub.files[ADAPTER]
    assert json.loads(published["adapter_config.json"])["base_model_name_or_path"] == BASE
    assert json.loads(published["emloc.json"])["inputs"]["base"] == BASE
    card = published["README.md"].decode()
    assert f"base_model: {BASE}\n" in card
    assert f'from_pretrained("{BASE}"' in card
    assert not any(str(tmp_path).encode() in content for content in published.values())


def test_a_base_has_its_id_though_a_directory_has_that_name_too(hub, shallow_model, tmp_path, monkeypatch):
    merged = emloc_core.merge(make_adapter(shallow_model, tmp_path / "adapter"), tmp_path / "merged")
    (tmp_path / BASE).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    emloc_core.push(merged, "people/merged", base=BASE)
    assert json.loads(hub.files["people/merged"]["emloc.json"])["inputs"]["base"] == BASE


def test_a_plan_for_rows_fetches_the_tokenizer_and_no_weights(hub, shallow_model, rows_file, tmp_path):
    hub.add(BASE, shallow_model)
    planned, expected = (
        emloc_core.plan(str(model), data=rows_file, memory="4GiB", measure=False).describe()["workload"]
        for model in (BASE, shallow_model)
    )
    assert planned == expected
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_of_an_earlier_upload_no_part_is_left(hub, tmp_path):
    """Uploading an adapter over a merged model left the model's shards, which transformers loads."""
    for name, files in {"merged": ["a.safetensors", "deep/b.json"], "adapter": ["adapter.safetensors"]}.items():
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "emloc.json").write_text(json.dumps({"kind": name}))
        for file in files:
            (tmp_path / name / file).write_text(name)
    hub.files["people/it"] = {".gitattributes": b"", "LICENSE": b"", "before.json": b""}
    emloc_core.push(tmp_path / "merged", "people/it")
    assert len(hub.files["people/it"]) == 6
    emloc_core.push(tmp_path / "adapter", "people/it")
    assert hub.files["people/it"].keys() == {".gitattributes", "LICENSE", "emloc.json", "adapter.safetensors"}


def test_a_hub_that_does_not_answer_is_given_up(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("emloc_core.files.hub._PATIENCE", 0.1)
    (tmp_path / "emloc.json").write_text(json.dumps({"kind": "adapter"}))
    hub.hangs = 2.0
    with pytest.raises(EmlocError, match=r"cannot be pushed to people/it \(.*timed out"):
        emloc_core.push(tmp_path, "people/it")


def test_an_evaluation_is_published_with_its_rows(hub, tmp_path):
    """Its result has the scores of a system that is called ``base``, where an emulator's names its base."""
    manifest = {"kind": "evaluation", "inputs": {}, "request": {}, "result": {"base": {"nll": 1.5}}}
    (tmp_path / "emloc.json").write_text(json.dumps(manifest))
    (tmp_path / "samples.jsonl").write_text("{}\n")
    emloc_core.push(tmp_path, "people/scores", with_rows=True)
    assert json.loads(hub.files["people/scores"]["emloc.json"]) == manifest


def test_rows_below_the_directory_are_not_published_unasked(hub, tmp_path):
    for directory, kind in ((tmp_path, "checkpoint"), (tmp_path / "scores", "evaluation")):
        directory.mkdir(exist_ok=True)
        (directory / "emloc.json").write_text(json.dumps({"kind": kind}))
    (tmp_path / "scores" / "samples.jsonl").write_text("{}\n")  # of another output
    emloc_core.push(tmp_path, "people/it")
    assert hub.files["people/it"].keys() == {"emloc.json"}
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "rows.jsonl").write_text("{}\n")
    with pytest.raises(EmlocError, match=r"holds rows of your data \(more/rows.jsonl\)"):
        emloc_core.push(tmp_path, "people/it")


@pytest.mark.usefixtures("calls_here")
def test_a_stage_and_a_recipe_push_what_they_make(hub, shallow_model, rows_file, tmp_path, emloc):
    adapter = make_adapter(shallow_model, tmp_path / "adapter")
    code, _, err = emloc("merge", adapter, "-o", tmp_path / "merged", "--push", "people/merged")
    assert (code, f"{hub.address}/people/merged" in err) == (0, True), err
    assert "model.safetensors" in hub.files["people/merged"]
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'push = "{ADAPTER}"\nmerge = false\n[model]\nbase = "{shallow_model}"\n[data]\ntrain = "{rows_file}"\n'
        "[compress]\nsamples = 8\nselection = 4\n[train]\nsteps = 1\nbatch_size = 2\n"
    )
    assert emloc_core.run(recipe).result["pushed"].startswith(f"{hub.address}/{ADAPTER}")
    assert b"Correction" in hub.files[ADAPTER]["README.md"]


def test_what_the_hub_refuses_is_said_in_a_sentence(hub, shallow_model, tmp_path, emloc):
    adapter = make_adapter(shallow_model, tmp_path / "adapter")
    merged = emloc_core.merge(adapter, tmp_path / "merged")
    hub.refuses = True
    code, _, err = emloc("push", merged, "people/merged")
    assert code == 1
    assert "cannot be pushed to people/merged" in err
    assert "hf auth login" in err
    for wrong in ("people", "../people/x", str(tmp_path)):
        with pytest.raises(EmlocError, match="not the id of a repository"):
            emloc_core.push(merged, wrong)
    with pytest.raises(EmlocError, match="not a finished output"):
        emloc_core.push(adapter, ADAPTER)


def test_a_hub_that_cannot_be_reached_is_said_in_a_sentence(shallow_model, tmp_path, monkeypatch):
    merged = emloc_core.merge(make_adapter(shallow_model, tmp_path / "adapter"), tmp_path / "merged")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(EmlocError, match=r"cannot be pushed to people/merged \(.*refused.*Check the connection"):
        emloc_core.push(merged, "people/merged")


def test_the_card_shows_code_that_runs(shallow_model, tmp_path):
    adapter = corrected(shallow_model, tmp_path)
    card = (adapter.path / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0]
    code = code.replace(f'"{shallow_model.name}"', repr(str(shallow_model))).replace(
        '"DIRECTORY"', repr(str(adapter.path))
    )
    namespace: dict = {}
    exec(code, namespace)
    assert isinstance(namespace["model"], PeftModel)
    assert namespace["tokenizer"].chat_template
    emulator = (tmp_path / "emulator" / "README.md").read_text()
    assert "import emloc_core.standins.quantizer" in emulator
    assert "on 8 calibration rows" in emulator
    for part in ("Emulator: low-rank, ratio 0.6", "LoRA: rank 8", "Correction by `emloc`", "| clamp | scale | loss |"):
        assert part in card
    assert shlex.quote(str(tmp_path)) not in card
    assert AutoModelForCausalLM.__name__ in card
