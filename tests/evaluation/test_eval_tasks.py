"""Tasks that are files: what they measure, against torch; and what is refused of them."""

import functools
import itertools
import shutil
import subprocess
from pathlib import Path

import lm_eval.tasks
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from support.evaluation import completions, direct_nll, metrics_of
from support.marks import thorough
from support.models import CHAT_TEMPLATE, THINKING_TEMPLATE
from support.rows import example_rows, tokenized_row, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from emloc_core.data.rows import load_rows
from emloc_core.errors import EmlocError
from emloc_core.evaluation.loading import load_system
from emloc_core.evaluation.new_task import write_task
from emloc_core.evaluation.system import run_tasks
from emloc_core.evaluation.tasks import TaskSpec, find_task, load_task, require_bundled
from emloc_core.files.inputs import Inputs


def test_nll_is_the_loss_a_token(shallow_model, rows_file, tmp_path):
    task = write_task("completion_nll", rows_file, tmp_path / "loss.yaml")
    measured, _ = metrics_of(shallow_model, task, limit=13, batch_size=4)
    tokenizer = AutoTokenizer.from_pretrained(shallow_model)
    expected = direct_nll(AutoModelForCausalLM.from_pretrained(shallow_model), completions(tokenizer, 13))
    assert measured["metrics"]["nll"]["value"] == pytest.approx(expected, rel=1e-5)
    assert "perplexity" not in measured["metrics"]  # lm-eval's is of sequences


def test_rolling_nll_is_the_loss_a_token_of_the_whole_text(shallow_model, tmp_path):
    texts = [row["prompt"] + row["completion"] for row in example_rows()[:5]]
    data = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    measured, _ = metrics_of(shallow_model, write_task("rolling_perplexity", data, tmp_path / "rolling.yaml"))
    tokenizer = AutoTokenizer.from_pretrained(shallow_model)
    pairs = [([tokenizer.bos_token_id], tokenizer.encode(text)) for text in texts]
    expected = direct_nll(AutoModelForCausalLM.from_pretrained(shallow_model), pairs)
    assert measured["metrics"]["nll"]["value"] == pytest.approx(expected, rel=1e-5)


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


def test_conversations_go_through_the_chat_template(shallow_model, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess.Popen, "__init__", lambda *_, **__: pytest.fail("lm-eval starts a process"))
    data = write_jsonl(tmp_path / "chats.jsonl", chat_rows(4))
    _, samples = metrics_of(shallow_model, write_task("generation", data, tmp_path / "write.yaml"), limit=2)
    tokenizer = AutoTokenizer.from_pretrained(shallow_model)
    turns = chat_rows(4)[0]["messages"]
    expected = tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
    assert samples[0]["prompt"] == expected
    assert samples[0]["expected"] == turns[-1]["content"]
    _, samples = metrics_of(shallow_model, tmp_path / "write.yaml", limit=2, chat=False)
    assert samples[0]["prompt"].endswith(turns[1]["content"])
    assert "<user>" not in samples[0]["prompt"]


@pytest.mark.parametrize("template", ["completion_nll", "generation"])
def test_rows_per_batch_are_halved_where_memory_runs_out(shallow_model, tmp_path, template, capsys):
    data = write_jsonl(tmp_path / "rows.jsonl", chat_rows(6))
    spec = find_task(str(write_task(template, data, tmp_path / "task.yaml")), Inputs())
    model, tokenizer = load_system(shallow_model, None)
    sizes, most = [], 2

    def allocate(_module, _args, given):
        sizes.append(len(given["input_ids"]))
        if sizes[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    model.register_forward_pre_hook(allocate, with_kwargs=True)
    halved = run_tasks(model, tokenizer, load_task(spec), batch_size=5)
    assert capsys.readouterr().err.count("memory ran out; evaluating 2 rows at a time instead") == 1
    assert sizes[0] == 5
    assert max(sizes[1:]) == 2
    assert halved == run_tasks(model, tokenizer, load_task(spec), batch_size=2)
    most = 0
    with pytest.raises(EmlocError, match="ran out of memory with one row per batch") as raised:
        run_tasks(model, tokenizer, load_task(spec), batch_size=5)
    assert raised.value.code == "memory"


@pytest.mark.parametrize("form", ["messages", *thorough("prompt")])
def test_conversations_of_several_turns_are_asked_for_their_last_answer(shallow_model, tmp_path, form):
    turns = [one["messages"] + other["messages"][1:] for one, other in itertools.pairwise(chat_rows(5))]
    turns[1] = chat_rows(1)[0]["messages"]  # of one turn, among others
    rows = [{"messages": row} if form == "messages" else {"prompt": row[:-1], "completion": row[-1:]} for row in turns]
    task = write_task("completion_nll", write_jsonl(tmp_path / "turns.jsonl", rows), tmp_path / "turns.yaml")
    measured, _ = metrics_of(shallow_model, task)
    tokenizer = AutoTokenizer.from_pretrained(shallow_model)
    pairs = []
    for row in turns:
        text = tokenizer.apply_chat_template(row[:-1], tokenize=False, add_generation_prompt=True)
        context = tokenizer.encode(text)
        pairs.append((context, tokenizer.encode(text + row[-1]["content"])[len(context) :]))
    expected = direct_nll(AutoModelForCausalLM.from_pretrained(shallow_model), pairs)
    assert measured["metrics"]["nll"]["value"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(EmlocError, match=r"has conversations of several turns\. Leave out --no-chat"):
        metrics_of(shallow_model, task, chat=False)


def test_tools_are_shown_in_an_evaluation(shallow_model, tmp_path):
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "look", "arguments": {"at": "cat"}}]}
    messages = [
        {"role": "user", "content": "which?"},
        call,
        {"role": "tool", "content": "red"},
        {"role": "assistant", "content": "a red cat."},
    ]
    data = write_jsonl(tmp_path / "tools.jsonl", [{"tools": [{"name": "look"}], "messages": messages}] * 2)
    spec = find_task(str(write_task("generation", data, tmp_path / "tools.yaml")), Inputs())
    model, tokenizer = load_system(shallow_model, None)
    with pytest.raises(EmlocError, match="Row 1: the model's chat template leaves out tools"):
        run_tasks(model, tokenizer, load_task(spec))
    tokenizer.chat_template = (
        "{{ tools | tojson }}{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}"
        "{{ message['tool_calls'] | default([]) | tojson }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    (sample, _) = run_tasks(model, tokenizer, load_task(spec))["samples"]
    assert sample["prompt"].startswith('[{"name": "look"}]<user>which?')
    assert '"arguments": {"at": "cat"}' in sample["prompt"]
    assert sample["prompt"].endswith("<tool>red[]<assistant>")


def test_nll_of_a_conversation_is_of_the_answer_after_the_template(shallow_model, tmp_path):
    data = write_jsonl(tmp_path / "chats.jsonl", chat_rows(6))
    measured, _ = metrics_of(shallow_model, write_task("completion_nll", data, tmp_path / "answers.yaml"))
    tokenizer = AutoTokenizer.from_pretrained(shallow_model)
    pairs = []
    for row in chat_rows(6):
        text = tokenizer.apply_chat_template(row["messages"][:-1], tokenize=False, add_generation_prompt=True)
        context = tokenizer.encode(text)
        pairs.append((context, tokenizer.encode(text + row["messages"][-1]["content"])[len(context) :]))
    expected = direct_nll(AutoModelForCausalLM.from_pretrained(shallow_model), pairs)
    assert measured["metrics"]["nll"]["value"] == pytest.approx(expected, rel=1e-5)


def with_template(template, shallow_model, tmp_path):
    model = shutil.copytree(shallow_model, tmp_path / "thinking")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(model)
    return model


@pytest.fixture
def thinking(shallow_model, tmp_path):
    """A model whose template writes more before an answer than the prompt that asks for it ends with."""
    return with_template(THINKING_TEMPLATE, shallow_model, tmp_path)


@pytest.fixture(params=["one turn", "several turns"])
def conversations(request, tmp_path):
    """Rows of conversations."""
    rows = chat_rows(6) if request.param == "one turn" else [
        {"messages": one["messages"] + other["messages"][1:]} for one, other in itertools.pairwise(chat_rows(7))
    ]  # fmt: skip
    return write_jsonl(tmp_path / "chats.jsonl", rows)


#: It asks for an answer by the start of a thought, and has none before an answer, as DeepSeek-V3's.
ASKING_TEMPLATE = CHAT_TEMPLATE.replace("<assistant>", "<assistant><system>")


@pytest.mark.parametrize(
    ("template", "before", "end"),
    [(THINKING_TEMPLATE, "<system>thought.", "thought."), (ASKING_TEMPLATE, "", "<assistant>")],
)
def test_an_answer_is_scored_where_tuning_has_it(template, before, end, shallow_model, conversations, tmp_path):
    thinking = with_template(template, shallow_model, tmp_path)
    measured, _ = metrics_of(thinking, write_task("completion_nll", conversations, tmp_path / "answers.yaml"))
    tokenizer = AutoTokenizer.from_pretrained(thinking)
    thought, pairs = len(tokenizer.encode(before)), []
    for row in load_rows(conversations):
        sample = tokenized_row(row, tokenizer)
        start = sample.completion_mask.index(1) + thought
        pairs.append((sample.input_ids[:start], sample.input_ids[start:-1]))
    assert tokenizer.decode(pairs[0][0]).endswith(end)
    expected = direct_nll(AutoModelForCausalLM.from_pretrained(thinking), pairs)
    assert measured["metrics"]["nll"]["value"] == pytest.approx(expected, rel=1e-5)


def test_what_a_template_writes_before_an_answer_is_not_part_of_it(thinking, conversations, tmp_path, monkeypatch):
    answers = [row.completion[0]["content"] for row in load_rows(conversations)]
    written = [f"thought. {answer}" for answer in answers[:3]] + answers[3:]
    monkeypatch.setattr(HFLM, "generate_until", lambda *_: written)
    measured, samples = metrics_of(thinking, write_task("generation", conversations, tmp_path / "write.yaml"))
    assert measured["metrics"]["exact_match"]["value"] == 1
    assert samples[0]["prompt"].endswith("<assistant>")
    assert [sample["written"] for sample in samples] == answers


def test_stop_sequences_are_looked_for_in_the_answer_alone(thinking, conversations, tmp_path, monkeypatch):
    seen = []

    def written(_, requests, *__):
        seen.extend(request.args[1]["until"] for request in requests)
        return ["thought. a cat. or two; three"] * len(requests)

    monkeypatch.setattr(HFLM, "generate_until", written)
    task = write_task("generation", conversations, tmp_path / "write.yaml")
    task.write_text(task.read_text().replace("until: []", 'until: [".", ";"]'))
    _, samples = metrics_of(thinking, task)
    assert {sample["written"] for sample in samples} == {"a cat"}
    assert seen == [[";"]] * len(samples)


def test_a_chat_without_a_template_is_refused(shallow_model, tmp_path):
    data = write_jsonl(tmp_path / "chats.jsonl", chat_rows(2))
    spec = find_task(str(write_task("generation", data, tmp_path / "write.yaml")), Inputs())
    model, tokenizer = load_system(shallow_model, None)
    tokenizer.chat_template = None
    with pytest.raises(EmlocError, match="needs a chat template"):
        run_tasks(model, tokenizer, load_task(spec))


def test_a_choice_is_scored_among_all_answers(shallow_model, tmp_path):
    # answers of digits, which lm-eval takes for places among the choices when they are written into a task as they are
    rows = [{"prompt": row["prompt"], "completion": "1222"[i % 4]} for i, row in enumerate(example_rows()[:20])]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    measured, _ = metrics_of(shallow_model, write_task("choice", data, tmp_path / "choice.yaml"))
    tokenizer = AutoTokenizer.from_pretrained(shallow_model)
    model = AutoModelForCausalLM.from_pretrained(shallow_model)
    right = 0
    for row in rows:
        context = tokenizer.encode(row["prompt"])
        ids = {answer: tokenizer.encode(row["prompt"] + answer)[len(context) :] for answer in "12"}
        loss = {answer: direct_nll(model, [(context, target)]) * len(target) for answer, target in ids.items()}
        right += min(loss, key=loss.get) == row["completion"]
    assert measured["metrics"]["acc"]["value"] == pytest.approx(right / len(rows))


def test_choices_may_be_any_text(tmp_path):
    texts = ["\U0001f600", "\\ud83d", "caf\u00e9 \"'", "{{ a }}\\", "two\r\n\tlines\u2028\x85\x7f\x01"]
    data = write_jsonl(tmp_path / "\U0001f600.jsonl", [{"prompt": "a", "completion": text} for text in texts])
    (task,) = load_task(find_task(str(write_task("choice", data, tmp_path / "choice.yaml")), Inputs()))
    for doc in task.eval_docs:
        assert task.doc_to_choice(doc)[int(task.doc_to_target(doc))] == doc["completion"]


def test_a_task_of_a_form_that_its_kind_cannot_use_is_refused(rows_file, tmp_path):
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": "a cat runs."}])
    with pytest.raises(EmlocError, match="needs prompt and completion"):
        write_task("generation", texts, tmp_path / "a.yaml")
    with pytest.raises(EmlocError, match="120 different answers"):
        write_task("choice", rows_file, tmp_path / "a.yaml")
    call = {"role": "assistant", "tool_calls": [{"name": "look", "arguments": {}}]}
    calls = write_jsonl(tmp_path / "calls.jsonl", [{"messages": [{"role": "user", "content": "a"}, call]}])
    with pytest.raises(EmlocError, match="row 1: the answer is a tool call"):
        write_task("generation", calls, tmp_path / "a.yaml")
    assert not (tmp_path / "a.yaml").exists()


def test_rows_that_lm_eval_reads_otherwise_are_copied(shallow_model, tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,completion\ncat,1\ndog,02\n")
    task = write_task("completion_nll", tmp_path / "rows.csv", tmp_path / "tasks" / "loss.yaml")
    assert [row.completion for row in load_rows(tmp_path / "tasks" / "loss.jsonl")] == ["1", "02"]
    (loaded,) = load_task(find_task(str(task), Inputs()))
    assert loaded.doc_to_target(loaded.eval_docs[1]) == "02"
    alpaca = write_jsonl(tmp_path / "alpaca.jsonl", [{"instruction": "cat?", "output": "dog."}])
    write_task("generation", alpaca, tmp_path / "alpaca.yaml.yaml")
    with pytest.raises(EmlocError, match="already exists"):
        write_task("generation", alpaca, tmp_path / "alpaca.yaml")
    _, samples = metrics_of(shallow_model, tmp_path / "alpaca.yaml.yaml")
    assert samples[0]["expected"] == "dog."


def test_texts_in_parts_are_asked_as_text(shallow_model, tmp_path):
    rows = chat_rows(3)
    question, answer = rows[2]["messages"][1:]  # of one row among others
    prompt, expected = question["content"], answer["content"]
    question["content"] = [{"type": "text", "text": prompt[:5]}, {"type": "text", "text": prompt[5:]}]
    answer["content"] = [{"type": "text", "text": expected}]
    task = write_task("generation", write_jsonl(tmp_path / "parts.jsonl", rows), tmp_path / "write.yaml")
    sample = metrics_of(shallow_model, task)[1][2]
    assert sample["prompt"].endswith(f"<user>{prompt}</s><assistant>")
    assert sample["expected"] == expected


def test_nothing_is_left_of_a_task_that_is_refused(tmp_path):
    lines = "".join(f"a{number},b{number}\n" for number in range(30))
    (tmp_path / "rows.csv").write_text(f"instruction,output\n{lines}")
    with pytest.raises(EmlocError, match="30 different answers"):
        write_task("choice", tmp_path / "rows.csv", tmp_path / "task.yaml")
    write_task("completion_nll", tmp_path / "rows.csv", tmp_path / "task.yaml")  # as it said


def test_data_are_found_relative_to_the_task_file(tmp_path, monkeypatch):
    (tmp_path / "tasks").mkdir()
    data = write_jsonl(tmp_path / "data.jsonl", example_rows()[:3])
    task = write_task("completion_nll", data, tmp_path / "tasks" / "loss.yaml")
    assert '"../data.jsonl"' in task.read_text()
    monkeypatch.chdir("/")
    (loaded,) = load_task(find_task(str(task), Inputs()))
    assert len(loaded.eval_docs) == 3


def test_rows_of_text_may_be_in_several_directories(rows_file, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copy(rows_file, tmp_path / name / "rows.jsonl")
    (tmp_path / "b" / "task.yaml").write_text(
        "task: two\ndataset_path: json\ndataset_kwargs: {data_files: {train: ../a/rows.jsonl, test: rows.jsonl}}\n"
        "fewshot_split: train\ntest_split: test\ndoc_to_text: prompt\ndoc_to_target: completion\n"
    )
    (loaded,) = load_task(find_task(str(tmp_path / "b" / "task.yaml"), Inputs()))
    assert len(loaded.eval_docs) == len(load_rows(rows_file))


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
    digests = {find_task(str(task), Inputs()).digest}
    for file, line in (("score.py", "# \n"), ("common.yaml", "# \n"), ("rows.jsonl", "\n"), ("task.yaml", "# \n")):
        with (tmp_path / file).open("a") as stream:
            stream.write(line)
        digests.add(find_task(str(task), Inputs()).digest)
    assert len(digests) == 5


def test_a_digest_covers_a_directory_of_data(rows_file, tmp_path):
    (tmp_path / "rows" / "deep").mkdir(parents=True)
    data, digests = tmp_path / "rows" / "deep" / "test.jsonl", set()
    shutil.copy(rows_file, data)
    (tmp_path / "task.yaml").write_text(f"task: a\ndataset_path: {tmp_path / 'rows'}\ntest_split: test\n")
    for line in ("", "\n"):
        with data.open("a") as stream:
            stream.write(line)
        digests.add(find_task(str(tmp_path / "task.yaml"), Inputs()).digest)
    assert len(digests) == 2


BROKEN = {
    "task: [": "not valid YAML",
    "- 1": "does not hold keys",
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
        find_task(str(tmp_path / "task.yaml"), Inputs())


def test_a_missing_task_file_names_the_nearest(rows_file, tmp_path):
    write_task("generation", rows_file, tmp_path / "generation.yaml")
    with pytest.raises(EmlocError, match=r"Did you mean 'generation\.yaml'"):
        find_task(str(tmp_path / "generations.yaml"), Inputs())


def test_an_unknown_bundled_task_names_the_nearest(monkeypatch):
    bundled = Path(lm_eval.tasks.__file__).parent / "hellaswag"  # one of hundreds of directories, which take seconds
    few = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False, include_path=str(bundled))
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", few)
    require_bundled(["hellaswag"])
    with pytest.raises(EmlocError, match="Did you mean 'hellaswag'"):
        require_bundled(["hellaswag", "hellaswagg"])


def test_a_template_that_names_no_column_is_one_error(rows_file, tmp_path):
    task = write_task("completion_nll", rows_file, tmp_path / "loss.yaml")
    task.write_text(task.read_text().replace("{{ prompt }}", "{{ promt }}"))
    with pytest.raises(EmlocError, match=r"lm-eval cannot build .*loss\.yaml .*promt"):
        load_task(find_task(str(task), Inputs()))


def test_a_template_cannot_reach_python(rows_file, tmp_path):
    reaches = "{{ ''.__class__.__mro__[1].__subclasses__() | length }}"
    (tmp_path / "task.yaml").write_text(
        f"task: a\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {rows_file}}}}}\ntest_split: test\n"
        f'output_type: loglikelihood\ndoc_to_text: "{reaches}"\ndoc_to_target: completion\n'
    )
    with pytest.raises(EmlocError, match="SecurityError: access to attribute '__class__'"):
        load_task(find_task(str(tmp_path / "task.yaml"), Inputs()))


def test_an_unreachable_hub_is_one_error(tmp_path, monkeypatch):
    import datasets

    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'super_glue' on the Hub")

    (tmp_path / "task.yaml").write_text("task: a\ndataset_path: super_glue\ntest_split: test\ndoc_to_text: a\n")
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(EmlocError, match="come from the hub, which cannot be reached"):
        load_task(TaskSpec("a", tmp_path / "task.yaml", ""))
