"""Held-out rows are evaluated while tuning, on the model and on the base; the best checkpoint is kept."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.jobs import exact_job, polish_job, train_job
from support.killed import kill, run_until_killed
from support.marks import thorough
from support.rows import example_rows, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from emloc_core.adapters.adapter import Adapter
from emloc_core.adapters.moments import FILE as MOMENTS
from emloc_core.data.rows import load_rows
from emloc_core.data.tokenize import encode
from emloc_core.errors import EmlocError
from emloc_core.files.checkpoint import Checkpoint
from emloc_core.files.manifest import read_manifest
from emloc_core.recipe.recipe import load_recipe
from emloc_core.recipe.stages import stages
from emloc_core.requests import EvalRows, TrainRequest
from emloc_core.settings import PolishSettings, TrainSettings
from emloc_core.tuning.evaluation import BaseLoss, loras_of
from emloc_core.tuning.rows import divide
from emloc_core.tuning.train import Train
from emloc_core.tuning.trainer import LoraTrainer

FAST = {"learning_rate": 0.02, "bf16": False, "eval_steps": 4, "logging_steps": 4}


def train(model, rows, output, evaluated, **changes) -> Path:
    settings = TrainSettings(**{**FAST, "steps": 12, **changes})
    return train_job(model, rows, output, settings, evaluation=evaluated).run()


def request(evaluated) -> TrainRequest:
    return TrainRequest(model="model", data="data", output=Path("adapter"), evaluation=evaluated)


def nll(base, adapter, rows) -> float:
    """Mean loss per token of a model in memory with an adapter."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    total = count = 0
    for sample in encode(rows, AutoTokenizer.from_pretrained(base)):
        ids = torch.tensor([sample.input_ids])
        labels = torch.where(torch.tensor([sample.completion_mask]) == 1, ids, -100)
        counted = sum(sample.completion_mask[1:])
        with torch.no_grad():
            total += model(input_ids=ids, labels=labels).loss.item() * counted
        count += counted
    return total / count


@pytest.fixture(scope="module")
def held_out(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("eval") / "eval.jsonl", example_rows()[100:110])


@pytest.fixture(scope="module")
def trained(tiny_emulator, rows_file, held_out, tmp_path_factory) -> Path:
    """12 steps on the emulator, evaluated after 4, 8 and 12 on ten rows, on the base too."""
    eval_rows = EvalRows(data=str(held_out), on_base=True)
    return train(tiny_emulator, rows_file, tmp_path_factory.mktemp("evaluated") / "adapter", eval_rows)


def test_model_and_base_are_evaluated_on_rows_that_are_not_trained_on(trained, tiny_emulator, tiny_model, held_out):
    log = json.loads((trained / "log.json").read_text())
    entries = [entry for entry in log if "eval_loss" in entry]
    assert [entry["step"] for entry in entries] == [4, 8, 12]
    assert [entry["step"] for entry in log if "loss" in entry] == [4, 8, 12]
    result = read_manifest(trained)["result"]
    best = min(entries, key=lambda entry: entry["eval_base_loss"])
    assert {name: result[f"best_{name}" if name == "step" else name] for name in best} == best
    kept = [*load_rows(tiny_emulator / "calibration.jsonl"), *load_rows(tiny_emulator / "selection.jsonl")]
    rows = [row for row in load_rows(held_out) if row.key not in {row.key for row in kept}]
    assert result["eval_rows"] == len(rows)
    assert result["rows"] == 120 - len(kept) - len(rows)
    assert result["eval_base_loss"] == pytest.approx(nll(tiny_model, trained, rows), rel=1e-5)


def test_the_best_checkpoint_is_kept_and_training_stops_when_nothing_gets_better(
    tiny_emulator, rows_file, held_out, tmp_path, monkeypatch
):
    losses, loras = iter([3.0, 2.0, 2.5, 2.4, 1.0]), []
    monkeypatch.setattr(BaseLoss, "__call__", lambda _, model: (loras.append(loras_of(model)), next(losses))[1])
    eval_rows = EvalRows(data=str(held_out), on_base=True)
    adapter = train(tiny_emulator, rows_file, tmp_path / "a", eval_rows, steps=40, patience=2, save_steps=7)
    result = read_manifest(adapter)["result"]
    assert (result["steps"], result["best_step"], result["eval_base_loss"]) == (16, 8, 2.0)
    kept = Adapter(adapter).loras
    assert kept.keys() == loras[1].keys()
    for path, lora in kept.items():
        assert torch.equal(lora.a, loras[1][path].a)
        assert torch.equal(lora.b, loras[1][path].b)
    assert any(not torch.equal(lora.b, loras[3][path].b) for path, lora in kept.items())


def run_until(moment, model, rows, output, eval_rows):
    if moment == "in step 11":
        step = LoraTrainer.training_step
        LoraTrainer.training_step = lambda self, *args, **options: (
            kill() if self.state.global_step == 10 else step(self, *args, **options)
        )
    else:
        Train._write = lambda *_: kill()
    train(model, rows, output, eval_rows, patience=1)


@pytest.mark.parametrize("moment", ["in step 11", *thorough("before it is written")])
def test_killed_and_run_again_it_keeps_the_same_checkpoint(
    moment, tiny_emulator, rows_file, held_out, tmp_path, uninterrupted
):
    eval_rows = EvalRows(data=str(held_out), on_base=True)
    run_until_killed(run_until, moment, tiny_emulator, rows_file, tmp_path / "here" / "a", eval_rows)
    shutil.move(tmp_path / "here", tmp_path / "moved")  # the trainer keeps the best checkpoint's path
    train(tiny_emulator, rows_file, tmp_path / "moved" / "a", eval_rows, patience=1)
    again, before = (
        load_file(path / "adapter_model.safetensors") for path in (tmp_path / "moved" / "a", uninterrupted)
    )
    assert all(torch.equal(again[key], before[key]) for key in before)
    assert (tmp_path / "moved" / "a" / "log.json").read_bytes() == (uninterrupted / "log.json").read_bytes()
    assert read_manifest(tmp_path / "moved" / "a")["result"] == read_manifest(uninterrupted)["result"]


@pytest.fixture(scope="module")
def uninterrupted(tiny_emulator, rows_file, held_out, tmp_path_factory) -> Path:
    """As ``trained``, with a patience, uninterrupted."""
    eval_rows = EvalRows(data=str(held_out), on_base=True)
    return train(tiny_emulator, rows_file, tmp_path_factory.mktemp("whole") / "a", eval_rows, patience=1)


def test_exact_steps_evaluate_the_base_streamed(trained, tiny_model, rows_file, held_out, tmp_path):
    settings = PolishSettings(steps=4, **{**FAST, "eval_steps": 2})
    eval_rows = EvalRows(data=str(held_out))
    job = polish_job(trained, tiny_model, rows_file, tmp_path / "a", settings, evaluation=eval_rows)
    result = read_manifest(job.run())["result"]
    assert result["eval_rows"] == 10
    assert result["eval_loss"] == pytest.approx(nll(tiny_model, tmp_path / "a", load_rows(held_out)), rel=1e-5)
    with pytest.raises(EmlocError, match="whose loss is evaluated anyway"):
        exact_job(
            tiny_model, rows_file, tmp_path / "b", TrainSettings(), evaluation=EvalRows(split="0.1", on_base=True)
        )


def test_an_adapter_that_no_exact_step_makes_better_is_kept(emloc, trained, tiny_model, rows_file, held_out, tmp_path):
    argv = ["--base", tiny_model, "--data", rows_file, "--eval-data", held_out, "--steps", 40, "--eval-steps", 2]
    argv += ["--patience", 2]
    code, out, err = emloc("polish", trained, *argv, "--lr", 0.3, "--no-bf16", "-o", tmp_path / "a")
    assert code == 0
    assert "EarlyStopping" not in err
    result = read_manifest(tmp_path / "a")["result"]
    assert (result["steps"], result["best_step"]) == (4, 0)  # it lost patience
    assert f"kept the adapter as it was: no step improved it; loss {result['eval_loss']:.4f}" in out
    before, after = (load_file(path / "adapter_model.safetensors") for path in (trained, tmp_path / "a"))
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert (tmp_path / "a" / MOMENTS).read_bytes() == (trained / MOMENTS).read_bytes()
    assert "which did not improve it: it was kept as it was" in (tmp_path / "a" / "README.md").read_text()
    assert result["eval_loss"] == pytest.approx(nll(tiny_model, trained, load_rows(held_out)), rel=1e-5)


@pytest.mark.thorough
def test_a_resumed_polish_knows_the_loss_that_it_began_with(
    trained, tiny_model, rows_file, held_out, tmp_path, monkeypatch
):
    def polish(name):
        settings = PolishSettings(**{**FAST, "steps": 4, "eval_steps": 2, "learning_rate": 0.3})
        eval_rows = EvalRows(data=str(held_out))
        start, base = Adapter(trained), Checkpoint(tiny_model)
        return polish_job(start, base, rows_file, tmp_path / name, settings, evaluation=eval_rows).run()

    uninterrupted = polish("whole")
    step = LoraTrainer.training_step
    with monkeypatch.context() as patch:
        patch.setattr(LoraTrainer, "training_step", lambda self, *args, **options: (
            1 / 0 if self.state.global_step == 3 else step(self, *args, **options)
        ))  # fmt: skip
        with pytest.raises(ZeroDivisionError):
            polish("resumed")
    resumed = polish("resumed")
    assert (resumed / "log.json").read_bytes() == (uninterrupted / "log.json").read_bytes()
    assert read_manifest(resumed)["result"] == read_manifest(uninterrupted)["result"]


def test_a_share_of_the_rows_is_held_out_by_content():
    rows = load_rows(example_rows())
    kept, evaluated = divide(rows, request(EvalRows(split="0.1")), TrainSettings(), [])
    assert len(evaluated) == 12
    assert {row.key for row in kept} == {row.key for row in rows} - {row.key for row in evaluated}
    _, again = divide(rows[::-1], request(EvalRows(split=".1")), TrainSettings(seed=1), [])
    assert {row.key for row in again} == {row.key for row in evaluated}
    assert divide(rows, request(EvalRows()), TrainSettings(), []) == (rows, [])


def test_what_cannot_be_evaluated_is_one_error(tiny_model, tiny_emulator, rows_file, held_out, tmp_path):
    with pytest.raises(EmlocError, match="There are no rows to evaluate the base on"):
        train(tiny_emulator, rows_file, tmp_path / "a", EvalRows(on_base=True))
    with pytest.raises(EmlocError, match=r"does not say what its base is\. Give the base with --base"):
        train(tiny_model, rows_file, tmp_path / "a", EvalRows(data=str(held_out), on_base=True))
    other = shutil.copytree(tiny_model, tmp_path / "other")
    (other / "generation_config.json").write_text("{}")
    weights = load_file(other / "model.safetensors")
    torch.nn.init.ones_(weights["model.norm.weight"])
    (other / "config.json").write_text((other / "config.json").read_text().replace("{", '{"extra_field": 1,', 1))
    with pytest.raises(EmlocError, match="was made from a base other than"):
        train(tiny_emulator, rows_file, tmp_path / "a", EvalRows(data=str(held_out), on_base=True, base=str(other)))
    with pytest.raises(EmlocError, match="No row is left to evaluate"):
        divide(load_rows(held_out), request(EvalRows(data=str(held_out))), TrainSettings(), [held_out])


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"split": "1.5"}, "1.5 is not a share"),
        ({"split": "0.0"}, "0.0 is not a share"),
        ({"data": "ROWS", "split": "0.1"}, "0.1 is a share of the training rows"),
        ({"split": "dev"}, "ROWS is a file, which has no split 'dev'"),
        ({"data": {"ROWS": 1.0}, "split": "dev"}, "ROWS is a file, which has no split 'dev'"),
        ({"data": "ROWS"}, "all 5 that are left are held out"),
    ],
)
def test_rows_to_evaluate_that_cannot_be_meant(fields, complaint, tiny_model, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", example_rows()[:5])
    options = json.loads(json.dumps(fields).replace("ROWS", str(rows)))
    with pytest.raises(EmlocError, match=re.escape(complaint.replace("ROWS", str(rows)))):
        train(tiny_model, rows, tmp_path / "a", EvalRows(**options))


def test_a_share_may_be_a_number():
    assert EvalRows(split=0.1).split == "0.1"


def test_patience_without_rows_to_evaluate_is_refused(tiny_model, rows_file, tmp_path):
    with pytest.raises(EmlocError, match="no rows to evaluate, so patience has no effect"):
        train(tiny_model, rows_file, tmp_path / "a", EvalRows(), patience=2)


def test_the_command_line_and_recipes_ask_for_the_same(emloc, tiny_emulator, rows_file, held_out, tmp_path):
    options = ("--eval-data", held_out, "--eval-base", "--eval-steps", 3, "--patience", 2, "--dry-run", "--json")
    code, out, err = emloc("train", tiny_emulator, "--data", rows_file, "-o", tmp_path / "a", *options)
    assert code == 0, err
    assert json.loads(out)["eval_rows"] > 0
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'[model]\nbase = "org/base"\n[data]\ntrain = "{rows_file}"\neval = "{held_out}"\neval_base = true\n'
        "[train]\neval_steps = 3\n[polish]\n"
    )
    requests = {stage.name: stage.request for stage in stages(load_recipe(recipe))}
    assert requests["adapter"].evaluation == EvalRows(data=str(held_out), on_base=True, base="org/base")
    assert requests["polished"].evaluation == EvalRows(data=str(held_out))
    assert requests["emulator"].exclude == (held_out,)
