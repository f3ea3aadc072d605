"""EMLoC inside a program: typed keywords, the program's own callbacks and LoRA, events, and nothing printed."""

import subprocess
import sys
import warnings

import pytest
from peft import IA3Config, LoraConfig
from support.paths import ROOT
from support.rows import example_rows
from transformers import TrainerCallback

import emloc_core as emloc
from emloc_core.files.documents import read_json
from emloc_core.stages import result

ROWS = example_rows()
COMPRESS = {"samples": 8, "selection": 4, "ratio": 0.6, "device": "cpu"}
TRAIN = {"steps": 3, "batch_size": 2, "bf16": False, "logging_steps": 1}

RIGHT = """
from peft import LoraConfig
from transformers import TrainerCallback

import emloc_core as emloc

emulator = emloc.compress("model", "rows.jsonl", "emulator", ratio=0.5, kind="low-rank", tuning={"lora_rank": 4})
emloc.train(emulator, [{"text": "a"}], "adapter", steps=3, extra={"weight_decay": 0.1},
            target_modules="all-linear", callbacks=[TrainerCallback()],
            progress=lambda event: print(event.seconds_left))
emloc.train(emulator, "rows.jsonl", "adapter", peft_config=LoraConfig(r=4))
emloc.polish("adapter", "rows.jsonl", limits={"memory": "8GiB"}, evaluation={"split": 0.1})
emloc.evaluate("task.yaml", "evaluation", base="model", limit=4)
emloc.run("recipe.toml", train={"steps": 3}, polish=None).final.load()
emulator.result["bytes"]["base"] + 1
"""
WRONG = """
emloc.train(emulator, "rows.jsonl", "adapter", setps=3)
emloc.compress("model", "rows.jsonl", "emulator", ratio="half")
emloc.polish("adapter", "rows.jsonl", limits={"memroy": "8GiB"})
emloc.correct("adapter", clamp="never")
emloc.run("recipe.toml", train={"setps": 3})
emloc.plan("model", lora_rnak=4)
emulator.result["byte"]
"""


@pytest.mark.thorough
def test_mypy_finds_every_wrong_setting_and_no_right_one(tmp_path):
    (tmp_path / "program.py").write_text(RIGHT + WRONG)
    libraries = "torch,transformers,peft,trl,datasets,accelerate,huggingface_hub,numpy,pydantic,rich,lm_eval,jinja2"
    skipped = ",".join(f"{name}.*" for name in libraries.split(","))
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nignore_missing_imports=True\n[mypy-{skipped}]\nfollow_imports=skip\n")
    command = [sys.executable, "-m", "mypy", "program.py"]
    environment = {"MYPYPATH": str(ROOT)}
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    lines = [int(line.split(":")[1]) for line in process.stdout.splitlines() if ": error:" in line]
    first = RIGHT.count("\n") + 2
    assert lines == list(range(first, first + WRONG.count("\n") - 1)), process.stdout + process.stderr
    assert 'keyword argument "setps"' in process.stdout


@pytest.fixture(scope="module")
def emulator(shallow_model, tmp_path_factory):
    return emloc.compress(shallow_model, ROWS, tmp_path_factory.mktemp("embedding") / "emulator", **COMPRESS)


class Watcher(TrainerCallback):
    """Counts what the trainer does, and stops it after two steps."""

    def __init__(self):
        self.steps, self.config = 0, None

    def on_step_end(self, args, state, control, **_):
        self.steps, self.config = self.steps + 1, args
        control.should_training_stop = state.global_step == 2


def test_callbacks_take_part_in_training_and_any_field_of_the_trainer_is_extra(emulator, tmp_path):
    watcher = Watcher()
    adapter = emloc.train(emulator, ROWS, tmp_path / "a", callbacks=[watcher], extra={"weight_decay": 0.25}, **TRAIN)
    assert (watcher.steps, adapter.result["steps"], watcher.config.weight_decay) == (2, 2, 0.25)
    assert adapter.manifest["request"]["settings"]["extra"] == {"weight_decay": 0.25}
    with pytest.raises(emloc.EmlocError, match="Did you mean 'steps'"):
        emloc.train(emulator, ROWS, tmp_path / "b", setps=3)


def test_a_config_of_peft_describes_the_lora(emulator, tmp_path):
    config = LoraConfig(r=2, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "up_proj"])
    adapter = emloc.train(emulator, ROWS, tmp_path / "a", peft_config=config, **TRAIN)
    saved = read_json(adapter.path / "adapter_config.json")
    assert (saved["r"], saved["lora_alpha"], saved["use_rslora"]) == (2, 6, True)
    assert saved["target_modules"] == ["q_proj", "up_proj"]


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (LoraConfig(bias="all"), {}, "bias = 'all'"),
        (LoraConfig(target_modules=".*proj"), {}, "is a pattern"),
        (LoraConfig(r=2), {"lora_rank": 4}, "also sets lora_rank"),
        (IA3Config(), {}, "IA3Config"),
    ],
)
def test_what_a_config_of_peft_cannot_say_is_one_error(emulator, tmp_path, config, settings, message):
    with pytest.raises(emloc.EmlocError, match=message):
        emloc.train(emulator, ROWS, tmp_path / "a", peft_config=config, **settings)


def test_events_tell_how_far_a_stage_is_and_nothing_is_printed(emulator, shallow_model, tmp_path, capfd):
    events = []
    options = {"progress": events.append}
    emloc.compress(shallow_model, ROWS, tmp_path / "e", **COMPRESS, **options)
    adapter = emloc.train(emulator, ROWS, tmp_path / "a", **TRAIN, **options)
    corrected = emloc.correct(adapter, device="cpu", **options)
    emloc.polish(corrected, ROWS, steps=1, batch_size=2, bf16=False, **options)
    emloc.merge(corrected, tmp_path / "m", **options)
    assert capfd.readouterr() == ("", "")
    by_stage = {
        stage: [event for event in events if event.stage == stage] for stage in dict.fromkeys(e.stage for e in events)
    }
    assert list(by_stage) == ["compress", "train", "correct", "polish", "merge"]
    for stage_events in by_stage.values():
        assert [event.step for event in stage_events] == sorted(event.step for event in stage_events)
        assert (stage_events[-1].step, stage_events[-1].seconds_left) == (stage_events[-1].total, 0)
        assert all(event.peak_bytes > 10**7 for event in stage_events)
    train = by_stage["train"]
    assert [(event.step, event.total) for event in train] == [(1, 3), (2, 3), (3, 3)]
    log = read_json(adapter.path / "log.json")
    assert [event.loss for event in train] == [None, *(entry["loss"] for entry in log[:2])]
    assert train[-1].output == str(adapter)


RECIPE = """
output = "run"
merge = false
[model]
base = "{model}"
[data]
train = "{rows}"
[compress]
samples = 8
selection = 4
ratio = 0.6
[train]
steps = 50
batch_size = 2
bf16 = false
logging_steps = 1
"""


@pytest.mark.usefixtures("calls_here")
def test_a_run_reports_every_stage(shallow_model, rows_file, tmp_path, capfd):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(model=shallow_model, rows=rows_file))
    events = []

    run = emloc.run(recipe, train={"steps": 3}, progress=events.append)
    assert capfd.readouterr() == ("", "")
    assert list(dict.fromkeys((event.stage, event.number, event.stages) for event in events)) == [
        ("compress", 1, 3), ("train", 2, 3), ("correct", 3, 3),
    ]  # fmt: skip
    assert (run.path, run.final.kind) == (tmp_path / "run", "corrected-adapter")
    assert not list(run.path.glob("*.log"))


def test_results_have_the_keys_of_their_types(emulator, tmp_path):
    adapter = emloc.train(emulator, ROWS, tmp_path / "a", evaluation={"split": 0.1, "on_base": True}, **TRAIN)
    corrected = emloc.correct(adapter, device="cpu")
    outputs = {
        "EmulatorResult": [emulator],
        "AdapterResult": [adapter, emloc.train(emulator, ROWS, tmp_path / "b", **TRAIN)],
        "CorrectionResult": [corrected, emloc.correct(adapter, tmp_path / "d", device="cpu", clamp=1)],
        "MergeResult": [emloc.merge(corrected, tmp_path / "m")],
        "ExportResult": [emloc.export(corrected, tmp_path / "x")],
    }
    for name, results in outputs.items():
        kind = getattr(result, name)
        for output in results:
            assert kind.__required_keys__ <= output.result.keys() <= kind.__annotations__.keys(), name
    assert set(emulator.result["linears"][0]) == set(result.LinearResult.__annotations__)
    assert set(corrected.result["candidates"][0]) == set(result.CandidateResult.__annotations__)


def test_warnings_go_to_the_logger_of_emloc_when_events_are_asked_for(
    monkeypatch, shallow_model, tmp_path, caplog, capfd
):
    monkeypatch.setattr("emloc_core.emulator.compress.Compress.warnings", ["the rows are few"])
    with warnings.catch_warnings(record=True) as caught:
        emloc.compress(shallow_model, ROWS, tmp_path / "e", **COMPRESS, progress=lambda _: None)
    assert not caught
    assert capfd.readouterr() == ("", "")
    assert [record.name for record in caplog.records if "the rows are few" in record.getMessage()] == ["emloc.warnings"]
    with pytest.warns(UserWarning, match="the rows are few"):
        emloc.compress(shallow_model, ROWS, tmp_path / "e", **COMPRESS)
