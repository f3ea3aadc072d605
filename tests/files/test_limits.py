"""Configs and chat templates that would run forever, or fill the memory: refused with a sentence."""

import resource
import signal
import threading
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from emloc_qwen import QWEN_MOE
from support.models import tiny_tokenizer
from transformers import AutoConfig
from transformers.utils import chat_template_utils

from emloc_core.data.rows import load_rows
from emloc_core.errors import EmlocError
from emloc_core.evaluation.images import read_table
from emloc_core.files import limits, pretrained, templates
from emloc_core.files.documents import read_json, write_json
from emloc_core.files.limits import limited
from emloc_core.files.pretrained import load_config
from emloc_core.model.skeleton import build_model

MESSAGES = [{"role": "user", "content": "hello"}]
#: Never finish, or not within this machine's memory.
BOMBS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}"
    "{% endfor %}{% endfor %}",
    "doubled": "{% set s = namespace(a='aaaa') %}{% for i in range(60) %}{% set s.a = s.a ~ s.a %}{% endfor %}",
    "constant": "{{ 'a' * 10 ** 11 }}",
    "repeated": "{{ messages[0]['content'] * 10 ** 11 }}",
    "padded": "{{ messages[0]['content'].center(10 ** 11) }}",
    "formatted": "{{ '%100000000000d' % 1 }}",
    "power": "{{ (10 ** (10 ** 8)) ** 100 > 5 }}",
    "macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
}


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "SECONDS", 0.5)
    monkeypatch.setattr(templates, "NBYTES", 256 << 20)
    chat_template_utils._compile_jinja_template.cache_clear()


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
@pytest.mark.parametrize("tokenize", [True, False])
def test_templates_are_rendered_within_bounds(bomb: str, tokenize: bool) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = bomb
    with pytest.raises(EmlocError, match=r"chat template takes more than"):
        tokenizer.apply_chat_template(MESSAGES, tokenize=tokenize)


def test_what_a_template_writes_is_bounded() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ 'a' * 20000000 }}"
    with pytest.raises(EmlocError, match="gives 20,000,000 characters"):
        tokenizer.apply_chat_template(MESSAGES)


def test_an_ordinary_template_says_the_same() -> None:
    tokenizer = tiny_tokenizer()
    expected = chat_template_utils._compile_jinja_template(tokenizer.chat_template)._template.render(
        messages=MESSAGES, **tokenizer.special_tokens_map
    )
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False) == expected


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("llama", {"num_hidden_layers": 10**9}),
        ("llama", {"num_hidden_layers": 200_000}),
        ("qwen2", {"num_hidden_layers": 10**9}),
        ("qwen3_moe", {"num_experts": 10**9}),
        ("llama", {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 10**12}),
    ],
)
def test_a_config_of_no_possible_model_is_refused(
    tiny_model: Path, tmp_path: Path, emloc: Any, model_type: str, fields: dict[str, Any]
) -> None:
    content = {**read_json(tiny_model / "config.json"), "model_type": model_type, **fields}
    write_json(tmp_path / "config.json", content)
    code, _, err = emloc("plan", tmp_path / "config.json", "--length", 16)
    assert code == 1, err
    assert "more than any model has" in err or "memory" in err


def test_experts_that_are_rows_of_a_matrix_may_be_many(tmp_path: Path) -> None:
    config = AutoConfig.for_model("doge")
    config.save_pretrained(tmp_path)
    assert load_config(tmp_path / "config.json").num_experts == config.num_experts > 10_000


def test_a_stack_of_experts_takes_no_memory_as_its_model_is_built() -> None:
    """As wide as in DeepSeek-V3: 15 GB, more than building may take."""
    sizes = {"num_hidden_layers": 1, "hidden_size": 7168, "moe_intermediate_size": 2048, "num_experts": 256,
             "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 128}  # fmt: skip
    model = build_model(AutoConfig.for_model("qwen3_moe", **sizes), QWEN_MOE, torch.bfloat16)
    stack = model.get_parameter("model.layers.0.mlp.experts.gate_up_proj")
    assert stack.is_meta
    assert stack.nbytes > 15e9


def spin() -> None:
    while True:
        pass


def test_limits_are_as_before_afterwards() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA), signal.getsignal(signal.SIGALRM)
    with pytest.raises(EmlocError, match="2 MiB"), limited("It", 60, 2 << 20):
        bytearray(1 << 30)
    with pytest.raises(EmlocError, match=r"0\.01 seconds"), limited("It", 0.01, 1 << 30):
        spin()
    assert (resource.getrlimit(resource.RLIMIT_DATA), signal.getsignal(signal.SIGALRM)) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_other_threads_have_no_alarm() -> None:
    failures: list[Exception] = []

    def work() -> None:
        try:
            with limited("It", 60, 1 << 30):
                pass
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failures == []


def test_modules_are_counted(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the fields are called that ask for them."""
    config = pretrained.load_config(tiny_model / "config.json")
    monkeypatch.setattr(pretrained, "_MODULES", 20)
    with pytest.raises(EmlocError, match="more than 20 modules"):
        pretrained.new_model("AutoModelForCausalLM", config, torch.float32)
    monkeypatch.setattr(pretrained, "_MODULES", 200)
    assert pretrained.new_model("AutoModelForCausalLM", config, torch.float32)


@pytest.mark.parametrize("read", [load_rows, read_table])
def test_what_parquet_unpacks_to_is_bounded(read: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_LEAST", 128 << 20)
    words = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 600, pyarrow.int32()), ["x" * (1 << 20)])
    pyarrow.parquet.write_table(pyarrow.table({"text": words}), tmp_path / "rows.parquet", store_schema=False)
    with pytest.raises(EmlocError, match=r"rows\.parquet"):
        read(tmp_path / "rows.parquet")
