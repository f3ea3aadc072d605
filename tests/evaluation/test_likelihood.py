"""Likelihoods of answers, from the logits of few positions: beside lm-eval's, which takes those of whole rows."""

import functools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from emloc_core.data.tokenize import logits_at
from emloc_core.errors import EmlocError
from emloc_core.evaluation.likelihood import likelihoods
from emloc_core.evaluation.text_lm import TextLM


@pytest.fixture(scope="module")
def loaded(shallow_model):
    model = AutoModelForCausalLM.from_pretrained(shallow_model, dtype="float32")
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    return model.eval(), AutoTokenizer.from_pretrained(shallow_model)


def requests(pairs):
    return [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]


PROMPTS = ["what is two and three?", "name a colour", "add one to nine, then two more. what is it?", ""]
CHOICES = [" five", " red", " it is twelve, or so I think", " x", " y", " z"]


@pytest.mark.parametrize("max_length", [None, 40])
def test_likelihoods_are_those_of_lm_eval(max_length, loaded):
    model, tokenizer = loaded
    pairs = [(prompt, choice) for prompt in PROMPTS for choice in CHOICES]
    random.Random(0).shuffle(pairs)
    own, peer = (kind(model, tokenizer=tokenizer, batch_size=3, max_length=max_length) for kind in (TextLM, HFLM))
    scored, expected = own.loglikelihood(requests(pairs)), peer.loglikelihood(requests(pairs))
    assert [one for one, _ in scored] == pytest.approx([one for one, _ in expected], rel=1e-5)
    assert [greedy for _, greedy in scored] == [greedy for _, greedy in expected]
    assert len({round(one, 3) for one, _ in scored}) > 20  # of 24


def test_an_answer_that_the_model_would_give_is_recognised(loaded):
    model, tokenizer = loaded
    lm = TextLM(model, tokenizer=tokenizer, batch_size=2)
    prompt = tokenizer.encode("name a colour", return_tensors="pt")
    written = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4,
                             do_sample=False)[0, prompt.shape[1] :].tolist()  # fmt: skip
    other = [*written[:-1], (written[-1] + 1) % 10]
    pairs = [(prompt[0].tolist(), answer) for answer in (written, other)]
    assert [greedy for _, greedy in lm.score(pairs)] == [True, False]


def test_only_the_logits_of_answers_are_computed(loaded, monkeypatch):
    model, tokenizer = loaded
    lm = TextLM(model, tokenizer=tokenizer, batch_size=4)
    shapes, forward = [], model.get_base_model().lm_head.forward

    def head(hidden):
        shapes.append(hidden.shape[:2])
        assert hidden.is_contiguous()  # of a slice, the product would copy the weight for each row
        return forward(hidden)

    monkeypatch.setattr(model.get_base_model().lm_head, "forward", head)
    lm.loglikelihood(requests([(PROMPTS[2] * 4, choice) for choice in CHOICES[:3]]))
    longest = max(len(tokenizer.encode(PROMPTS[2] * 4 + choice)) for choice in CHOICES[:3])
    ((rows, positions),) = shapes
    assert rows == 3
    assert positions < longest / 2


def test_a_model_that_cannot_leave_out_logits_returns_all(loaded, monkeypatch):
    model, tokenizer = loaded
    lm = TextLM(model, tokenizer=tokenizer, batch_size=4)
    pairs = [(prompt, choice) for prompt in PROMPTS for choice in CHOICES]
    expected = lm.loglikelihood(requests(pairs))
    base = model.get_base_model()
    inputs, positions = {"input_ids": torch.tensor([[1, 2, 3, 4]])}, torch.tensor([0, 2])
    chosen, forward = logits_at(model, inputs, positions), base.forward

    def without(input_ids=None, use_cache=None, **_):
        return forward(input_ids=input_ids, use_cache=use_cache)

    monkeypatch.setattr(base, "forward", without)
    torch.testing.assert_close(logits_at(model, inputs, positions), chosen)
    scored = lm.loglikelihood(requests(pairs))
    assert [one for one, _ in scored] == pytest.approx([one for one, _ in expected], rel=1e-5)


def test_an_answer_longer_than_what_the_model_reads_is_refused(loaded):
    model, tokenizer = loaded
    lm = TextLM(model, tokenizer=tokenizer, max_length=4)
    with pytest.raises(EmlocError, match=r"An answer has \d+ tokens, but the model reads only 4"):
        lm.loglikelihood(requests([("name a colour", CHOICES[2])]))
    assert lm.loglikelihood([]) == []


@given(
    answers=st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 4), min_size=1, max_size=3)), max_size=12),
    batch_size=st.integers(1, 4),
)
@settings(deadline=None)
def test_answers_share_passes_and_keep_their_order(answers, batch_size):
    batches = []

    @functools.cache
    def logits(prompt, read):
        generator = torch.Generator().manual_seed(hash((prompt, read)) % 2**31)
        return torch.randn(len(read) + 1, 5, generator=generator)

    def predict(batch):
        batches.append([(prompt, *ids[:-1]) for prompt, ids in batch])
        return [logits(prompt, tuple(ids[:-1])) for prompt, ids in batch]

    scored = likelihoods(answers, batch_size, predict, size=lambda answer: len(answer[1]))
    for (prompt, ids), (likelihood, greedy) in zip(answers, scored, strict=True):
        rows = logits(prompt, tuple(ids[:-1])).log_softmax(-1)
        assert likelihood == pytest.approx(sum(row[i].item() for row, i in zip(rows, ids, strict=True)), rel=1e-5)
        assert greedy == (rows.argmax(-1).tolist() == ids)
    passed = [one for batch in batches for one in batch]
    assert len(passed) == len(set(passed)) == len({(prompt, *ids[:-1]) for prompt, ids in answers})
    assert passed == sorted(passed, key=len, reverse=True)
    assert all(len(batch) == batch_size for batch in batches[:-1])
