"""Evaluation: token losses against torch, tasks that are files, one process a system, what is kept and refused."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import example_rows, write_jsonl
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from emloc_core import evaluate as evaluation
from emloc_core.checkpoint import Checkpoint
from emloc_core.cli.eval import command
from emloc_core.errors import EmlocError
from emloc_core.eval_tasks import TaskSpec, find_task, load_task
from emloc_core.evaluate import System, canonical_systems, check_adapters, evaluate
from emloc_core.evaluate_system import load_system, run_tasks
from emloc_core.new_task import write_task


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory):
    """A LoRA that changes the model: both halves random."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model), LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    )
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
    directory = tmp_path_factory.mktemp("adapters") / "random"
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def tasks(rows_file, tmp_path_factory):
    """A task of a loss and a task of generation on the shared rows."""
    directory = tmp_path_factory.mktemp("tasks")
    return [str(write_task(kind, rows_file, directory / f"{kind}.yaml")) for kind in ("completion_nll", "generation")]


def metrics_of(model_directory, task, adapter=None, **settings):
    model, tokenizer = load_system(Path(model_directory), adapter)
    spec = find_task(str(task), Path(task).parent)
    result = run_tasks(model, tokenizer, [spec], **settings)
    return result["tasks"][spec.name], result["samples"]


def direct_nll(model, pairs):
    """Mean loss a token of the second ids of each pair, after the first: plain torch, a row at a time."""
    total, count = 0.0, 0
    for context, target in pairs:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([context + target])).logits[0, len(context) - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(target), reduction="sum").item()
        count += len(target)
    return total / count


def completions(tokenizer, n):
    for row in example_rows()[:n]:
        whole, context = tokenizer.encode(row["prompt"] + row["completion"]), tokenizer.encode(row["prompt"])
        yield context, whole[len(context) :]


def test_nll_is_the_loss_a_token(tiny_model, tasks):
    found, _ = metrics_of(tiny_model, tasks[0], limit=13, batch_size=4)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    expected = direct_nll(AutoModelForCausalLM.from_pretrained(tiny_model), completions(tokenizer, 13))
    assert found["metrics"]["nll"]["value"] == pytest.approx(expected, rel=1e-5)
    assert "perplexity" not in found["metrics"]  # lm-eval's is of sequences


def test_an_adapter_changes_the_result_as_in_torch(tiny_model, adapter, tasks):
    plain, _ = metrics_of(tiny_model, tasks[0], limit=13)
    tuned, _ = metrics_of(tiny_model, tasks[0], adapter, limit=13)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), adapter).merge_and_unload()
    assert tuned["metrics"]["nll"]["value"] == pytest.approx(direct_nll(model, completions(tokenizer, 13)), rel=1e-4)
    change = tuned["metrics"]["nll"]["value"] - plain["metrics"]["nll"]["value"]
    assert abs(change) > 0.01  # far beyond the tolerance above, which is 0.0005


def test_rolling_nll_is_the_loss_a_token_of_the_whole_text(tiny_model, tmp_path):
    texts = [row["prompt"] + row["completion"] for row in example_rows()[:5]]
    data = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    found, _ = metrics_of(tiny_model, write_task("rolling_perplexity", data, tmp_path / "rolling.yaml"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    pairs = [([tokenizer.bos_token_id], tokenizer.encode(text)) for text in texts]
    expected = direct_nll(AutoModelForCausalLM.from_pretrained(tiny_model), pairs)
    assert found["metrics"]["nll"]["value"] == pytest.approx(expected, rel=1e-5)


def test_an_adapter_with_other_keys_is_refused(tiny_model, adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "other")
    file = tmp_path / "other" / "adapter_model.safetensors"
    tensors = {key.replace("layers.2", "layers.9"): value for key, value in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(EmlocError, match="does not fit"), pytest.warns(UserWarning, match="missing adapter keys"):
        load_system(tiny_model, tmp_path / "other")


def chat_rows(n):
    return [
        {
            "messages": [
                {"role": "system", "content": "be brief."},
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"].strip()},
            ]
        }
        for row in example_rows()[:n]
    ]


def test_conversations_go_through_the_chat_template(tiny_model, tmp_path):
    data = write_jsonl(tmp_path / "chats.jsonl", chat_rows(4))
    _, samples = metrics_of(tiny_model, write_task("generation", data, tmp_path / "write.yaml"), limit=2)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    turns = chat_rows(4)[0]["messages"]
    expected = tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
    assert samples[0]["prompt"] == expected
    assert samples[0]["expected"] == turns[-1]["content"]
    _, samples = metrics_of(tiny_model, tmp_path / "write.yaml", limit=2, chat=False)
    assert samples[0]["prompt"].endswith(turns[1]["content"])
    assert "<user>" not in samples[0]["prompt"]


def test_nll_of_a_conversation_is_of_the_answer_after_the_template(tiny_model, tmp_path):
    data = write_jsonl(tmp_path / "chats.jsonl", chat_rows(6))
    found, _ = metrics_of(tiny_model, write_task("completion_nll", data, tmp_path / "answers.yaml"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    pairs = []
    for row in chat_rows(6):
        text = tokenizer.apply_chat_template(row["messages"][:-1], tokenize=False, add_generation_prompt=True)
        context = tokenizer.encode(text)
        pairs.append((context, tokenizer.encode(text + row["messages"][-1]["content"])[len(context) :]))
    expected = direct_nll(AutoModelForCausalLM.from_pretrained(tiny_model), pairs)
    assert found["metrics"]["nll"]["value"] == pytest.approx(expected, rel=1e-5)


def test_a_chat_without_a_template_is_refused(tiny_model, tmp_path):
    data = write_jsonl(tmp_path / "chats.jsonl", chat_rows(2))
    spec = find_task(str(write_task("generation", data, tmp_path / "write.yaml")), tmp_path)
    model, tokenizer = load_system(tiny_model, None)
    tokenizer.chat_template = None
    with pytest.raises(EmlocError, match="needs a chat template"):
        run_tasks(model, tokenizer, [spec])


def test_a_choice_is_scored_among_all_answers(tiny_model, tmp_path):
    # answers of digits, which lm-eval takes for places among the choices when they are written into a task as they are
    rows = [{"prompt": row["prompt"], "completion": "1222"[i % 4]} for i, row in enumerate(example_rows()[:20])]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    found, _ = metrics_of(tiny_model, write_task("choice", data, tmp_path / "choice.yaml"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    right = 0
    for row in rows:
        context = tokenizer.encode(row["prompt"])
        ids = {answer: tokenizer.encode(row["prompt"] + answer)[len(context) :] for answer in "12"}
        loss = {answer: direct_nll(model, [(context, target)]) * len(target) for answer, target in ids.items()}
        right += min(loss, key=loss.get) == row["completion"]
    assert found["metrics"]["acc"]["value"] == pytest.approx(right / len(rows))


def test_a_task_of_a_form_that_its_kind_cannot_use_is_refused(rows_file, tmp_path):
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": "a cat runs."}])
    with pytest.raises(EmlocError, match="needs prompt and completion"):
        write_task("generation", texts, tmp_path / "a.yaml")
    with pytest.raises(EmlocError, match="120 different answers"):
        write_task("choice", rows_file, tmp_path / "a.yaml")
    several = [{"messages": chat_rows(1)[0]["messages"][1:] * 2}]
    with pytest.raises(EmlocError, match="row 1: the turns are user, assistant, user, assistant"):
        write_task("generation", write_jsonl(tmp_path / "turns.jsonl", several), tmp_path / "a.yaml")
    assert not (tmp_path / "a.yaml").exists()


@pytest.fixture(scope="module")
def compared(tiny_model, adapter, tasks, tmp_path_factory):
    """Two systems, each evaluated in a process of its own."""
    output = tmp_path_factory.mktemp("evaluations") / "comparison"
    systems = [System("base", tiny_model), System("base+corrected", tiny_model, adapter)]
    return systems, output, evaluate(systems, tasks, output, limit=5)


def test_systems_are_compared_and_published(compared, tiny_model, tasks):
    systems, output, results = compared
    assert list(results["systems"]) == ["base", "base+corrected"]
    for system in systems:
        found, _ = metrics_of(tiny_model, tasks[0], system.adapter, limit=5)
        assert results["systems"][system.name]["nll"] == pytest.approx(found["metrics"]["nll"]["value"], rel=1e-5)
        assert results["systems"][system.name]["peak_bytes"] > 1e8
    assert results["metrics"]["nll"] == {"task": "completion_nll", "higher_is_better": False}
    assert results["tasks"]["generation"] == {"output_type": "generate_until", "rows": 5}
    assert "| base+corrected |" in (output / "table.md").read_text()
    samples = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    assert [(sample["row"], sample["system"]) for sample in samples[:3]] == [
        (0, "base"), (0, "base+corrected"), (1, "base")
    ]  # fmt: skip
    assert not [path.name for path in output.iterdir() if path.name.startswith(".")]


def test_a_finished_evaluation_is_not_run_again(compared, tasks, monkeypatch):
    systems, output, results = compared
    monkeypatch.setattr(evaluation, "_run", lambda *_: pytest.fail("evaluated again"))
    assert evaluate(systems, tasks, output, limit=5) == results
    with pytest.raises(EmlocError, match="limit was 5 and is now 6"):
        evaluate(systems, tasks, output, limit=6)


def part(nll):
    metrics = {"nll": {"value": nll, "stderr": 0.1, "higher_is_better": False}}
    return {
        "tasks": {"completion_nll": {"output_type": "loglikelihood", "rows": 3, "metrics": metrics}},
        "samples": [], "seconds": 1.0, "peak_bytes": 5,
    }  # fmt: skip


def test_systems_that_are_done_are_kept_when_interrupted(tiny_model, adapter, tasks, tmp_path, monkeypatch):
    systems = [System("base", tiny_model), System("full_lora", tiny_model, adapter)]
    ran = []

    def interrupted(system, _specs, _settings, result):
        ran.append(system.name)
        if len(ran) == 2:
            raise KeyboardInterrupt
        result.write_text(json.dumps(part(float(len(ran)))))

    monkeypatch.setattr(evaluation, "_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(systems, tasks[:1], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    results = evaluate(systems, tasks[:1], tmp_path / "out")
    assert ran == ["base", "full_lora", "full_lora"]
    assert [row["nll"] for row in results["systems"].values()] == [1.0, 3.0]


FAILURES = {
    (2, b"The adapter x does not fit."): r"mine cannot be evaluated: The adapter x does not fit\.$",
    (-9, b""): "mine failed: it was killed by signal 9",
    (1, b"Traceback ...\nRuntimeError: no space"): r"mine failed: RuntimeError: no space .*\.out\.partial/\.mine\.log",
    (0, b""): "mine failed: no word of why",
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_process_is_one_error_and_keeps_what_is_done(failure, tiny_model, tasks, tmp_path, monkeypatch):
    systems, ran = [System("base", tiny_model), System("mine", tiny_model)], []

    def run(command, *, stderr, **_):
        job = json.loads(Path(command[-1]).read_text())
        ran.append(Path(job["result"]).name)
        code, said = failure
        if len(ran) != 2:
            Path(job["result"]).write_text(json.dumps(part(float(len(ran)))))
            code, said = 0, b""
        stderr.write(said)
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(evaluation.subprocess, "run", run)
    with pytest.raises(EmlocError, match=FAILURES[failure]):
        evaluate(systems, tasks, tmp_path / "out")
    results = evaluate(systems, tasks, tmp_path / "out")
    assert ran == [".base.json", ".mine.json", ".mine.json"]
    assert [row["nll"] for row in results["systems"].values()] == [1.0, 3.0]
    assert {path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")} == set()


def test_nothing_is_left_of_an_evaluation_in_which_nothing_was_done(tiny_model, tasks, tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 2)
    monkeypatch.setattr(evaluation.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(EmlocError, match="base cannot be evaluated"):
        evaluate([System("base", tiny_model)], tasks, tmp_path / "out")
    assert not (tmp_path / ".out.partial").exists()


def test_data_are_found_relative_to_the_task_file(tmp_path, monkeypatch):
    (tmp_path / "tasks").mkdir()
    data = write_jsonl(tmp_path / "data.jsonl", example_rows()[:3])
    task = write_task("completion_nll", data, tmp_path / "tasks" / "loss.yaml")
    assert '"../data.jsonl"' in task.read_text()
    monkeypatch.chdir("/")
    (loaded,) = load_task(find_task(str(task), tmp_path))
    assert len(loaded.eval_docs) == 3


def test_a_digest_covers_data_functions_and_includes(rows_file, tmp_path):
    data = tmp_path / "rows.jsonl"
    shutil.copy(rows_file, data)
    (tmp_path / "common.yaml").write_text("dataset_path: json\noutput_type: generate_until\n")
    (tmp_path / "score.py").write_text("def score(doc, results):\n    return {'right': 1}\n")
    task = tmp_path / "task.yaml"
    task.write_text(
        "include: common.yaml\ntask: mine\ndataset_kwargs: {data_files: {test: rows.jsonl}}\ntest_split: test\n"
        "doc_to_text: prompt\ndoc_to_target: completion\nprocess_results: !function score.score\n"
    )
    digests = {find_task(str(task), tmp_path).digest}
    for file, line in (("score.py", "# \n"), ("common.yaml", "# \n"), ("rows.jsonl", "\n"), ("task.yaml", "# \n")):
        with (tmp_path / file).open("a") as stream:
            stream.write(line)
        digests.add(find_task(str(task), tmp_path).digest)
    assert len(digests) == 5


BROKEN = {
    "task: [": "not valid YAML",
    "- 1": "holds list",
    "dataset_path: json": "does not say `task: NAME`",
    "task: a\ndoc_to_txt: b": "unknown key 'doc_to_txt'.*Did you mean 'doc_to_text'",
    "task: a\noutput_type: logliklihood": "Did you mean 'loglikelihood'",
    "task: a\ndataset_path: json\ndataset_kwargs: {data_files: {test: gone.jsonl}}": "gone.jsonl, which does not exist",
    "task: a\ninclude: gone.yaml": "includes .*gone.yaml, which does not exist",
    "task: a\ninclude: task.yaml": "includes itself",
}


@pytest.mark.parametrize("content", BROKEN)
def test_a_broken_task_file_is_refused(content, tmp_path):
    (tmp_path / "task.yaml").write_text(content)
    with pytest.raises(EmlocError, match=BROKEN[content]):
        find_task(str(tmp_path / "task.yaml"), tmp_path)


def test_a_missing_task_file_names_the_nearest(tasks):
    with pytest.raises(EmlocError, match=r"Did you mean 'generation\.yaml'"):
        find_task(str(Path(tasks[1]).with_name("generations.yaml")), Path(tasks[1]).parent)


def test_an_unknown_bundled_task_names_the_nearest(tmp_path):
    with pytest.raises(EmlocError, match="Did you mean 'hellaswag'"):
        find_task("hellaswagg", tmp_path)


def test_a_template_that_names_no_column_is_one_error(rows_file, tmp_path):
    task = write_task("completion_nll", rows_file, tmp_path / "loss.yaml")
    task.write_text(task.read_text().replace("{{ prompt }}", "{{ promt }}"))
    with pytest.raises(EmlocError, match=r"lm-eval cannot build .*loss\.yaml .*promt"):
        load_task(find_task(str(task), tmp_path))


def test_an_unreachable_hub_is_one_error(tmp_path, monkeypatch):
    import datasets

    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'super_glue' on the Hub")

    (tmp_path / "task.yaml").write_text("task: a\ndataset_path: super_glue\ntest_split: test\ndoc_to_text: a\n")
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(EmlocError, match="come from the hub, which cannot be reached"):
        load_task(TaskSpec("a", tmp_path / "task.yaml", ""))


def test_systems_follow_from_the_directories():
    base, emulator, adapter, corrected = (Path(name) for name in ("base", "emulator", "adapter", "corrected"))
    found = canonical_systems(base=base, emulator=emulator, adapter=adapter, corrected=corrected)
    assert found == [
        System("base", base), System("emulator", emulator), System("emulator+lora", emulator, adapter),
        System("base+uncorrected", base, adapter), System("base+corrected", base, corrected),
    ]  # fmt: skip
    assert canonical_systems(base=base) == [System("base", base)]
    with pytest.raises(EmlocError, match="Add --base"):
        canonical_systems(emulator=emulator, corrected=corrected)
    with pytest.raises(EmlocError, match="needs a model"):
        canonical_systems(adapter=adapter)


@pytest.fixture(scope="module")
def foreign(tiny_model, tmp_path_factory):
    """Another model of the same shape."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.lm_head.weight.data += 1
    directory = tmp_path_factory.mktemp("models") / "foreign"
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def write_manifest(adapter, tmp_path):
    """Return a function that copies the adapter with the manifest of a stage that made it for some model."""

    def write(kind, key, model):
        directory = shutil.copytree(adapter, tmp_path / f"{kind}-{len(list(tmp_path.iterdir()))}")
        request = {key: Checkpoint(model).fingerprint(tmp_path)}
        (directory / "emloc.json").write_text(json.dumps({"kind": kind, "request": request}))
        return directory

    return write


def test_an_adapter_in_the_place_of_another_is_refused(tiny_model, tiny_emulator, adapter, write_manifest, tmp_path):
    corrected = write_manifest("corrected-adapter", "base", tiny_model)
    tuned = write_manifest("adapter", "model", tiny_emulator)
    full = write_manifest("adapter", "model", tiny_model)
    given = {"base": tiny_model, "emulator": tiny_emulator}
    check_adapters(canonical_systems(**given, adapter=tuned, corrected=corrected, full_lora=full), tmp_path)
    check_adapters(canonical_systems(**given, adapter=adapter, full_lora=adapter), tmp_path)  # not EMLoC's: unknown
    for refused, message in (
        ({"corrected": tuned}, f"--corrected {tuned} is not corrected"),
        ({"corrected": adapter}, f"--corrected {adapter} is not corrected"),
        ({"adapter": corrected}, f"--adapter {corrected} is corrected"),
        ({"adapter": full}, f"{full} was made for another model than {tiny_emulator}"),
        ({"full_lora": tuned}, f"{tuned} was made for another model than {tiny_model}"),
        ({"full_lora": corrected}, f"{corrected} was made for another model than {tiny_model}"),
    ):
        with pytest.raises(EmlocError, match=message):
            check_adapters(canonical_systems(**given, **refused), tmp_path)


@pytest.mark.parametrize(
    ("option", "kind", "key"),
    [
        ("--corrected", "corrected-adapter", "base"),
        ("--adapter", "adapter", "model"),
        ("--full-lora", "adapter", "model"),
    ],
)
@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_an_adapter_of_another_model_is_refused(
    option, kind, key, dry, tiny_model, tiny_emulator, foreign, write_manifest, tasks, tmp_path
):
    strange = write_manifest(kind, key, foreign)
    models = ["--base", str(tiny_model), "--emulator", str(tiny_emulator)]
    argv = [*tasks, *models, option, str(strange), "-o", str(tmp_path / "out"), *dry]
    with pytest.raises(EmlocError, match=f"{strange} was made for another model"):
        CliRunner().invoke(command, argv, catch_exceptions=False)
    assert not (tmp_path / "out").exists()
    free = [*tasks, "--system", f"any={tiny_model}+{strange}", "-o", str(tmp_path / "out"), "--dry-run"]
    assert "any" in CliRunner().invoke(command, free, catch_exceptions=False).stdout


def test_a_dry_run_checks_everything_and_writes_nothing(tiny_model, adapter, tasks, tmp_path):
    argv = [*tasks, "--base", str(tiny_model), "--full-lora", str(adapter), "-o", str(tmp_path / "out"), "--dry-run"]
    content = json.loads(CliRunner().invoke(command, [*argv, "--json"], catch_exceptions=False).stdout)
    assert content["systems"]["full_lora"] == {"model": str(tiny_model), "adapter": str(adapter)}
    assert content["tasks"] == {Path(task).stem: task for task in tasks}
    with pytest.raises(EmlocError, match=r"nowhere has no adapter_config\.json"):
        CliRunner().invoke(command, [*argv, "--system", f"a={tiny_model}+nowhere"], catch_exceptions=False)
    with pytest.raises(EmlocError, match="'a' is not NAME=MODEL"):
        CliRunner().invoke(command, [*argv, "--system", "a"], catch_exceptions=False)
    assert not list(tmp_path.iterdir())


def test_the_command_writes_a_task_file(rows_file, tmp_path):
    argv = ["--new-task", "completion_nll", "--data", str(rows_file), "-o", str(tmp_path / "loss.yaml")]
    CliRunner().invoke(command, argv, catch_exceptions=False)
    assert find_task(str(tmp_path / "loss.yaml"), tmp_path).name == "loss"
    with pytest.raises(EmlocError, match="exists already"):
        CliRunner().invoke(command, argv, catch_exceptions=False)


def test_systems_and_tasks_of_one_name_are_refused(tiny_model, tasks, tmp_path):
    with pytest.raises(EmlocError, match="Two systems are called 'a'"):
        evaluate([System("a", tiny_model)] * 2, tasks, tmp_path / "out")
    with pytest.raises(EmlocError, match="Two tasks are called 'generation'"):
        evaluate([System("a", tiny_model)], [tasks[1]] * 2, tmp_path / "out")
    with pytest.raises(EmlocError, match="is no name of a system"):
        evaluate([System("../a", tiny_model)], tasks, tmp_path / "out")
