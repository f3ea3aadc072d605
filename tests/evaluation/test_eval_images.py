"""Evaluation with images: what the model is shown and scored on, against the trainer and against transformers."""

import json
import re
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from emloc_internvl import INTERNVL
from emloc_qwen.vision import QWEN_VL
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from support.evaluation import evaluate, metrics_of, system
from support.jobs import compress_job
from support.marks import most_thorough, thorough
from support.rows import example_rows, tokenized_row, write_jsonl
from support.vision_models import conversation, internvl_processor, picture, qwen_processor, save_model
from tokenizers import processors
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from emloc_core.data.rows import load_rows
from emloc_core.errors import EmlocError
from emloc_core.evaluation.evaluate import canonical_systems
from emloc_core.evaluation.images import picture_directory
from emloc_core.evaluation.loading import load_system
from emloc_core.evaluation.multimodal_lm import ImageTextLM
from emloc_core.evaluation.new_task import write_task
from emloc_core.evaluation.system import run_tasks
from emloc_core.evaluation.tasks import find_task, load_task
from emloc_core.files.inputs import Inputs
from emloc_core.settings import CompressSettings

MODELS = {"internvl": (INTERNVL, internvl_processor), "qwen2_5_vl": (QWEN_VL, qwen_processor)}
COLOURS = ["blue", "green", "red", "white"]


@pytest.fixture(scope="module")
def rows_with_pictures(tmp_path_factory):
    """24 conversations about one or two pictures."""
    directory = tmp_path_factory.mktemp("pictured")
    (directory / "pictures").mkdir()
    for colour in COLOURS:
        picture([colour]).save(directory / "pictures" / f"{colour}.png")
    questions = [((one,), question) for one in COLOURS for question in ("which colour?", "colour of it:")]
    questions += [((one, other), "which colour is the last?") for one in COLOURS for other in COLOURS]
    rows = [conversation(question, names[-1]) | {"images": [f"pictures/{name}.png" for name in names]}
            for names, question in questions]  # fmt: skip
    return write_jsonl(directory / "rows.jsonl", rows)


@pytest.fixture(scope="module", params=most_thorough(MODELS, "internvl"))
def base(request, tmp_path_factory):
    """A tiny model with its processor, of each family for images and text."""
    family, processor = MODELS[request.param]
    return save_model(tmp_path_factory.mktemp("models") / request.param, family, request.param, processor())


@pytest.fixture(scope="module")
def internvl(tmp_path_factory):
    """One of them, where any will do."""
    return save_model(tmp_path_factory.mktemp("models") / "base", INTERNVL, "internvl", internvl_processor())


@pytest.fixture(scope="module")
def lm(base):
    """lm-eval's model of it."""
    model, processor = load_system(base, None, images=True)
    start = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    processor.tokenizer.backend_tokenizer.post_processor = start  # as Llama's: templates have it already
    return ImageTextLM(model, tokenizer=processor, batch_size=5)


def direct_nlls(model_directory, rows, processing):
    """The loss of each row's answer without what ends the turn, and its tokens: plain torch on the trainer's inputs."""
    model = AutoModelForImageTextToText.from_pretrained(model_directory)
    for row in rows:
        sample = tokenized_row(row, processing)
        ids = torch.tensor(sample.input_ids)
        answer = torch.tensor(sample.completion_mask).bool() & (ids != model.config.get_text_config().eos_token_id)
        with torch.no_grad():
            logits = model(**sample.inputs("cpu")).logits[0]
        losses = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
        yield losses[answer[1:]].sum().item(), int(answer.sum())


def prompt_inputs(sample):
    """The trainer's inputs of a row up to its answer."""
    inputs, start = sample.inputs("cpu"), sample.completion_mask.index(1)
    shape = inputs["input_ids"].shape
    return {name: value[:, :start] if value.shape == shape else value for name, value in inputs.items()}


def as_image(row):
    return {"image": row["images"][-1], "messages": row["messages"]}


def as_parts(row):
    question, answer = row["messages"]
    text = {"type": "text", "text": question["content"]}
    parts = [text, *({"type": "image"} for _ in row["images"]), {"type": "text", "text": "look!"}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": answer["content"]}]}
    system = {"role": "system", "content": [{"type": "text", "text": "be brief."}]}
    return {"images": row["images"], "messages": [system, {"role": "user", "content": parts}, answer]}


def as_either(row):
    return as_parts(row) if len(row["images"]) == 2 else row


def as_prompt(row):
    system = {"role": "system", "content": "be brief."}
    return {"images": row["images"], "prompt": [system, row["messages"][0]], "completion": row["messages"][1:]}


def as_some_without(row):
    return row if len(row["images"]) == 2 else {"messages": row["messages"]}


FORMS = {"images": dict, "image": as_image, "parts": as_parts, "prompt": as_prompt, "some without": as_some_without,
         "either": as_either}  # fmt: skip


@pytest.mark.parametrize(
    ("form", "suffix"),
    [
        *((form, "jsonl") for form in FORMS),
        ("parts", "parquet"),
        *thorough(*((form, "parquet") for form in FORMS if form not in ("parts", "either"))),
    ],
)
def test_the_model_is_shown_what_the_trainer_shows_it(form, suffix, lm, rows_with_pictures, tmp_path):
    shutil.copytree(rows_with_pictures.parent / "pictures", tmp_path / "pictures")
    rows = [FORMS[form](json.loads(line)) for line in rows_with_pictures.read_text().splitlines()]
    data = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        write_jsonl(data, rows)
    else:
        for row in rows:
            for name in {"images", "image"} & row.keys():
                sources = row[name] if name == "images" else [row[name]]
                read = [{"bytes": (tmp_path / source).read_bytes(), "path": None} for source in sources]
                row[name] = read if name == "images" else read[0]
        rows[0] = {"images": None, **rows[0]} if form == "some without" else rows[0]  # the schema is the first row's
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), data)
        shutil.rmtree(tmp_path / "pictures")
    (task,) = load_task(find_task(str(write_task("image_nll", data, tmp_path / "task.yaml")), Inputs()))
    task.build_all_requests(apply_chat_template=True, chat_template=lm.apply_chat_template)
    lm.chat_applied = True
    for row, request in zip(load_rows(str(data)), task.instances, strict=True):
        expected = tokenized_row(row, lm.processor)
        context, answer, shown = request.args
        encoded = lm.tok_batch_multimodal_encode([context], [shown["visual"]])
        ids = [*encoded["input_ids"][0].tolist(), *lm.answer_ids(answer), lm.tokenizer.eos_token_id]
        assert ids == expected.input_ids
        assert (lm.image_token_id in ids) == bool(row.images)
        prompt = prompt_inputs(expected)
        assert encoded.keys() == prompt.keys()
        assert all(torch.equal(encoded[name], prompt[name]) for name in prompt)


@pytest.mark.parametrize("batch_size", [*thorough(1), 5])
def test_nll_is_the_loss_a_token_of_the_answers_alone(batch_size, lm, base, rows_with_pictures, tmp_path):
    task = write_task("image_nll", rows_with_pictures, tmp_path / "loss.yaml")
    measured, _ = metrics_of(base, task, batch_size=batch_size)
    nlls, tokens = zip(*direct_nlls(base, load_rows(str(rows_with_pictures)), lm.processor), strict=True)
    assert len(set(tokens)) > 1
    assert measured["metrics"]["nll"]["value"] == pytest.approx(sum(nlls) / sum(tokens), rel=1e-5)


def test_an_answer_to_images_is_scored_where_tuning_has_it(internvl, rows_with_pictures, tmp_path):
    spec = find_task(str(write_task("image_nll", rows_with_pictures, tmp_path / "loss.yaml")), Inputs())
    model, processor = load_system(internvl, None, images=True)
    role, before = "<{{ message['role'] }}>", "{% if message['role'] == 'assistant' and loop.last %}<unk>{% endif %}"
    processor.chat_template = processor.chat_template.replace(role, role + before)
    (scored,) = run_tasks(model, processor, load_task(spec))["tasks"].values()
    nlls, tokens = 0.0, 0
    for row in load_rows(str(rows_with_pictures)):
        sample = tokenized_row(row, processor)
        start = sample.completion_mask.index(1) + 1
        ids = torch.tensor(sample.input_ids)
        assert ids[start - 1] == processor.tokenizer.unk_token_id
        with torch.no_grad():
            logits = model(**sample.inputs(model.device)).logits[0, start - 1 : -2]
        nlls += torch.nn.functional.cross_entropy(logits.cpu(), ids[start:-1], reduction="sum").item()
        tokens += len(ids) - start - 1
    assert scored["metrics"]["nll"]["value"] == pytest.approx(nlls / tokens, rel=1e-5)


def test_a_choice_is_by_the_likelihood_of_each_answer(lm, base, rows_with_pictures, tmp_path, monkeypatch):
    task = write_task("image_choice", rows_with_pictures, tmp_path / "choice.yaml")
    (loaded,) = load_task(find_task(str(task), Inputs()))
    loaded.build_all_requests(apply_chat_template=True, chat_template=lm.apply_chat_template)
    passes, forward = [], lm.model.forward

    def counted(**inputs):
        passes.append(len(inputs["input_ids"]))
        return forward(**inputs)

    monkeypatch.setattr(lm.model, "forward", counted)
    likelihoods = [likelihood for likelihood, _ in lm.loglikelihood(loaded.instances)]
    rows = [json.loads(line) for line in rows_with_pictures.read_text().splitlines()]
    choices = COLOURS
    pairs = [
        {"images": row["images"], "messages": [row["messages"][0], {"role": "assistant", "content": choice}]}
        for row in rows
        for choice in choices
    ]
    every = load_rows(str(write_jsonl(rows_with_pictures.parent / "every.jsonl", pairs)))
    assert likelihoods == pytest.approx([-nll for nll, _ in direct_nlls(base, every, lm.processor)], rel=1e-5)
    starts = {tuple(lm.answer_ids(choice)[:-1]) for choice in choices}
    assert sum(passes) == len(starts) * len(rows)
    assert 1 < len(starts) < len(choices)  # those of one token share a pass
    assert max(passes) == 5
    best = [max(range(4), key=lambda i: likelihoods[4 * row + i]) for row in range(len(rows))]
    right = [choices[choice] == row["messages"][1]["content"] for choice, row in zip(best, rows, strict=True)]
    metrics = metrics_of(base, task)[0]["metrics"]
    assert metrics["acc"]["value"] == sum(right) / len(rows)
    assert 0 < sum(right) < len(rows)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """A LoRA on both towers that makes the model write different things of different pictures: both halves random."""
    return random_adapter(base, tmp_path_factory.mktemp("adapters") / "random")


def random_adapter(model_directory, directory):
    model = AutoModelForImageTextToText.from_pretrained(model_directory)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "fc2", "down_proj"]))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("batch_size", [*thorough(1), 5])
def test_what_is_written_is_what_generate_writes(batch_size, base, adapter, rows_with_pictures, tmp_path):
    shutil.copytree(rows_with_pictures.parent / "pictures", tmp_path / "pictures")
    rows = [json.loads(line) for line in rows_with_pictures.read_text().splitlines()]
    data = write_jsonl(tmp_path / "rows.jsonl", rows[5:11])  # of one picture, then of two
    task = write_task("image_question", data, tmp_path / "question.yaml")
    task.write_text(task.read_text().replace("max_gen_toks: 128", "max_gen_toks: 12"))
    _, samples = metrics_of(base, task, adapter, batch_size=batch_size)
    model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), adapter)
    processor = AutoProcessor.from_pretrained(base)
    for row, sample in zip(load_rows(str(data)), samples, strict=True):
        inputs = prompt_inputs(tokenized_row(row, processor))
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert sample["written"] == processor.tokenizer.decode(ids, skip_special_tokens=True)
    assert len({sample["written"] for sample in samples}) > 3  # and there are three questions


@pytest.mark.parametrize("form", ["messages", *thorough("prompt and completion")])
def test_tasks_of_text_run_on_a_model_of_images_too(form, base, tmp_path):
    rows = example_rows()[:5]
    if form == "messages":
        rows = [
            {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": "it runs."}]}
            for row in rows
        ]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    measured, _ = metrics_of(base, write_task("completion_nll", data, tmp_path / "text.yaml"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    nlls, tokens = zip(*direct_nlls(base, load_rows(str(data)), tokenizer), strict=True)
    assert measured["metrics"]["nll"]["value"] == pytest.approx(sum(nlls) / sum(tokens), rel=1e-5)


@pytest.mark.usefixtures("calls_here")
@pytest.mark.thorough
def test_systems_are_compared_on_tasks_of_both_kinds(internvl, rows_with_pictures, rows_file, tmp_path):
    adapter = random_adapter(internvl, tmp_path / "adapter")
    emulator, settings = tmp_path / "emulator", CompressSettings(samples=8, selection=4, ratio=0.6)
    compress_job(internvl, rows_with_pictures, emulator, settings).run()
    kinds = {"image_nll": rows_with_pictures, "image_choice": rows_with_pictures, "completion_nll": rows_file}
    tasks = [str(write_task(kind, data, tmp_path / f"{kind}.yaml")) for kind, data in kinds.items()]
    systems = canonical_systems(base=str(internvl), emulator=str(emulator), full_lora=adapter)
    results = evaluate(systems, tasks, tmp_path / "out", limit=5)
    assert results["tasks"] == {
        "image_nll": {"output_type": "loglikelihood", "rows": 5},
        "image_choice": {"output_type": "multiple_choice", "rows": 5},
        "completion_nll": {"output_type": "loglikelihood", "rows": 5},
    }
    for candidate in systems:
        for task in tasks:
            measured, _ = metrics_of(candidate.model, task, candidate.adapter, limit=5)
            for name, metric in measured["metrics"].items():
                value = results["systems"][candidate.name][f"{Path(task).stem}.{name}"]
                assert value == pytest.approx(metric["value"], rel=1e-5)
    nlls = [results["systems"][candidate.name]["image_nll.nll"] for candidate in systems]
    assert len({round(nll, 3) for nll in nlls}) == 3
    assert "| full_lora |" in (tmp_path / "out" / "table.md").read_text()


def test_another_picture_is_another_evaluation(rows_with_pictures, tmp_path):
    shutil.copytree(rows_with_pictures.parent / "pictures", tmp_path / "pictures")
    data = Path(shutil.copy(rows_with_pictures, tmp_path))
    task = str(write_task("image_nll", data, tmp_path / "task.yaml"))
    before = find_task(task, Inputs())
    assert find_task(task, Inputs()) == before
    shutil.copy(tmp_path / "pictures" / "blue.png", tmp_path / "pictures" / "red.png")
    assert find_task(task, Inputs()).digest != before.digest


def test_a_picture_that_changes_meanwhile_is_noticed(rows_with_pictures, tmp_path):
    shutil.copytree(rows_with_pictures.parent / "pictures", tmp_path / "pictures")
    data, inputs = Path(shutil.copy(rows_with_pictures, tmp_path)), Inputs()
    find_task(str(write_task("image_nll", data, tmp_path / "task.yaml")), inputs)
    inputs.verify()
    shutil.copy(tmp_path / "pictures" / "blue.png", tmp_path / "pictures" / "red.png")
    with pytest.raises(EmlocError, match=r"red\.png was changed while it was being read"):
        inputs.verify()


def test_pictures_are_beside_the_rows_of_one_directory(tmp_path):
    (tmp_path / "one").mkdir()
    rows = [tmp_path / "one" / "a.jsonl", tmp_path / "one" / ".." / "one" / "b.jsonl"]
    assert picture_directory(rows) == (tmp_path / "one").resolve()
    with pytest.raises(EmlocError, match="keep the files of one task in one directory"):
        picture_directory([*rows, tmp_path / "c.jsonl"])


def test_a_missing_picture_is_found_before_anything_runs(internvl, rows_with_pictures, tmp_path):
    shutil.copytree(rows_with_pictures.parent / "pictures", tmp_path / "pictures")
    data = Path(shutil.copy(rows_with_pictures, tmp_path))
    task = str(write_task("image_nll", data, tmp_path / "task.yaml"))
    (tmp_path / "pictures" / "green.png").unlink()
    with pytest.raises(EmlocError, match=r"rows\.jsonl, row 3: The image .*green\.png does not exist\. Paths are"):
        evaluate([system("base", internvl)], [task], tmp_path / "out")


def test_a_model_of_text_is_shown_no_images(tiny_model, rows_with_pictures, tmp_path):
    task = str(write_task("image_nll", rows_with_pictures, tmp_path / "task.yaml"))
    with pytest.raises(
        EmlocError, match=r"shows images, and .* \(base\) is of the family llama, which only reads text"
    ):
        evaluate([system("base", tiny_model)], [task], tmp_path / "out")
    with pytest.raises(EmlocError, match="family llama only read text"):
        load_system(tiny_model, None, images=True)


@pytest.mark.parametrize("places", ["", "<image><image>"])
def test_images_and_their_places_must_be_as_many(places, internvl, rows_with_pictures, tmp_path):
    task = write_task("image_nll", rows_with_pictures, tmp_path / "task.yaml")
    text = re.sub("doc_to_text: .*", f'doc_to_text: "{places}which?"', task.read_text())
    task.write_text(text)
    with pytest.raises(EmlocError, match=rf"has {places.count('>')} times <image>, .* 1 image\(s\): '{places}which"):
        metrics_of(internvl, task)


def test_a_model_without_a_processor_is_refused(internvl, tmp_path):
    shutil.copytree(internvl, tmp_path / "model")
    (tmp_path / "model" / "processor_config.json").unlink()
    with pytest.raises(EmlocError, match=r"The processor in .* cannot be loaded"):
        load_system(tmp_path / "model", None, images=True)
    load_system(tmp_path / "model", None)  # for tasks of text


def test_a_processor_without_a_chat_template_is_refused(internvl, rows_with_pictures, tmp_path):
    spec = find_task(str(write_task("image_nll", rows_with_pictures, tmp_path / "task.yaml")), Inputs())
    model, processor = load_system(internvl, None, images=True)
    processor.chat_template = None
    with pytest.raises(EmlocError, match="needs a chat template"):
        run_tasks(model, processor, load_task(spec))


def test_a_prompt_that_the_chat_template_refuses_is_one_error(internvl):
    model, processor = load_system(internvl, None, images=True)
    processor.chat_template = "{{ raise_exception('no system message') }}"
    with pytest.raises(EmlocError, match=r"refuses a prompt \(no system message\)\. If it takes"):
        ImageTextLM(model, tokenizer=processor).apply_chat_template([{"role": "system", "content": "be brief."}])


def test_a_prompt_that_does_not_fit_is_refused(lm):
    with pytest.raises(EmlocError, match=r"has \d+ tokens, but there is room for only 3\."):
        lm.tok_batch_multimodal_encode([f"ab {lm.image_token}."], [[Image.new("RGB", (8, 8))]], left_truncate_len=3)


def test_a_choice_among_too_many_answers_names_other_kinds_for_images(rows_with_pictures, tmp_path):
    shutil.copytree(rows_with_pictures.parent / "pictures", tmp_path / "pictures")
    rows = [conversation("which?", f"answer {n}") | {"images": ["pictures/red.png"]} for n in range(21)]
    with pytest.raises(EmlocError, match=r"21 different answers; .* Choose image_question or image_nll\."):
        write_task("image_choice", write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "task.yaml")


@pytest.mark.parametrize("kind", ["completion_nll", "choice"])
def test_rows_with_images_are_of_other_kinds(kind, rows_with_pictures, rows_file, tmp_path):
    with pytest.raises(
        EmlocError, match=f"with images, and {kind} is not a kind .* image_choice, image_nll, image_quest"
    ):
        write_task(kind, rows_with_pictures, tmp_path / "task.yaml")
    with pytest.raises(EmlocError, match=r"without images, and image_nll is not a kind .* choice, completion_nll, gen"):
        write_task("image_nll", rows_file, tmp_path / "task.yaml")
