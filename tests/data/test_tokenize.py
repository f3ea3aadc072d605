"""Samples hold exactly the tokens that TRL would train on, and rows that cannot be used are named."""

import copy
import re
import shutil
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.models import CHAT_TEMPLATE
from support.rows import example_rows
from tokenizers import normalizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from emloc_core.data.chat_template import answer_render, encode_conversation, encode_conversations, lead, question
from emloc_core.data.limits import Limits
from emloc_core.data.row import Row
from emloc_core.data.rows import load_rows
from emloc_core.data.tokenize import Sample, encode, load_tokenizer
from emloc_core.errors import EmlocError

STRINGS = [Row(number, **row) for number, row in enumerate(example_rows()[:5], start=1)]
STRINGS += [
    Row(6, prompt="a red c", completion="at runs."),  # a token merges over the boundary
    Row(7, prompt="animal: fox", completion=" a fox.</s>"),  # ends in the end-of-sequence token already
    Row(8, prompt="what? ", completion="ÄÖ unknown"),
]
TEXTS = [Row(1, text="a red cat runs."), Row(2, text="the end.</s>"), Row(3, text="x")]
CHATS = [
    Row(
        1,
        prompt=[{"role": "user", "content": "which cat?"}],
        completion=[{"role": "assistant", "content": "a red cat."}],
    ),
    Row(
        2,
        prompt=[{"role": "system", "content": "be brief."}, {"role": "user", "content": "which cat?"}],
        completion=[{"role": "assistant", "content": "the grey cat."}],
    ),
]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model)


def of_trl(rows: list[Row], tiny_model: Path, tmp_path: Path, max_length: int | None) -> list[tuple[list[int], list]]:
    """What SFTTrainer trains on: ids, and 1 where a token has a label."""
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(tiny_model),
        args=SFTConfig(output_dir=str(tmp_path), max_length=max_length, use_cpu=True, bf16=False, report_to="none"),
        train_dataset=Dataset.from_list([row.to_dict() for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(tiny_model),
    )
    dataset = trainer.train_dataset
    return [(row["input_ids"], [int(label != -100) for label in row["labels"]]) for row in dataset]


@pytest.mark.parametrize(
    ("rows", "max_length"),
    [(STRINGS, None), (TEXTS, None), (CHATS, None), (STRINGS, 10), (TEXTS, 3), (CHATS, 24)],
    ids=["strings", "texts", "chats", "cut strings", "cut texts", "cut chats"],
)
def test_samples_equal_what_trl_trains_on(rows, max_length, tokenizer, tiny_model: Path, tmp_path: Path):
    samples = encode(rows, tokenizer, max_length, Limits(256))
    expected = of_trl(rows, tiny_model, tmp_path, max_length)
    assert [(sample.input_ids, sample.completion_mask) for sample in samples] == expected
    assert [sample.row for sample in samples] == [row.name for row in rows]
    if max_length:  # some are cut, to just that length
        assert max(len(sample.input_ids) for sample in samples) == max_length
        assert max(len(sample.input_ids) for sample in encode(rows, tokenizer)) > max_length


def test_the_loss_falls_on_the_completion_alone(tokenizer):
    (sample,) = encode([Row(1, prompt="animal: cat.", completion=" a cat.")], tokenizer)
    counted = [token for token, mask in zip(sample.input_ids, sample.completion_mask, strict=True) if mask]
    assert tokenizer.decode(counted) == "a cat.</s>"
    (sample,) = encode([Row(1, text="a cat.")], tokenizer)
    assert sample.completion_mask == [1] * len(sample.input_ids)


def test_inputs_are_one_sequence_of_int64():
    inputs = Sample([5, 6, 7], [0, 1, 1], row="Row 1").inputs("cpu")
    assert torch.equal(inputs["input_ids"], torch.tensor([[5, 6, 7]]))
    assert torch.equal(inputs["attention_mask"], torch.ones(1, 3, dtype=torch.int64))
    assert inputs["input_ids"].dtype == torch.int64


def test_a_row_beyond_the_models_limit_is_named_unless_cut(tokenizer):
    rows = [Row(1, text="cat"), Row(17, text="cat " * 30)]
    (length,) = {len(sample.input_ids) for sample in encode(rows[1:], tokenizer)}
    with pytest.raises(EmlocError, match=f"Row 17 has {length} tokens, but the model takes {length - 1}"):
        encode(rows, tokenizer, limits=Limits(length - 1))
    assert len(encode(rows, tokenizer, max_length=8, limits=Limits(length - 1))[1].input_ids) == 8
    with pytest.raises(EmlocError, match="Row 17"):
        encode(rows, tokenizer, max_length=length, limits=Limits(length - 1))


def test_a_model_without_a_limit_takes_rows_of_any_length():
    """A config says -1 where positions are relative."""
    assert Limits.for_config(AutoConfig.for_model("xlnet")).tokens is None


def test_a_tokenizer_that_knows_more_ids_than_the_model_is_refused(tokenizer):
    (sample,) = encode([Row(1, text="cat")], tokenizer)
    largest = max(sample.input_ids)
    assert encode([Row(1, text="cat")], tokenizer, limits=Limits(vocabulary=largest + 1)) == [sample]
    with pytest.raises(EmlocError, match=f"gives the id {largest}, but the model has {largest} ids"):
        encode([Row(1, text="cat")], tokenizer, limits=Limits(vocabulary=largest))


@pytest.mark.parametrize(
    "content",
    ['{"a":' * 100_000 + "1" + "}" * 100_000, '{"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": []}'],
    ids=["deep", "no number"],
)
@pytest.mark.usefixtures("uncollected")
def test_a_tokenizer_that_transformers_stumbles_over_is_refused(tiny_model, tmp_path, content):
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model" / "tokenizer_config.json").write_text(content)
    with pytest.raises(EmlocError, match="The tokenizer in "):
        load_tokenizer(tmp_path / "model")


def test_a_completion_that_truncation_cuts_away_is_an_error(tokenizer):
    row = Row(3, prompt="animal: cat, colour: red. sentence:", completion=" a cat.")
    with pytest.raises(EmlocError, match="Row 3: its prompt alone fills the 4 tokens"):
        encode([row], tokenizer, max_length=4)


def test_a_row_that_the_tokenizer_makes_nothing_of_is_an_error(tokenizer):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer.name_or_path, eos_token="", unk_token=None)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("cat", "")
    with pytest.raises(EmlocError, match="Row 1: the tokenizer leaves no tokens"):
        encode([Row(1, text="cat")], tokenizer)


def test_a_tokenizer_without_end_or_template_is_an_error(tiny_model: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.eos_token = None
    with pytest.raises(EmlocError, match="no end-of-sequence token"):
        encode(TEXTS, tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(EmlocError, match=r"Row 1 is a conversation.*no chat template"):
        encode(CHATS, tokenizer)


def test_a_conversation_that_the_template_refuses_is_named(tiny_model: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(EmlocError, match=r"Row 1: .*rejects it \(roles must alternate\)\. The roles are"):
        encode(CHATS, tokenizer)


def test_a_model_without_a_tokenizer_is_refused(tiny_model, tmp_path):
    shutil.copy(tiny_model / "config.json", tmp_path)
    with pytest.raises(EmlocError) as caught:
        load_tokenizer(tmp_path)
    assert caught.value.code == "missing"


# Conversations of several turns, and tools

TURNS = [
    {"role": "user", "content": "which cat?"},
    {"role": "assistant", "content": "a red cat."},
    {"role": "user", "content": "and which dog?"},
    {"role": "assistant", "content": "the grey dog."},
]
#: As the tiny template; with what the assistant says marked for transformers.
MARKED = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}{% else %}{{ message['content'] }}"
    "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
#: A last answer is rendered with a thought before it, as Qwen3 does.
THINKING = (
    "{% for message in messages %}<{{ message['role'] }}>{% if loop.last and message['role'] == 'assistant' %}"
    "well, {% endif %}{{ message['content'] }}{{ END }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TOOLS = (
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{% for message in messages %}<{{ message['role'] }}>"
    "{{ message['content'] }}{% for call in message['tool_calls'] or [] %}{{ call | tojson }}{% endfor %}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"place": "oslo"}}}
WITH_TOOLS = {
    "tools": [WEATHER],
    "messages": [
        {"role": "user", "content": "rain?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "weather", "content": "wet"},
        {"role": "assistant", "content": "it rains."},
    ],
}


def with_template(tokenizer: PreTrainedTokenizerBase, template: str) -> PreTrainedTokenizerBase:
    changed = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    changed.chat_template = template
    return changed


def counted(tokenizer: PreTrainedTokenizerBase, row: dict, loss="all") -> list[str]:
    """The texts that count in the loss, one for every stretch of tokens."""
    (sample,) = encode(load_rows([row], loss=loss), tokenizer)
    stretches = [[]]
    for token, mask in zip(sample.input_ids, sample.completion_mask, strict=True):
        stretches[-1].append(token) if mask else stretches.append([])
    return [tokenizer.decode(stretch) for stretch in stretches if stretch]


@pytest.mark.parametrize("template", [None, MARKED, THINKING.replace("END", "eos_token")])
def test_all_answers_count_where_asked(template, tokenizer):
    tokenizer = with_template(tokenizer, template or tokenizer.chat_template)
    last = "well, the grey dog.</s>" if template and "well" in template else "the grey dog.</s>"
    assert counted(tokenizer, {"messages": TURNS}) == ["a red cat.</s>", last]
    assert counted(tokenizer, {"messages": TURNS}, "last") == [last]
    assert counted(tokenizer, {"messages": TURNS[:2]}) == counted(tokenizer, {"messages": TURNS[:2]}, "last")
    assert counted(tokenizer, {"prompt": "cat", "completion": "dog"}) == counted(
        tokenizer, {"prompt": "cat", "completion": "dog"}, "last"
    )


@pytest.mark.parametrize(
    ("name", "end"),
    [("qwen2_5", "<|im_end|>"), ("qwen3", "<|im_end|>"), ("llama3_2", "<|eot_id|>"), ("phi3", "<|end|>"),
     ("gemma3", "<end_of_turn>"), ("gptoss", "<|return|>"), ("qwen3_5_think", "<|im_end|>")],
)  # fmt: skip
def test_answers_are_found_in_templates_of_real_models(name, end, tokenizer):
    template = files("trl") / "chat_templates" / f"{name}.jinja"
    tokenizer = with_template(tokenizer, template.read_text("utf-8"))
    tokenizer.add_special_tokens({"eos_token": end})
    if name in ("gptoss", "qwen3_5_think"):
        with pytest.raises(EmlocError, match="renders message 2 differently"):
            counted(tokenizer, {"messages": TURNS})
        return
    first, last = counted(tokenizer, {"messages": TURNS})
    assert first.replace(end, "", 1).replace("<unk>", "").strip() == "a red cat."
    assert last.partition(end)[0].endswith("the grey dog.")


@pytest.mark.parametrize(
    ("name", "written"),
    [("qwen3", "<think>\n\n</think>\n\n"), ("qwen3_5_think", "\n</think>\n\n"), ("llama3_2", ""),
     ("gptoss", "<|channel|>final<|message|>"), ("deepseekv3", "")],
)  # fmt: skip
def test_what_real_templates_write_before_an_answer(name, written, tokenizer):
    template = files("trl") / "chat_templates" / f"{name}.jinja"
    tokenizer = with_template(tokenizer, template.read_text("utf-8"))

    def render(messages, for_answer):
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=for_answer, continue_final_message=not for_answer
        )

    prompt = render(TURNS[:1], True)
    for answer in ("a red cat.", "?", "i"):
        assert lead(prompt, TURNS[:1], render, answer) == written
    if name.startswith("qwen3"):  # which tells thoughts in an answer from the rest of it
        assert lead(prompt, TURNS[:1], render, "<think>\nwell\n</think>\n\ncat") == ""


@pytest.mark.parametrize(
    ("name", "ends", "written"),
    [("deepseekv3", "<\uff5cAssistant\uff5c>", ""), ("nemotron_3_nano", "<think>", "</think>"),
     ("qwen3", "assistant\n", "<think>\n\n</think>\n\n"), ("llama3_2", "<|end_header_id|>\n\n", "")],
)  # fmt: skip
def test_a_question_ends_where_a_tuned_answer_begins(name, ends, written, tokenizer):
    template = (files("trl") / "chat_templates" / f"{name}.jinja").read_text("utf-8")
    tokenizer = with_template(tokenizer, template)
    tokenizer.add_tokens([*set(re.findall(r"</?\w+>|<\W\w+\W>", template)), "\n"])
    prompt = question(TURNS[:1], answer_render(tokenizer), tokenizer)
    assert prompt.endswith(ends)
    assert lead(prompt, TURNS[:1], answer_render(tokenizer)) == written
    (counts,) = counted(tokenizer, {"messages": TURNS[:2]}, "last")
    assert counts.startswith(written)
    assert counts.removeprefix(written).lstrip().startswith("a red cat.")


def test_a_greeting_is_no_answer(tokenizer):
    greeting = {"role": "assistant", "content": "hello."}
    assert counted(tokenizer, {"messages": [greeting, *TURNS]}) == ["a red cat.</s>", "the grey dog.</s>"]


def test_all_answers_equal_what_trl_trains_on(tiny_model: Path, tmp_path: Path):
    shutil.copytree(tiny_model, tmp_path / "model")
    with_template(AutoTokenizer.from_pretrained(tiny_model), MARKED).save_pretrained(tmp_path / "model")
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(tiny_model),
        args=SFTConfig(str(tmp_path / "out"), assistant_only_loss=True, use_cpu=True, bf16=False, report_to="none"),
        train_dataset=Dataset.from_list([{"messages": TURNS}, {"messages": TURNS[:2]}]),
        processing_class=AutoTokenizer.from_pretrained(tmp_path / "model"),
    )
    expected = [(row["input_ids"], [int(label != -100) for label in row["labels"]]) for row in trainer.train_dataset]
    rows = load_rows([{"messages": TURNS}, {"messages": TURNS[:2]}], loss="all")
    for directory in (tmp_path / "model", tiny_model):  # by the template's marks, and without
        samples = encode(rows, AutoTokenizer.from_pretrained(directory))
        assert [(sample.input_ids, sample.completion_mask) for sample in samples] == expected


def test_a_template_that_does_not_show_where_answers_end_is_refused(tokenizer):
    only_last = "(eos_token if loop.last or message['role'] == 'user' else '.')"
    for end in ("'.'", only_last):
        with pytest.raises(EmlocError, match=r"Row 1: .*renders message 2 differently.*--loss last"):
            counted(with_template(tokenizer, THINKING.replace("END", end)), {"messages": TURNS})


def test_tools_go_through_the_models_template(tokenizer):
    tokenizer = with_template(tokenizer, TOOLS)
    (sample,) = encode(load_rows([WITH_TOOLS]), tokenizer)
    messages, tools = WITH_TOOLS["messages"], WITH_TOOLS["tools"]
    assert sample.input_ids == tokenizer.apply_chat_template(messages, tools=tools)["input_ids"]
    assert counted(tokenizer, WITH_TOOLS, "last") == ["it rains.</s>"]
    first, last = counted(tokenizer, WITH_TOOLS)
    assert "weather" in first
    assert "oslo" in first
    assert last == "it rains.</s>"


@pytest.mark.parametrize(
    ("left_out", "template"),
    [
        ("tools", TOOLS.replace("for tool in tools or []", "for tool in []")),
        ("tool calls", TOOLS.replace("message['tool_calls'] or []", "[]")),
        ("the answers of tools", TOOLS.replace("['content'] }}", "['content'] if message['role'] != 'tool' }}")),
    ],
)
def test_a_template_that_leaves_out_tools_is_refused(left_out, template, tokenizer):
    with pytest.raises(EmlocError, match=f"Row 1: the model's chat template leaves out {left_out}"):
        encode(load_rows([WITH_TOOLS]), with_template(tokenizer, template))


def test_rows_are_tokenized_together_as_each_by_itself(tokenizer):
    """Also where there are more rows than are taken at once, and where one of them is refused."""
    several = CHATS * 150
    assert encode(several, tokenizer) == [encode([row], tokenizer)[0] for row in several]
    refused = Row(301, prompt=[{"role": "user", "content": "a?"}], completion=[{"role": "tool", "content": "b."}])
    tokenizer = with_template(
        tokenizer,
        "{% for message in messages %}{{ raise_exception('no tools') if message.role == 'tool' else message.content }}"
        "{% endfor %}",
    )
    with pytest.raises(EmlocError, match=r"Row 301: .*rejects it \(no tools\)"):
        encode([*several, refused], tokenizer)


PIECES = st.sampled_from(["a", "b", " ", ".", "<", "<user>", "<assistant>", "</s>", "<s>"])
ASKED = st.lists(st.lists(PIECES, min_size=1, max_size=8).map("".join), min_size=2, max_size=4)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns=ASKED, greeting=st.sampled_from(["", "<assistant>", "<assistant> so: ", "so: "]))
def test_answers_start_where_whole_prompts_end(tokenizer, turns, greeting):
    """As TRL finds it, which tokenizes the whole prompt once more; also where rows hold special tokens."""
    roles = ("user", "assistant")
    messages = [{"role": roles[index % 2], "content": turn} for index, turn in enumerate(turns)]
    rows = [Row(1, prompt=messages[:-1], completion=[{"role": "assistant", "content": messages[-1]["content"]}])]
    other = copy.copy(tokenizer)
    other.chat_template = CHAT_TEMPLATE.replace("<assistant>", greeting)
    (encoded,) = encode_conversations(rows, other)
    ids, mask = encode_conversation(rows[0], other)
    assert encoded == (ids, mask)
