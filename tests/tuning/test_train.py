"""Tuning learns, leaves held-out rows alone, resumes after a kill to the same adapter, and names what is wrong."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.jobs import train_job
from support.killed import kill, run_until_killed
from support.marks import thorough
from support.rows import example_rows, write_jsonl
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerState
from trl.trainer import utils

from emloc_core.adapters.adapter import Adapter
from emloc_core.cli.train import command
from emloc_core.compat.trl import has_tiles
from emloc_core.data.rows import load_rows
from emloc_core.data.tokenize import encode
from emloc_core.errors import EmlocError
from emloc_core.files.manifest import read_manifest
from emloc_core.settings import StepSettings, TrainSettings
from emloc_core.tuning import trainer
from emloc_core.tuning.launcher import require_room, require_whole_weights
from emloc_core.tuning.train import Train
from emloc_core.tuning.trl import trainer_config

LINEARS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def settings(**changes) -> TrainSettings:
    fast = {"steps": 20, "learning_rate": 0.02, "bf16": False, "save_steps": 5, "logging_steps": 4}
    return TrainSettings(**{**fast, **changes})


def finetune(*args, **options) -> Path:
    return train_job(*args, **options).run()


def completion_nll(model, tokenizer, rows) -> float:
    """Mean negative log-likelihood of the completions' tokens."""
    total = count = 0
    model.eval()
    for sample in encode(rows, tokenizer):
        ids = torch.tensor([sample.input_ids])
        labels = torch.where(torch.tensor([sample.completion_mask]) == 1, ids, -100)
        counted = sum(sample.completion_mask)
        with torch.no_grad():
            total += model(input_ids=ids, labels=labels).loss.item() * counted
        count += counted
    return total / count


@pytest.fixture(scope="module")
def trained(tiny_model: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 uninterrupted steps on the first 100 rows."""
    directory = tmp_path_factory.mktemp("trained")
    test = write_jsonl(directory / "test.jsonl", example_rows()[100:])
    return finetune(tiny_model, str(rows_file), directory / "adapter", settings(), exclude=[test])


def test_it_learns_what_generalises_to_rows_left_out(trained: Path, tiny_model: Path, rows_file: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    test = load_rows(str(rows_file))[100:]
    before = completion_nll(base, tokenizer, test)
    assert completion_nll(PeftModel.from_pretrained(base, trained), tokenizer, test) < before - 0.2


def test_it_leaves_a_plain_adapter_and_says_what_was_done(trained: Path, tiny_model: Path):
    assert {path.name for path in trained.iterdir()} == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "emloc.json", "log.json", "timing.json"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "second_moments.adam"),
    }
    adapter = Adapter(trained)
    assert len(adapter.loras) == 3 * len(LINEARS)
    assert adapter.config["base_model_name_or_path"] == str(tiny_model.absolute())
    assert adapter.config["target_modules"] == LINEARS
    log = json.loads((trained / "log.json").read_text())
    assert [entry["step"] for entry in log] == [4, 8, 12, 16, 20]
    assert log[-1]["loss"] < log[0]["loss"]
    result = read_manifest(trained)["result"]
    assert result["train_loss"] == pytest.approx(sum(entry["loss"] for entry in log) / 5)
    assert result["trainable_parameters"] == sum(lora.a.numel() + lora.b.numel() for lora in adapter.loras.values())
    assert {key: result[key] for key in ("steps", "rows", "excluded_rows", "dropped_rows", "target_modules")} == {
        "steps": 20, "rows": 100, "excluded_rows": 20, "dropped_rows": 0, "target_modules": LINEARS,
    }  # fmt: skip


def test_the_steps_after_the_last_whole_interval_are_logged_too(tiny_model, rows_file, tmp_path):
    adapter = finetune(tiny_model, str(rows_file), tmp_path / "a", settings(steps=3, logging_steps=2))
    assert [entry["step"] for entry in json.loads((adapter / "log.json").read_text())] == [2, 3]


def test_the_same_again_does_nothing_and_anything_else_is_refused(trained, tiny_model, rows_file, monkeypatch):
    test = trained.parent / "test.jsonl"
    monkeypatch.setattr(Train, "_train", lambda *_: pytest.fail("trained again"))
    again = settings(save_steps=7, report_to="nowhere")  # neither changes the adapter
    assert finetune(tiny_model, str(rows_file), trained, again, exclude=[test]) == trained
    assert train_job(tiny_model, rows_file, trained, again, exclude=[test]).describe()["finished"]
    for run in (finetune, lambda *args, **options: train_job(*args, **options).describe()):
        with pytest.raises(EmlocError, match=r"settings\.lora_rank was 8 and is now 4"):
            run(tiny_model, str(rows_file), trained, settings(lora_rank=4), exclude=[test])
    with pytest.raises(EmlocError, match="the rows changed"):
        finetune(tiny_model, str(rows_file), trained, settings())


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool])
def test_a_weight_that_holds_no_floats_is_refused(tiny_model, rows_file, tmp_path, dtype):
    base = shutil.copytree(tiny_model, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    key = "model.layers.1.mlp.up_proj.weight"
    save_file({**tensors, key: torch.ones(tensors[key].shape).to(dtype)}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(EmlocError, match="is a weight of dtype"):
        finetune(base, str(rows_file), tmp_path / "adapter", settings())


def trained_rows(monkeypatch) -> list:
    """Record the data sets that trainers are made with."""
    datasets = []
    train = trainer.LoraTrainer.train

    def spy(self, *args, **kwargs):
        datasets.append(list(self.train_dataset))
        return train(self, *args, **kwargs)

    monkeypatch.setattr(trainer.LoraTrainer, "train", spy)
    return datasets


@pytest.mark.skipif(not has_tiles(), reason="this TRL's losses are of whole logits")
def test_only_tokens_that_count_are_projected_on_the_vocabulary(tiny_model, tmp_path, monkeypatch):
    projected, apply = [], utils._ChunkedLogProbFunction.apply

    def spy(hidden, *rest):
        projected.append(len(hidden))
        return apply(hidden, *rest)

    monkeypatch.setattr(utils._ChunkedLogProbFunction, "apply", spy)
    rows = write_jsonl(tmp_path / "rows.jsonl", example_rows())
    one = finetune(tiny_model, str(rows), tmp_path / "one", settings(steps=2))
    monkeypatch.setattr(trainer, "counted_tokens_alone", nullcontext)  # as TRL does without Triton
    other = finetune(tiny_model, str(rows), tmp_path / "other", settings(steps=2))
    few, all_tokens = projected[:2], projected[2:]
    assert max(few) < min(all_tokens)
    actual, expected = (load_file(path / "adapter_model.safetensors") for path in (one, other))
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def test_what_fails_starts_a_line_of_its_own(tiny_model, rows_file, tmp_path, monkeypatch, capfd):
    def fail(*_):
        raise OSError("no room")

    monkeypatch.setattr(trainer.LoraTrainer, "_save_checkpoint", fail)
    with pytest.raises(OSError, match="no room") as failed:  # its traceback keeps the trainer and its bar alive
        finetune(tiny_model, str(rows_file), tmp_path / "adapter", settings(steps=2))
    stderr = capfd.readouterr().err
    assert "2/2" in stderr
    assert stderr.endswith("\n"), failed


def test_an_emulator_is_tuned_and_its_held_out_rows_never(tiny_emulator, tiny_model, rows_file, tmp_path, monkeypatch):
    datasets = trained_rows(monkeypatch)
    test = write_jsonl(tmp_path / "test.jsonl", example_rows()[:10])
    adapter = finetune(tiny_emulator, str(rows_file), tmp_path / "a", settings(steps=2), exclude=[test])
    kept = [*load_rows(str(tiny_emulator / "calibration.jsonl")), *load_rows(str(tiny_emulator / "selection.jsonl"))]
    held_out = {row.key for row in [*kept, *load_rows(str(test))]}
    expected = [row for row in load_rows(str(rows_file)) if row.key not in held_out]
    samples = encode(expected, AutoTokenizer.from_pretrained(tiny_emulator))
    assert [row["input_ids"] for row in datasets[0]] == [sample.input_ids for sample in samples]
    assert read_manifest(adapter)["result"]["excluded_rows"] == len(held_out) == 120 - len(expected)
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), adapter)
    assert len(Adapter(adapter).loras) == 21


@pytest.mark.parametrize(
    "form",
    [
        "prompt and completion",
        "conversation",
        *thorough("text", "all answers"),
    ],
)
def test_the_loss_falls_on_the_same_tokens_as_in_calibration(form, tiny_model, tmp_path, monkeypatch):
    datasets = trained_rows(monkeypatch)
    rows = example_rows()[:8]
    if form == "text":
        rows = [{"text": row["prompt"] + row["completion"]} for row in rows]
    elif form == "conversation":
        roles = {"prompt": "user", "completion": "assistant"}
        rows = [{"messages": [{"role": roles[key], "content": row[key]} for key in roles]} for row in rows]
    elif form == "all answers":
        roles = {"prompt": "user", "completion": "assistant"}
        turns = [[{"role": roles[key], "content": row[key]} for key in roles] for row in rows]
        rows = [{"messages": one + other} for one, other in itertools.pairwise(turns)]
    loss = "all" if form == "all answers" else "last"
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    finetune(tiny_model, str(path), tmp_path / "a", settings(steps=1, loss=loss))
    samples = encode(load_rows(str(path), loss=loss), AutoTokenizer.from_pretrained(tiny_model))
    for row, sample in zip(datasets[0], samples, strict=True):
        assert row["input_ids"] == sample.input_ids
        assert [int(label != -100) for label in row["labels"]] == sample.completion_mask
    if form == "all answers":
        assert {"".join(map(str, sample.completion_mask)).strip("0").count("01") for sample in samples} == {1}


def test_rows_are_cut_only_where_asked_and_counted_where_nothing_is_left(tiny_model, tmp_path, monkeypatch):
    assert trainer_config(settings(), tmp_path, completion_only=True, use_cpu=True).max_length is None
    datasets = trained_rows(monkeypatch)
    rows = [{"prompt": "cat " * 20, "completion": "a"}, {"prompt": "cat", "completion": " cat" * 30}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    adapter = finetune(tiny_model, str(path), tmp_path / "a", settings(steps=1, max_length=16))
    assert [len(row["input_ids"]) for row in datasets[0]] == [16]
    result = read_manifest(adapter)["result"]
    assert (result["rows"], result["dropped_rows"]) == (1, 1)


def test_a_dry_run_tells_of_long_rows_and_copies(tiny_model, tmp_path, emloc):
    rows = [{"prompt": "cat", "completion": " cat" * count} for count in (3, 30, 3, 3)]
    rows.append({"prompt": "cat " * 20, "completion": "a"})
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    lengths = [len(sample.input_ids) for sample in encode(load_rows(path), AutoTokenizer.from_pretrained(tiny_model))]
    job = train_job(tiny_model, path, tmp_path / "a", settings(max_length=16))
    preview = job.describe()
    measured = ("longest_tokens", "longest_row", "cut_rows", "dropped_rows", "duplicate_rows")
    assert [preview[name] for name in measured] == [max(lengths), f"Row {1 + lengths.index(max(lengths))}", 2, 1, 2]
    options = ("train", tiny_model, "--data", path, "-o", tmp_path / "a", "--max-length", 16, "--dry-run")
    _, out, _ = emloc(*options)
    assert "cut to the maximum length: 2 rows, 1 of them dropped" in out
    assert "duplicates: 2 rows" in out
    assert read_manifest(job.run())["result"]["dropped_rows"] == 1


@pytest.mark.parametrize(
    ("width", "rate"), [(32, 1e-2), (128, 8e-3), (576, 2e-3), (640, 2e-3), (4096, 2e-4), (8192, 1e-4)]
)
def test_the_default_learning_rate_is_one_over_the_width(width, rate):
    assert TrainSettings().with_rate(width).learning_rate == rate
    assert TrainSettings(objective="dpo").with_rate(width).learning_rate == 5e-6
    assert TrainSettings(learning_rate=0.5).with_rate(width).learning_rate == 0.5


def test_model_and_emulator_are_trained_at_the_rate_of_their_width(
    tiny_model, tiny_emulator, rows_file, tmp_path, monkeypatch
):
    monkeypatch.setattr(StepSettings, "_default_rate", lambda _, width: 1 / width)
    usual = TrainSettings(steps=1, bf16=False)
    jobs = [train_job(model, rows_file, tmp_path / model.name, usual) for model in (tiny_model, tiny_emulator)]
    width = AutoConfig.from_pretrained(tiny_model).hidden_size
    assert [job.describe()["learning_rate"] for job in jobs] == [1 / width, 1 / width]
    assert read_manifest(jobs[0].run())["request"]["settings"]["learning_rate"] == 1 / width


def test_several_files_are_trained_on_by_their_weights(tiny_model, tmp_path, emloc, monkeypatch):
    datasets = trained_rows(monkeypatch)
    rows = example_rows()
    parts = [write_jsonl(tmp_path / "a.jsonl", rows[:4]), write_jsonl(tmp_path / "b.jsonl", rows[4:8])]
    options = ("--data", f"{parts[0]}:2", "--data", parts[1], "-o", tmp_path / "a", "--steps", 1, "--no-bf16")
    code, _, err = emloc("train", tiny_model, *options)
    assert code == 0, err
    mixed = load_rows({str(parts[0]): 2, str(parts[1]): 1})
    samples = encode(mixed, AutoTokenizer.from_pretrained(tiny_model))
    assert [row["input_ids"] for row in datasets[0]] == [sample.input_ids for sample in samples]
    assert len(mixed) == 12


def test_settings_reach_peft(tiny_model, rows_file, tmp_path):
    train_settings = settings(
        steps=1, lora_rank=2, lora_alpha=3, use_rslora=True, target_modules=["q_proj"], lora_dropout=0.1
    )
    config = Adapter(finetune(tiny_model, str(rows_file), tmp_path / "a", train_settings)).config
    expected = {"r": 2, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj"], "lora_dropout": 0.1}
    assert {name: config[name] for name in expected} == expected


def test_the_dry_runs_steps_are_the_trainers(tiny_model, rows_file, tmp_path):
    train_settings = settings(steps=None, epochs=1.5, batch_size=16, accumulation=3)  # 8 batches, 3 steps per epoch
    job = train_job(tiny_model, rows_file, tmp_path / "a", train_settings)
    assert read_manifest(job.run())["result"]["steps"] == job.describe()["steps"] == 5


# Interruptions


def run_until(moment, model, data, test, output):
    """Train until the process kills itself: in a step, while a checkpoint is written, or after all steps."""
    if moment == "in step 13":
        step = trainer.LoraTrainer.training_step
        trainer.LoraTrainer.training_step = lambda self, *args, **options: (
            kill() if self.state.global_step == 12 else step(self, *args, **options)
        )
    elif moment == "writing checkpoint 15":
        save = TrainerState.save_to_json
        TrainerState.save_to_json = lambda self, path: (
            (Path(path).write_text("{"), kill()) if self.global_step == 15 else save(self, path)
        )
    else:
        Train._write = lambda *_: kill()
    finetune(model, str(data), output, settings(), exclude=[test])


@pytest.mark.parametrize(
    ("moment", "remaining", "steps"),
    [
        *thorough(("in step 13", {5, 10}, 10)),
        ("writing checkpoint 15", {5, 10, 15}, 10),
        *thorough(("after step 20", {15, 20}, 0)),
    ],
)
def test_killed_and_run_again_it_gives_the_same_adapter(
    moment, remaining, steps, trained, tiny_model, rows_file, tmp_path, monkeypatch
):
    test, output = trained.parent / "test.jsonl", tmp_path / "adapter"
    run_until_killed(run_until, moment, tiny_model, rows_file, test, output)
    assert not output.exists()
    checkpoints = tmp_path / ".adapter.partial" / "content" / "checkpoints"
    assert {int(path.name.partition("-")[2]) for path in checkpoints.glob("checkpoint-*")} == remaining

    steps_taken = []
    step = trainer.LoraTrainer.training_step
    monkeypatch.setattr(
        trainer.LoraTrainer, "training_step", lambda self, *a, **k: (steps_taken.append(1), step(self, *a, **k))[1]
    )
    finetune(tiny_model, str(rows_file), output, settings(), exclude=[test])
    assert len(steps_taken) == steps
    again, before = (load_file(path / "adapter_model.safetensors") for path in (output, trained))
    assert all(torch.equal(again[key], before[key]) for key in before)
    for name in ("adapter_config.json", "second_moments.adam"):
        assert (output / name).read_bytes() == (trained / name).read_bytes()
    assert read_manifest(output)["result"] == read_manifest(trained)["result"]
    assert (output / "log.json").read_bytes() == (trained / "log.json").read_bytes()
    assert not (output / "checkpoints").exists()
    assert not checkpoints.parent.parent.exists()


@pytest.mark.thorough
def test_two_processes_make_one_adapter(tiny_model, rows_file, tmp_path):
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "emloc_core", "train", tiny_model]
    options = ["--data", rows_file, "-o", tmp_path / "a", "--steps", "4", "--no-bf16", "--save-steps", "2", "--json"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, *map(str, launch), *map(str, options)],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    answer = json.loads(process.stdout)  # of one process, and nothing else
    assert answer["request"]["processes"] == 2
    assert answer["result"]["steps"] == 4
    assert {path.name for path in tmp_path.iterdir()} == {"a", ".emloc-hashes.json"}
    assert len(Adapter(tmp_path / "a").loras) == 21


def test_sharded_weights_are_refused(monkeypatch):
    require_whole_weights()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(EmlocError, match="FSDP shards the weights over processes"):
        require_whole_weights()


def test_a_model_that_one_gpu_has_no_room_for_is_refused(monkeypatch):
    monkeypatch.setattr("emloc_core.tuning.launcher.free_of", lambda _: 20 << 30)
    require_room(20 << 30, torch.device("cuda"))
    require_room(30 << 30, torch.device("cpu"))
    with pytest.raises(
        EmlocError, match=r"takes 32\.2 GB, but the GPU has only 21\.5 GB free.*device_map='auto'"
    ) as caught:
        require_room(30 << 30, torch.device("cuda"))
    assert caught.value.code == "memory"


# The command line


def test_options_become_settings(tiny_model, rows_file, tmp_path):
    options = ["--lr", "0.5", "--rank", "2", "--alpha", "5", "--rslora", "--target", "q_proj", "--target", "v_proj"]
    options += ["--no-bf16", "--steps", "1", "--set", "warmup_steps=1", "--set", "lr_scheduler_type=cosine", "--json"]
    argv = [str(tiny_model), "--data", str(rows_file), "-o", str(tmp_path / "a"), *options]
    result = CliRunner().invoke(command, argv, catch_exceptions=False)
    assert result.exit_code == 0
    answer = json.loads(result.stdout)  # the trainer's own words are on stderr
    expected = {"learning_rate": 0.5, "lora_rank": 2, "lora_alpha": 5, "use_rslora": True, "bf16": False, "steps": 1}
    expected |= {"target_modules": ["q_proj", "v_proj"], "max_length": None}
    expected["extra"] = {"warmup_steps": 1, "lr_scheduler_type": "cosine"}
    assert {name: answer["request"]["settings"][name] for name in expected} == expected
    assert answer["result"]["steps"] == 1


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--set", "warmup_steps"], "not KEY=VALUE"),
        (["--set", "warmup_stps=1"], "Did you mean 'warmup_steps'"),
        (["--steps", "0"], "steps = 0"),
        (["--learning-rate", "0"], "learning_rate = 0"),
        (["--lora-rank", "0"], "lora_rank = 0"),
        (["--steps", "1", "--epochs", "1"], "steps or epochs, not both"),
    ],
)
def test_bad_options_are_one_error(options, complaint, tiny_model, rows_file, tmp_path):
    argv = [str(tiny_model), "--data", str(rows_file), "-o", str(tmp_path / "a"), *options]
    with pytest.raises(EmlocError, match=complaint):
        CliRunner().invoke(command, argv, catch_exceptions=False)


# Mistakes


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"extra": {"warmup_stps": 3}}, "no field 'warmup_stps'. Did you mean 'warmup_steps'"),
        ({"extra": {"max_steps": 3}}, "Give steps directly"),
        ({"extra": {"gradient_checkpointing": False}}, "Give gradient_checkpointing directly"),
        ({"extra": {"output_dir": "x"}}, "output_dir cannot be set"),
        ({"extra": {"push_to_hub": True}}, "push_to_hub cannot be set: `emloc push` uploads"),
        ({"extra": {"fp16": True}, "bf16": True}, "training settings do not work"),
        ({"extra": {"packing": True}}, "training settings do not work"),
        ({"target_modules": ["query"]}, r"The model has no module 'query'"),
        ({"target_modules": ["q_proj", "vproj"]}, "The model has no module 'vproj'. Did you mean 'v_proj'"),
        ({"target_modules": ["embed_tokens"]}, "'embed_tokens' matches model.embed_tokens"),
        ({"learning_rate": 1e30}, r"The loss at step \d+ is nan.*Lower the learning rate"),
        ({"learning_rate": 1e38, "steps": 1, "extra": {"weight_decay": 1e10}}, "After the last step .* is not finite"),
        ({"extra": {"max_grad_norm": "abc"}}, r"do not work \('>' not supported .*\)\. Correct the extra fields"),
        ({"extra": {"adam_beta1": 7}}, r"do not work \(Invalid beta parameter at index 0: 7\)"),
        ({"extra": {"optim": "galore_adamw"}}, r"do not work: You need to install `galore_torch`.*choose another"),
        (
            {"extra": {"dataloader_drop_last": True}, "batch_size": 200},
            "No step was taken: the rows make no full batch",
        ),
        ({"max_length": 3}, "Every row's prompt alone fills the 3 tokens"),
    ],
)
def test_settings_that_cannot_work_are_one_error(changes, complaint, tiny_model, rows_file, tmp_path):
    with pytest.raises(EmlocError, match=complaint):
        finetune(tiny_model, str(rows_file), tmp_path / "a", settings(**changes))
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / ".a.partial").exists()


def test_an_unknown_tracker_is_refused_before_training(tiny_model, rows_file, tmp_path):
    with pytest.raises(EmlocError, match="The tracker 'nowhere' cannot be used: nowhere is not supported"):
        train_job(tiny_model, rows_file, tmp_path / "a", settings(report_to="nowhere"))


def test_a_model_without_a_loss_is_told_from_steps_that_diverge(tiny_model, rows_file, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.norm.weight"].fill_(float("nan"))
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EmlocError, match=r"The loss at step 1 is nan\. Nothing has been tuned yet"):
        finetune(tmp_path / "model", str(rows_file), tmp_path / "a", settings())


def test_a_row_beyond_the_models_limit_is_named(tiny_model, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "cat"}, {"text": "cat " * 300}])
    with pytest.raises(EmlocError, match=r"Row 2 .* the model takes 256\. Truncate it with --max-length 256"):
        finetune(tiny_model, str(path), tmp_path / "a", settings())


def test_nothing_left_to_train_on_is_an_error(tiny_model, rows_file, tmp_path):
    with pytest.raises(EmlocError, match="all 120 are calibration, selection or excluded rows"):
        train_job(tiny_model, rows_file, tmp_path / "a", settings(), exclude=[rows_file])
    with pytest.raises(EmlocError, match=r"There is no file .*test\.jsonl"):
        train_job(tiny_model, rows_file, tmp_path / "a", settings(), exclude=[tmp_path / "test.jsonl"])


def test_steps_and_epochs_contradict_each_other():
    with pytest.raises(ValueError, match="steps or epochs, not both"):
        TrainSettings(steps=1, epochs=1)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda path: (path / "config.json").unlink(), "has no config.json"),
        (lambda path: (path / "config.json").write_text('{"model_type": "bart"}'), "No plugin declares"),
        (lambda path: (path / "tokenizer.json").unlink(), "has no tokenizer"),
        (lambda path: os.truncate(path / "model.safetensors", 5000), "model.safetensors"),
    ],
)
def test_a_damaged_model_is_one_error(damage, complaint, tiny_model, rows_file, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(EmlocError, match=complaint):
        finetune(tmp_path / "model", str(rows_file), tmp_path / "a", settings())
    assert not (tmp_path / "a").exists()


def test_an_emulator_without_what_a_correction_reads_is_told_of(tiny_emulator, rows_file, tmp_path):
    assert not train_job(tiny_emulator, rows_file, tmp_path / "adapter", settings()).warnings
    shutil.copytree(tiny_emulator, tmp_path / "part", ignore=shutil.ignore_patterns("emloc.json"))
    (warning,) = train_job(tmp_path / "part", rows_file, tmp_path / "adapter", settings()).warnings
    assert "part is an emulator without its emloc.json" in warning


def test_bad_rows_are_left_out_counted_and_named(tiny_model, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a"}, *example_rows()[:8]])
    job = train_job(tiny_model, rows, tmp_path / "adapter", settings(steps=1), skip_bad_rows=True)
    assert any("are left out: 1, which" in warning for warning in job.warnings)
    adapter = job.run()
    assert read_manifest(adapter)["result"]["skipped_rows"] == 1
    assert json.loads((adapter / "skipped_rows.jsonl").read_text())["row"] == 1
