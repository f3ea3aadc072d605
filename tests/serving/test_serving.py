"""llama.cpp serves SmolLM2 with and without a LoRA, over HTTP, and answers as transformers does. `make test-slow`."""

import json
from contextlib import contextmanager
from urllib.request import Request, urlopen

import pytest
import torch
from emloc_demo.model import write_base
from support.adapters import make_adapter

import emloc_core

QUESTIONS = ["What is the capital of France?", "Name three colours.", "Why is the sky blue?"]


@contextmanager
def served(model, lora=None):
    """A function that asks a server of llama.cpp."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx, params.n_parallel, params.port = 512, 1, 0
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
    params.warmup = False
    if lora is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
    server = xllamacpp.Server(params)  # until the function ends, which holds the only reference
    address = server.listening_address

    def answer_to(question: str) -> str:
        request_body = {"messages": [{"role": "user", "content": question}], "max_tokens": 16, "temperature": 0}
        request = Request(f"{address}/v1/chat/completions", json.dumps(request_body).encode(),
                          {"Content-Type": "application/json"})  # fmt: skip
        with urlopen(request, timeout=1800) as answer:
            return json.load(answer)["choices"][0]["message"]["content"].strip()

    yield answer_to


@pytest.mark.slow
def test_llama_cpp_answers_as_transformers_does(tmp_path):
    base = write_base(tmp_path / "base")
    torch.manual_seed(0)  # for half A: a random LoRA may leave two tokens all but equally likely
    adapter = make_adapter(base, tmp_path / "adapter", size=0.02, r=24, use_rslora=True)
    merged = emloc_core.merge(adapter, tmp_path / "merged", base=base, allow_uncorrected=True)
    settings = {"gguf": True, "dtype": "f32"}
    files = {
        "base": emloc_core.export(base, tmp_path / "base-gguf", **settings).path / "model.gguf",
        "lora": emloc_core.export(adapter, tmp_path / "lora-gguf", base=base, **settings).path / "adapter.gguf",
        "merged": emloc_core.export(merged, tmp_path / "merged-gguf", **settings).path / "model.gguf",
    }

    def answers(*model):
        conversation = emloc_core.chat(*model, temperature=0, max_new_tokens=16)
        return [conversation.reset() or conversation.say(question) for question in QUESTIONS]

    of_base, of_lora = answers(base), answers(base, adapter)
    assert of_base != of_lora
    for served_as, expected in (
        (("base",), of_base),
        (("base", "lora"), of_lora),
        (("merged",), answers(merged)),
    ):
        with served(*(files[name] for name in served_as)) as answer_to:
            assert [answer_to(question) for question in QUESTIONS] == expected, served_as
