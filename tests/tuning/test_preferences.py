"""Preferences on an emulator: a reference without the LoRA, or none, and an adapter that is corrected as any other."""

import json
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from support.jobs import train_job
from support.marks import thorough
from support.rows import ANIMALS, COLOURS, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, KTOConfig
from trl.experimental.orpo import ORPOTrainer

import emloc_core
from emloc_core.data.rows import load_rows
from emloc_core.errors import EmlocError
from emloc_core.files.manifest import read_manifest
from emloc_core.memory.workload import make_workload
from emloc_core.recipe.recipe import load_recipe
from emloc_core.settings import TrainSettings
from emloc_core.tuning.preferences import odds_ratio_loss
from emloc_core.tuning.trainer import TRAINERS

SETTINGS = {"objective": "dpo", "steps": 12, "batch_size": 4, "learning_rate": 2e-3, "logging_steps": 4, "bf16": False}


def preferences():
    """120 rows: an animal runs rather than sleeps."""
    return [
        {"prompt": f"animal: {animal}, colour: {colour}. sentence:", "chosen": f" a {colour} {animal} runs.",
         "rejected": f" a {colour} {animal} sleeps."}
        for animal in ANIMALS for colour in COLOURS
    ]  # fmt: skip


def in_messages(row):
    return {"prompt": [{"role": "user", "content": row["prompt"]}],
            **{name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")}}  # fmt: skip


def margin(model, tokenizer, rows):
    """Mean over the rows of log p(chosen) - log p(rejected), in nats."""

    def likelihood(prompt, answer):
        ids = tokenizer(prompt + answer + tokenizer.eos_token, return_tensors="pt")["input_ids"]
        start = len(tokenizer(prompt)["input_ids"])
        with torch.no_grad():
            scores = model(ids).logits[0, :-1].log_softmax(-1)
        return scores[torch.arange(start - 1, ids.shape[1] - 1), ids[0, start:]].sum().item()

    return sum(likelihood(row["prompt"], row["chosen"]) - likelihood(row["prompt"], row["rejected"]) for row in rows)


@pytest.fixture(scope="module")
def outputs(shallow_model, tmp_path_factory):
    """Emulator, adapter by DPO, and the corrected adapter."""
    directory = tmp_path_factory.mktemp("dpo")
    data = write_jsonl(directory / "rows.jsonl", preferences()[:100])
    emulator = emloc_core.compress(shallow_model, str(data), directory / "emulator", samples=12, selection=6)
    adapter = emloc_core.train(emulator, str(data), directory / "adapter", **SETTINGS)
    return emulator, adapter, emloc_core.correct(adapter)


def test_the_base_prefers_what_the_emulator_was_taught_to(outputs, shallow_model):
    _, adapter, corrected = outputs
    tokenizer, base = AutoTokenizer.from_pretrained(shallow_model), AutoModelForCausalLM.from_pretrained(shallow_model)
    held_out = preferences()[100:]
    before = margin(base, tokenizer, held_out)
    assert margin(PeftModel.from_pretrained(base, corrected.path), tokenizer, held_out) > before + 1
    assert adapter.result["rows"] == 100 - 12 - 6  # none of the emulator's rows
    assert "by DPO with beta 0.1" in (corrected.path / "README.md").read_text()


def test_the_loss_starts_where_the_policy_is_the_reference(outputs, rows_file):
    log = json.loads((outputs[1].path / "log.json").read_text())
    first = emloc_core.train(
        outputs[0],
        preferences()[:100],
        outputs[1].path.with_name("one"),
        **{**SETTINGS, "steps": 1, "logging_steps": 1},
    )
    (start,) = json.loads((first.path / "log.json").read_text())
    assert start["loss"] == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-4)  # -log sigmoid(0)
    assert log[-1]["loss"] < log[0]["loss"] < start["loss"]
    with pytest.raises(EmlocError, match="Row 1 has no rejected answer"):
        emloc_core.train(outputs[0], str(rows_file), outputs[1].path.with_name("two"), **SETTINGS)


def test_rows_are_the_same_in_every_form_and_differ_by_what_is_rejected():
    rows = preferences()[:2]
    (one, other), (again, _) = load_rows(rows), load_rows([row | {"completion": row["chosen"]} for row in rows])
    assert (one.completion, one.rejected) == (rows[0]["chosen"], rows[0]["rejected"])
    assert one.key == again.key == load_rows([one.to_dict()])[0].key
    assert one.key != load_rows([rows[0] | {"rejected": "other"}])[0].key != other.key
    (row,) = load_rows([in_messages(rows[0])])
    assert row.rejected == [{"role": "assistant", "content": rows[0]["rejected"]}]
    with pytest.raises(EmlocError, match="one of chosen and rejected is a string"):
        load_rows([rows[0] | {"rejected": row.rejected}])


def test_conversations_are_trained_on_too(outputs):
    rows = [in_messages(row) for row in preferences()[:20]]
    settings = {**SETTINGS, "steps": 1, "exclude": ()}
    assert emloc_core.train(outputs[0], rows, outputs[1].path.with_name("chat"), **settings).result["rows"] == 20


def test_exact_steps_know_no_preferences(shallow_model, tmp_path):
    with pytest.raises(EmlocError, match="only the likelihood of answers"):
        emloc_core.train(shallow_model, preferences(), tmp_path / "a", exact=True, **SETTINGS)
    recipe = tmp_path / "recipe.toml"
    tables = '[model]\nbase = "b"\n[data]\ntrain = "d.jsonl"\n[train]\nobjective = "dpo"\n[polish]\nsteps = 2\n'
    recipe.write_text(tables)
    with pytest.raises(EmlocError, match=r"exact steps \(polish\) support only the likelihood of answers"):
        load_recipe(recipe)


def test_polishing_says_that_it_forgets_preferences(outputs, shallow_model, tmp_path, emloc):
    data = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": " b"}])
    for adapter in (outputs[1].path, outputs[2].path):  # as trained, and as corrected
        job = (
            "polish",
            adapter,
            "--base",
            shallow_model,
            "--data",
            data,
            "--steps",
            1,
            "-o",
            tmp_path / "polished",
            "--dry-run",
        )
        code, _, err = emloc(*job)
        assert (code, f"warning: {adapter} was trained on preferences" in err) == (0, True)


def test_fields_of_the_other_config_are_refused(outputs):
    with pytest.raises(EmlocError, match="DPOConfig has no field 'packing'"):
        emloc_core.train(outputs[0], preferences(), outputs[1].path.with_name("x"), extra={"packing": True}, **SETTINGS)


def test_the_longer_answer_of_a_pair_is_planned_for(shallow_model):
    plain = preferences()
    long = [row | {"rejected": row["rejected"] * 5} for row in plain]
    config = shallow_model / "config.json"
    short, answers, pairs = (
        make_workload(config, TrainSettings(objective=objective), data=rows).length
        for objective, rows in (("dpo", plain), ("sft", long), ("dpo", long))
    )
    assert answers <= short < pairs


@pytest.mark.thorough
def test_labels_teach_the_base_too(outputs, shallow_model, tmp_path):
    """By KTO, from labelled answers: each preference becomes two."""
    labelled = [
        {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
        for row in preferences()[:100] for name in ("chosen", "rejected")
    ]  # fmt: skip
    settings = {**SETTINGS, "objective": "kto"}
    adapter = emloc_core.train(outputs[0], labelled, tmp_path / "labelled", **settings)
    corrected = emloc_core.correct(adapter, clamp=1)
    tokenizer, base = AutoTokenizer.from_pretrained(shallow_model), AutoModelForCausalLM.from_pretrained(shallow_model)
    held_out = preferences()[100:]
    before = margin(base, tokenizer, held_out)
    assert margin(PeftModel.from_pretrained(base, corrected.path), tokenizer, held_out) > before + 0.2
    of_all, of_wanted = (
        emloc_core.correct(adapter, tmp_path / name, selection_data=write_jsonl(tmp_path / f"{name}.jsonl", rows))
        for name, rows in (("all", labelled[:12]), ("wanted", labelled[:12:2]))
    )
    assert of_all.result["nll"] == of_wanted.result["nll"]  # unwanted answers say nothing of a good correction
    unwanted = write_jsonl(tmp_path / "unwanted.jsonl", labelled[1:12:2])
    with pytest.raises(EmlocError, match="compares on wanted answers"):
        emloc_core.correct(adapter, tmp_path / "unwanted", selection_data=unwanted)
    one = emloc_core.train(outputs[0], preferences()[:100], tmp_path / "pairs", **{**settings, "steps": 1})
    assert one.result["rows"] == 100 - 12 - 6
    bare = write_jsonl(tmp_path / "bare.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(EmlocError, match=r"Row 1 of .*bare\.jsonl does not say whether its answer is wanted"):
        emloc_core.train(outputs[0], [str(unwanted), str(bare)], tmp_path / "none", **settings)


def test_odds_teach_the_base_too(outputs, shallow_model, tmp_path):
    """By ORPO, without a reference: the loss is of answers and of odds, and margins are logged."""
    settings = {**SETTINGS, "objective": "orpo", "beta": 0.5}
    adapter = emloc_core.train(outputs[0], preferences()[:100], tmp_path / "odds", **settings)
    corrected = emloc_core.correct(adapter, clamp=1)
    tokenizer, base = AutoTokenizer.from_pretrained(shallow_model), AutoModelForCausalLM.from_pretrained(shallow_model)
    held_out = preferences()[100:]
    before = margin(base, tokenizer, held_out)
    assert margin(PeftModel.from_pretrained(base, corrected.path), tokenizer, held_out) > before + 0.2
    log = json.loads((adapter.path / "log.json").read_text())
    assert log[-1]["rewards/margins"] > log[0]["rewards/margins"]
    assert log[-1]["loss"] < log[0]["loss"]
    assert "by ORPO with beta 0.5" in (corrected.path / "README.md").read_text()
    with pytest.raises(EmlocError, match="ORPO has no loss_type"):
        emloc_core.train(outputs[0], preferences(), tmp_path / "x", extra={"loss_type": "ipo"}, **settings)
    with pytest.raises(EmlocError, match="ORPO needs rows of"):
        emloc_core.train(outputs[0], [{"prompt": "a", "completion": "b"}], tmp_path / "none", **settings)


def test_the_odds_ratio_is_that_of_trl():
    """On the same log-probabilities; and an answer that is certain has finite gradients."""
    chosen, rejected = torch.tensor([-0.02, -1.5, -9.0]), torch.tensor([-0.3, -0.01, -30.0])
    trainer = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
    theirs = ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)[0]
    assert odds_ratio_loss(chosen, rejected, 0.3).item() == pytest.approx((-chosen - theirs).mean().item(), rel=1e-5)
    certain = torch.zeros(1, requires_grad=True)
    odds_ratio_loss(certain, torch.tensor([-1.0]), 0.3).backward()
    assert certain.grad.isfinite().all()


@pytest.mark.parametrize("objective", [*thorough("dpo"), "kto"])
def test_the_dry_runs_steps_are_the_trainers(objective, shallow_model, tmp_path):
    long = [{"prompt": "cat " * 40, "chosen": " a", "rejected": text} for text in (" b", " c")]  # dropped
    rows = write_jsonl(tmp_path / "rows.jsonl", [*preferences()[:6], *long])
    training = {**SETTINGS, "objective": objective, "steps": None, "epochs": 1, "batch_size": 2, "accumulation": 1}
    job = train_job(shallow_model, rows, tmp_path / "a", TrainSettings(**training, max_length=24))
    assert job.describe()["steps"] == {"dpo": 3, "kto": 6}[objective]
    assert read_manifest(job.run())["result"]["steps"] == job.describe()["steps"]


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_rows_become_what_trl_makes_of_them(objective, chat, shallow_model, monkeypatch, tmp_path):
    """Token for token, in the same order, and with the same answers for KTO's estimate."""
    rows = [in_messages(row) if chat else row for row in preferences()[:7]]
    names = ("chosen", "rejected")
    if objective == "kto":
        rows = [
            {"prompt": row["prompt"], "completion": row[name], "label": name == names[0]}
            for row in rows
            for name in names
        ]
        names = ("completion", "label")
    ours, theirs = TRAINERS[objective], TRAINERS[objective].__bases__[-1]
    datasets = {}
    for name, trainer in (("ours", ours), ("theirs", theirs)):
        prepare = trainer._prepare_dataset

        def spy(self, *args, prepare=prepare, name=name):
            datasets[name] = prepare(self, *args)
            return datasets[name]

        monkeypatch.setattr(trainer, "_prepare_dataset", spy)
    settings = {**SETTINGS, "objective": objective, "steps": 1, "max_length": 24}
    emloc_core.train(shallow_model, rows, tmp_path / "adapter", **settings)
    config = {"dpo": DPOConfig, "kto": KTOConfig}[objective](
        tmp_path / "trl",
        max_steps=1,
        max_length=24,
        seed=0,
        bf16=False,
        use_cpu=True,
        report_to="none",
        per_device_train_batch_size=4,
    )
    dataset = Dataset.from_dict({name: [row[name] for row in rows] for name in ("prompt", *names)})
    model, tokenizer = AutoModelForCausalLM.from_pretrained(shallow_model), AutoTokenizer.from_pretrained(shallow_model)
    theirs(
        model,
        args=config,
        train_dataset=dataset.shuffle(0) if objective == "kto" else dataset,
        processing_class=tokenizer,
        peft_config=LoraConfig(target_modules=["q_proj"]),
    )
    columns = datasets["ours"].column_names
    cut = [{name: row[name] for name in columns} for row in datasets["theirs"]]
    for row in cut:
        room = 24 - len(row["prompt_ids"])
        row |= {name: ids[:room] for name, ids in row.items() if name not in ("prompt_ids", "label")}
    assert list(datasets["ours"]) == cut
    assert len(cut) > 1
