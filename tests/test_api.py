"""The Python API: the stages, from a model to an answer of the tuned model, and what it refuses."""

import json
import subprocess
import sys

import pytest
from datasets import Dataset
from support.adapters import contents
from support.rows import example_rows

import emloc_core as emloc
from emloc_core.evaluation.new_task import write_task

ROWS = example_rows()
COMPRESS = {"samples": 12, "selection": 6, "ratio": 0.6, "device": "cpu"}
TRAIN = {"steps": 2, "batch_size": 2, "bf16": False}


@pytest.fixture(scope="module")
def outputs(shallow_model, tmp_path_factory):
    """Emulator, adapter, corrected adapter and merged model, from rows in memory."""
    directory = tmp_path_factory.mktemp("api")
    emulator = emloc.compress(shallow_model, ROWS, directory / "emulator", **COMPRESS)
    adapter = emloc.train(emulator, Dataset.from_list(ROWS), directory / "adapter", **TRAIN)
    corrected = emloc.correct(adapter, device="cpu", clamp=1)
    return emulator, adapter, corrected, emloc.merge(corrected, directory / "merged")


def test_every_stage_returns_its_output_as_a_path_with_a_result(outputs):
    emulator, adapter, corrected, merged = outputs
    assert [output.kind for output in outputs] == ["emulator", "adapter", "corrected-adapter", "checkpoint"]
    assert emulator.result["family"] == "llama"
    assert adapter.result["rows"] == 120 - 12 - 6
    assert corrected.path == adapter.path.with_name("adapter-corrected")
    assert merged.timing["seconds"] >= 0
    assert json.loads((emulator.path / "emloc.json").read_text()) == emulator.manifest


def test_an_output_is_beside_the_adapter_however_that_is_written(outputs, monkeypatch):
    _, adapter, corrected, _ = outputs
    monkeypatch.chdir(adapter.path)
    for name in (f"{adapter.path}/", "."):
        assert emloc.correct(name, device="cpu", clamp=1).path == corrected.path


def test_what_is_made_loads_and_the_merged_model_is_the_base_with_the_corrected_adapter(outputs):
    import torch

    emulator, adapter, corrected, merged = (output.load() for output in outputs)
    inputs = {"input_ids": torch.tensor([[1, 10, 11, 12, 13]])}
    with torch.no_grad():
        assert torch.allclose(merged(**inputs).logits, corrected(**inputs).logits, atol=1e-4)
        assert not torch.equal(emulator(**inputs).logits, adapter(**inputs).logits)


def test_rows_in_memory_and_rows_of_a_file_make_the_same_bytes(outputs, shallow_model, rows_file, tmp_path):
    of_file = contents(emloc.compress(shallow_model, rows_file, tmp_path / "e", **COMPRESS).path)
    of_memory = contents(outputs[0].path)
    for name in ("README.md", "emloc.json"):  # they say where the rows came from
        assert of_file[name] != of_memory[name]
        of_file[name] = of_file[name].replace(rows_file.name.encode(), b"rows in memory")
    assert of_file == of_memory


def test_the_command_line_finds_what_python_made(outputs, shallow_model, rows_file, request):
    options = ["--samples", 12, "--selection", 6, "--ratio", 0.6, "--device", "cpu", "--json"]
    command = request.getfixturevalue("emloc")
    code, out, _ = command("compress", shallow_model, "--data", rows_file, "-o", outputs[0].path, *options)
    assert code == 0
    assert json.loads(out)["result"] == outputs[0].result


def test_the_base_is_known_from_the_manifests(outputs, shallow_model):
    emulator, _, corrected, _ = outputs
    assert emulator.manifest["inputs"] == {"base": str(shallow_model), "data": "rows in memory"}
    assert corrected.manifest["inputs"]["base"] == str(shallow_model)
    assert emloc.load_family(emulator).name == "llama"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rato": 0.5}, "Did you mean 'ratio'"),
        ({"ratio": 2}, "ratio = 2"),
        ({"ratio": 0.5, "memory": "1GB"}, "ratio and memory"),
    ],
)
def test_wrong_settings_are_one_error(shallow_model, tmp_path, settings, message):
    with pytest.raises(emloc.EmlocError, match=message):
        emloc.compress(shallow_model, ROWS, tmp_path / "emulator", **settings)
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_does_not_belong_is_refused(outputs, tmp_path):
    _, adapter, corrected, _ = outputs
    with pytest.raises(emloc.EmlocError, match="already corrected"):
        emloc.correct(corrected, tmp_path / "again")
    with pytest.raises(emloc.EmlocError, match="uncorrected"):
        emloc.merge(adapter, tmp_path / "merged")


@pytest.mark.usefixtures("calls_here")
@pytest.mark.thorough
def test_systems_are_compared(outputs, shallow_model, rows_file, tmp_path):
    emulator, adapter, corrected, merged = outputs
    task = write_task("completion_nll", rows_file, tmp_path / "loss.yaml")
    systems = {
        "base": shallow_model,
        "emulator": emulator,
        "adapter": adapter,
        "corrected": corrected,
        "merged": merged,
    }
    evaluation = emloc.evaluate(
        task, tmp_path / "evaluation", **systems, systems={"mine": (shallow_model, corrected)}, limit=4
    )
    scores = evaluation.load()["systems"]
    assert set(scores) == {
        "base", "emulator", "emulator+lora", "base+uncorrected", "base+corrected", "merged", "mine"
    }  # fmt: skip
    assert scores["mine"]["nll"] == pytest.approx(scores["base+corrected"]["nll"])


def test_importing_the_package_imports_nothing_heavy():
    script = "import emloc_core, sys; assert not {'torch', 'transformers', 'pydantic', 'click'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
    assert set(emloc.__all__) <= set(dir(emloc))
    with pytest.raises(AttributeError, match="compres'"):
        emloc.compres  # noqa: B018
