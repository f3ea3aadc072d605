"""Conversations are tokenized in parts, and what a prompt has in common with its answer is the same."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from emloc_core.data.starts import common_prefix, tokenized_with_starts

CORPUS = [
    "the cat sat on the mat, and it's 3.14 o'clock",
    "a naïve 日本語 text\n\nwith  two  spaces",
    "foo_bar(x) = 1",
] * 9
WORDS = [*" ".join(CORPUS[:3]).split(" "), "\n", "\t", "é", "👍", "<end>", "abc abc", "1 2"]
EDGES = st.sampled_from(["", " ", "  ", "\n", " \n", ":"])
TEXTS = st.builds(
    lambda words, between, edge: between.join(words) + edge,
    st.lists(st.sampled_from(WORDS), max_size=12),
    st.sampled_from([" ", " ", "  ", ""]),
    EDGES,
)


def byte_level(**options):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(**options)
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    return tokenizer, trainer


def sentence_piece(scheme):
    """As in Llama 2: no splitting at all, a space is a letter, and one is put first."""
    tokenizer = Tokenizer(models.BPE(unk_token="?"))
    first = [] if scheme == "never" else [normalizers.Prepend("▁")]
    tokenizer.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])
    return tokenizer, trainers.BpeTrainer(vocab_size=250, special_tokens=["?"])  # "the▁cat" becomes a token


def without_spaces():
    """No space is known, and all that is unknown in a row is one token."""
    tokenizer = Tokenizer(models.BPE(unk_token="?", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "★")
    return tokenizer, trainers.BpeTrainer(special_tokens=["?"], initial_alphabet=[], limit_alphabet=9)


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    return tokenizer, trainers.UnigramTrainer(vocab_size=120, special_tokens=["?"], unk_token="?")


def word_piece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="?"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer, trainers.WordPieceTrainer(vocab_size=120, special_tokens=["?"])


@pytest.fixture(scope="module")
def tokenizers():
    pairs = [byte_level(add_prefix_space=False), byte_level(add_prefix_space=True), sentence_piece("first"),
            sentence_piece("never"), without_spaces(), unigram(), word_piece()]  # fmt: skip
    for tokenizer, trainer in pairs:
        tokenizer.train_from_iterator(CORPUS, trainer)
        tokenizer.add_special_tokens(
            ["<end>", AddedToken("<left>", lstrip=True), AddedToken("<right>", rstrip=True),
             AddedToken("<word>", single_word=True)]
        )  # fmt: skip
    return [PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?") for tokenizer, _ in pairs]


TURNS = st.lists(st.tuples(st.sampled_from(["<end>", "<left>", "<right>", "<word>"]), TEXTS).map("".join), max_size=4)
CONVERSATIONS = st.builds(lambda text, turns, edge: "".join([text, *turns, edge]), TEXTS, TURNS, EDGES)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(CONVERSATIONS, CONVERSATIONS, CONVERSATIONS), min_size=1, max_size=3))
def test_conversations_are_tokenized_in_parts_as_they_are_whole(tokenizers, rows):
    prompts = [prompt for prompt, *answers in rows for _ in answers]
    texts = [prompt + answer for prompt, *answers in rows for answer in answers]
    for tokenizer in tokenizers:
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        starts = map(common_prefix, tokenizer(prompts, add_special_tokens=False)["input_ids"], ids)
        encoded = tokenized_with_starts(prompts, texts, tokenizer)
        assert encoded == list(zip(ids, starts, strict=True)), tokenizer.backend_tokenizer.model


def test_a_tokenizer_that_is_saved_cutting_cuts_nothing():
    tokenizer, prompt = tiny_tokenizer(), "<user>the red cat<assistant>"
    texts = [prompt], [f"{prompt}runs and runs"]
    expected = tokenized_with_starts(*texts, tokenizer)
    tokenizer.backend_tokenizer.enable_truncation(2)
    assert tokenized_with_starts(*texts, tokenizer) == expected
