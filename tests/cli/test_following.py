"""Each stage ends with the command that usually follows, which works as it is printed."""

import io
import json
import shlex

import pytest
from transformers import AutoTokenizer

from emloc_core.cli.following import following
from emloc_core.requests import make_request
from emloc_core.stages.result import Result


def next_commands(out):
    return [line.partition(": emloc ")[2] for line in out.splitlines() if line.startswith(("Next: ", "Or: "))]


def test_the_printed_commands_lead_from_the_emulator_to_an_answer(emloc, tiny_model, rows_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("animal: cat\n"))
    _, out, _ = emloc(
        "compress", tiny_model, "--data", rows_file, "-o", "an emulator", "--samples", 8, "--selection", 4
    )
    (train,) = next_commands(out)
    assert shlex.split(train) == ["train", "an emulator", "--data", str(rows_file), "-o", "adapter"]
    _, out, _ = emloc(*shlex.split(train), "--steps", 1, "--batch-size", 2)
    (correct,) = next_commands(out)
    _, out, _ = emloc(*shlex.split(correct))
    chat, _, merge = next_commands(out)
    code, out, _ = emloc(*shlex.split(merge))
    assert code == 0
    assert shlex.split(next_commands(out)[0]) == ["chat", "merged"]
    code, out, _ = emloc(*shlex.split(chat), "--max-new-tokens", 4)
    assert (code, len(out.strip())) > (0, 0)
    for directory in ("adapter", "corrected"):  # an adapter brings what turns text into its inputs
        tokenizer = AutoTokenizer.from_pretrained(directory)
        assert (
            tokenizer("a red cat")["input_ids"] == AutoTokenizer.from_pretrained(tiny_model)("a red cat")["input_ids"]
        )
        assert tokenizer.chat_template
    # A recipe runs what follows by itself, and JSON is for programs.
    assert not next_commands(emloc(*shlex.split(merge), "--json")[1])


@pytest.mark.parametrize(
    ("stage", "content", "first"),
    [
        ("import", {"source": "x"}, "emloc plan out --memory 24GiB"),
        (
            "compress",
            {"model": "m", "data": "org/set", "split": "sft", "exclude": ("x.jsonl",), "settings": {"max_length": 9}},
            "emloc train out --data org/set --split sft --exclude x.jsonl --max-length 9 -o adapter",
        ),
        (
            "compress",
            {"model": "m", "data": "x.jsonl", "skip_bad_rows": True},
            "emloc train out --data x.jsonl --skip-bad-rows -o adapter",
        ),
        (
            "compress",
            {"model": "m", "data": {"x.jsonl": 1.0, "y z.jsonl": 2.0}},
            "emloc train out --data x.jsonl --data 'y z.jsonl:2' -o adapter",
        ),
        ("train", {"model": "org/model", "data": "rows.jsonl"}, "emloc chat out"),
        ("polish", {"adapter": "x", "data": "rows.jsonl"}, "emloc chat out"),
        ("eval", {"systems": ({"name": "a", "model": "m", "adapter": "b"},), "tasks": ("t",)}, "emloc chat m b"),
    ],
)
def test_every_stage_has_one(stage, content, first, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "emloc.json").write_text('{"kind": "any", "request": {}, "result": {}}')
    assert following(make_request(stage, output="out", **content), Result("out"))[0] == first


@pytest.mark.parametrize(("objective", "polishes"), [("sft", 1), ("dpo", 0)])
def test_polish_does_not_follow_preferences(objective, polishes, tmp_path):
    (tmp_path / "emloc.json").write_text(json.dumps({"request": {"settings": {"objective": objective}}}))
    request = make_request("correct", adapter=tmp_path, output=tmp_path / "out")
    commands = following(request, Result(tmp_path / "out"))
    assert sum(command.startswith("emloc polish") for command in commands) == polishes


@pytest.mark.parametrize(("method", "of_merge"), [("bitsandbytes", " --base ORIGINAL"), (None, "")])
def test_a_lora_on_a_base_in_four_bits_is_merged_into_the_original(method, of_merge, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("base", "out"):
        (tmp_path / name).mkdir()
    settings = {"quantization_config": {"quant_method": method, "load_in_4bit": True}} if method else {}
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "llama", **settings}))
    (tmp_path / "out" / "adapter_config.json").write_text('{"base_model_name_or_path": "base"}')
    request = make_request("train", model="base", data="rows.jsonl", output="out")
    assert following(request, Result("out"))[1] == f"emloc merge out{of_merge} -o merged"
