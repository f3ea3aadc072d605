"""Samples hold exactly the tokens that TRL would train on, and rows that cannot be used are named."""

import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from support.rows import example_rows
from tokenizers import normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from emloc_core.data.rows import Row
from emloc_core.data.tokenize import Limits, Sample, encode, load_tokenizer
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
    assert [sample.row for sample in samples] == [row.number for row in rows]
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
    inputs = Sample([5, 6, 7], [0, 1, 1], row=1).inputs("cpu")
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
    with pytest.raises(EmlocError, match="Row 1: the tokenizer leaves nothing"):
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
    with pytest.raises(EmlocError, match=r"Row 1: .*rejects it \(roles must alternate\)"):
        encode(CHATS, tokenizer)


def test_a_model_without_a_tokenizer_is_refused(tiny_model, tmp_path):
    shutil.copy(tiny_model / "config.json", tmp_path)
    with pytest.raises(EmlocError) as caught:
        load_tokenizer(tmp_path)
    assert caught.value.code == "missing"
