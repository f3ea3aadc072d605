"""Talking to a model: by command, from Python, with an adapter, with images, and without a chat template."""

import io
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from emloc_internvl import INTERNVL
from emloc_qwen import QWEN_VL
from support.adapters import make_adapter
from support.marks import thorough
from support.models import CHAT_TEMPLATE, THINKING_TEMPLATE
from support.vision_models import internvl_processor, picture, qwen_processor, save_model
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

import emloc_core
from emloc_core.data.rows import load_rows
from emloc_core.errors import EmlocError
from emloc_core.evaluation.answers import answers

GREEDY = {"temperature": 0, "max_new_tokens": 8}


def greedy(directory, messages, **options):
    """What transformers alone answers."""
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)
    settings = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt", **options}
    inputs = tokenizer.apply_chat_template(messages, **settings)
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_answers_are_those_of_transformers_and_turns_are_remembered(shallow_model):
    conversation = emloc_core.chat(shallow_model, system="be short", **GREEDY)
    pieces = []
    first = conversation.say("animal: cat", write=pieces.append)
    start = [{"role": "system", "content": "be short"}, {"role": "user", "content": "animal: cat"}]
    assert first == greedy(shallow_model, start) != ""
    assert "".join(pieces).strip() == first
    second = conversation.say("colour: red")
    turns = [*start, {"role": "assistant", "content": first}, {"role": "user", "content": "colour: red"}]
    assert second == greedy(shallow_model, turns)
    conversation.reset()
    assert conversation.say("animal: cat") == first


def test_what_the_template_writes_before_an_answer_is_not_said(shallow_model, tmp_path):
    first = emloc_core.chat(shallow_model, **GREEDY).say("animal: cat")
    model = shutil.copytree(shallow_model, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    start = first[: len(first) // 2]
    tokenizer.chat_template = THINKING_TEMPLATE.replace("thought. ", start)
    tokenizer.save_pretrained(model)
    conversation, pieces = emloc_core.chat(model, **GREEDY), []
    assert conversation.say("animal: cat", write=pieces.append) == first.removeprefix(start).strip()
    assert "".join(pieces).strip() == conversation.messages[-1]["content"] != first
    for start in ("other words", first[:3] + "?"):
        conversation.processing.chat_template = THINKING_TEMPLATE.replace("thought. ", start)
        conversation.reset()
        assert conversation.say("animal: cat") == first


def test_a_question_ends_where_a_tuned_answer_begins(shallow_model):
    """Not with the start of thoughts, by which some templates ask and which they leave out before an answer."""
    conversation = emloc_core.chat(shallow_model, **GREEDY)
    expected = conversation.say("animal: cat")
    conversation.processing.chat_template = CHAT_TEMPLATE.replace("<assistant>", "<assistant><system>")
    conversation.reset()
    assert conversation.say("animal: cat") == expected


def test_a_tokenizer_may_tell_types_of_tokens(shallow_model):
    conversation = emloc_core.chat(shallow_model, **GREEDY)
    expected = conversation.say("animal: cat"), conversation.continue_text("animal: cat")
    conversation.reset()
    conversation.processing.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    assert (conversation.say("animal: cat"), conversation.continue_text("animal: cat")) == expected


def test_the_command_writes_the_answers_to_the_lines_of_stdin(emloc, shallow_model, monkeypatch, capsys):
    expected = [greedy(shallow_model, [{"role": "user", "content": text}]) for text in ("animal: cat", "animal: dog")]
    monkeypatch.setattr("sys.stdin", io.StringIO("animal: cat\n/reset\n\nanimal: dog\n/exit\nanimal: cow\n"))
    capsys.readouterr()  # what was loaded above showed bars
    code, out, err = emloc("chat", shallow_model, "--temperature", "0", "--max-new-tokens", "8")
    assert (code, err) == (0, "")  # no bars of libraries without a terminal
    assert [line.strip() for line in out.splitlines()] == expected


def test_lines_may_come_from_another_system(emloc, shallow_model, monkeypatch):
    calls = []
    monkeypatch.setattr("emloc_core.evaluation.conversation.Conversation.say", lambda *args: calls.append(args[1:3]))
    lines = b"caf\xe9\r\n/image ~no one/x.png\r\nb\r\n/exit\r\nc\r\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines), "utf-8", newline="\n"))
    assert emloc("chat", shallow_model)[0] == 0
    assert calls == [("caf\ufffd", []), ("b", [Path("~no one/x.png")])]


def test_an_adapter_names_its_model(shallow_model, tmp_path):
    adapter = make_adapter(shallow_model, tmp_path / "adapter", size=0.5)
    alone = emloc_core.chat(adapter, **GREEDY).say("animal: cat")
    assert alone == emloc_core.chat(shallow_model, adapter, **GREEDY).say("animal: cat")
    assert alone != emloc_core.chat(shallow_model, **GREEDY).say("animal: cat")


def test_an_adapter_of_another_model_is_said(shallow_model, tmp_path, capsys):
    adapter = make_adapter(shallow_model, tmp_path / "adapter")
    other = AutoModelForCausalLM.from_pretrained(shutil.copytree(shallow_model, tmp_path / "other"))
    emloc_core.chat(tmp_path / "other", adapter)  # a copy
    assert "warning" not in capsys.readouterr().err
    other.model.layers[0].mlp.up_proj.weight.data[0] += 1
    other.save_pretrained(tmp_path / "other")
    emloc_core.chat(tmp_path / "other", adapter)
    assert f"{adapter} was made for {shallow_model}, which is not {tmp_path / 'other'}" in capsys.readouterr().err
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/moved"}))
    emloc_core.chat(tmp_path / "other", adapter)
    assert "warning" not in capsys.readouterr().err


def test_rows_are_answered_with_their_tools_and_expect_calls(shallow_model, tmp_path):
    model = shutil.copytree(shallow_model, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}" + tokenizer.chat_template
    tokenizer.save_pretrained(model)
    messages, tools = [{"role": "user", "content": "animal: cat"}], [{"type": "function", "function": {"name": "look"}}]
    called = {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": {"at": "Käfer"}}}]}
    rows = load_rows([{"messages": [*messages, called], "tools": tools}])
    (answer,) = answers(str(model), make_adapter(model, tmp_path / "adapter"), rows, 8)
    assert answer["expected"] == '{"name": "look", "arguments": {"at": "Käfer"}}'
    assert answer["before"] == greedy(model, messages, tools=tools) != greedy(model, messages)


def test_without_a_chat_template_text_is_continued(shallow_model, tmp_path):
    model = shutil.copytree(shallow_model, tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    conversation = emloc_core.chat(model, **GREEDY)
    first = conversation.say("animal: cat, colour: red. sentence:")
    assert conversation.say("animal: cat, colour: red. sentence:") == first  # nothing is remembered
    with pytest.raises(EmlocError, match="no chat template"):
        emloc_core.chat(model, system="be short")


def test_what_a_terminal_acts_on_is_escaped(emloc, shallow_model, monkeypatch):
    def say(*args):
        args[-1]("a\x1b[2Jb\n")

    monkeypatch.setattr("emloc_core.evaluation.conversation.Conversation.say", say)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    assert emloc("chat", shallow_model)[1] == "a\\x1b[2Jb\n\n"


def test_an_answer_that_was_stopped_does_not_make_an_interruption_of_a_later_error(emloc, shallow_model, monkeypatch):
    def say(_, text, *__):
        if text == "first":
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(600)
        raise EmlocError("There is no such image.")

    monkeypatch.setattr("emloc_core.evaluation.conversation.Conversation.say", say)
    monkeypatch.setattr("sys.stdin", io.StringIO("first\nsecond\n"))
    code, out, err = emloc("chat", shallow_model)
    assert (code, out) == (1, " ...\n")
    assert err.splitlines()[-1] == "emloc: error: There is no such image."


def test_images_are_for_models_that_read_them(shallow_model, tmp_path):
    with pytest.raises(EmlocError, match="reads no images"):
        emloc_core.chat(shallow_model).say("what is it?", [tmp_path / "image.png"])


def test_a_conversation_that_is_too_long_is_refused_and_forgotten(shallow_model):
    conversation = emloc_core.chat(shallow_model, **GREEDY)
    with pytest.raises(EmlocError, match=r"The conversation has \d+ tokens"):
        conversation.say("cat " * 400)
    assert conversation.messages == []


@pytest.mark.parametrize(
    ("family", "kind", "make"),
    [(INTERNVL, "internvl", internvl_processor), *thorough((QWEN_VL, "qwen2_5_vl", qwen_processor))],
    ids=["internvl", "qwen-vl"],
)
def test_pictures_are_shown_as_the_processor_shows_them(tmp_path, family, kind, make):
    processor = make()
    model = save_model(tmp_path / "model", family, kind, processor)
    image = tmp_path / "image.png"
    picture(["red", "blue"]).save(image)
    first = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "which colours?"}]}
    conversation = emloc_core.chat(model, **GREEDY)
    answer = conversation.say("which colours?", [image])
    second = conversation.say("which is first?")

    loaded = AutoModelForImageTextToText.from_pretrained(model)

    def answer_to(messages):
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = processor(text=[text], images=[picture(["red", "blue"])], return_tensors="pt")
        output = loaded.generate(**inputs, max_new_tokens=8, do_sample=False)
        return processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    def turn(role, text):
        return {"role": role, "content": [{"type": "text", "text": text}]}

    assert answer == answer_to([first])
    assert second == answer_to([first, turn("assistant", answer), turn("user", "which is first?")])
