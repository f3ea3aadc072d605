"""Checkpoints in the layouts that InternVL and InternLM2 are published in, rewritten as native ones.

The sources are computed by code of our own, in ``internvl_chat.py``: the imported models answer what they do.
"""

import json
import shutil
import signal
import subprocess
import sys
import textwrap
import weakref
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import tomli_w
import torch
from emloc_internvl.chat_layout import INTERNVL_CHAT
from PIL import Image
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor
from support.hub import local_hub
from support.internvl_chat import (
    InternLM2,
    InternVLChat,
    chat_config,
    edit,
    internlm2_config,
    randomise,
    save_source,
    sentencepiece_model,
    sentencepiece_pieces,
    text_config,
)
from support.jobs import compress_job, import_job
from support.marks import most_thorough
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

import emloc_core
from emloc_core.cli import cli, main
from emloc_core.errors import EmlocError
from emloc_core.files.checkpoint import Checkpoint
from emloc_core.files.documents import read_json
from emloc_core.files.inputs import Inputs
from emloc_core.plugins.manager import plugin_manager
from emloc_core.settings import CompressSettings

RMS_VISION = {"norm_type": "rms_norm", "qk_normalization": True, "qkv_bias": False}
CASES = {
    "qwen2": chat_config(text_config("qwen2")),
    "qwen2, tied": chat_config(text_config("qwen2", tie_word_embeddings=True)),
    "qwen3": chat_config(text_config("qwen3"), vision_config=RMS_VISION),
    "llama": chat_config(text_config("llama"), select_layer=-2),
    "internlm2": chat_config(internlm2_config(), vision_config=RMS_VISION),
    "internlm2, biases": chat_config(
        internlm2_config(bias=True, num_key_value_heads=1, max_position_embeddings=256), downsample_ratio=0.25
    ),
}
MESSAGE = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "the cat."}]}]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A function of a case: the source's directory, the model it was written from, and where it was imported to."""
    cases = {}

    def make(case):
        if case not in cases:
            config = CASES[case]
            model = randomise(InternVLChat(config))
            source = save_source(tmp_path_factory.mktemp("import") / "source", model, config)
            cases[case] = source, model, import_job(source, source.with_name("native")).run()
        return cases[case]

    return make


@pytest.fixture
def source(models, tmp_path):
    """A copy, to be damaged, of an InternLM2 source."""
    return shutil.copytree(models("internlm2")[0], tmp_path / "source")


def weights(directory):
    return {key: info.shard for key, info in Checkpoint(directory).tensors.items()}


@pytest.mark.parametrize("case", CASES)
def test_logits_with_images_are_the_source_s(models, case):
    _, reference, native = models(case)
    model, report = AutoModelForImageTextToText.from_pretrained(native, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert model.config.tie_word_embeddings == CASES[case]["llm_config"].get("tie_word_embeddings", False)
    token = model.config.image_token_id
    tiles = round((4 * CASES[case]["downsample_ratio"]) ** 2)
    ids = torch.randint(3, 100, (1, 20 + 2 * tiles), generator=torch.Generator().manual_seed(1))
    ids[0, 4 : 4 + 2 * tiles] = token
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = reference(ids, pixels, token)
        logits = model(input_ids=ids, pixel_values=pixels).logits
        blind = model(input_ids=ids, pixel_values=pixels.flip(0)).logits
    scale = expected.abs().max()
    # fp32 in another order of operations; a wrong weight or row changes logits by their own size, as the images do.
    assert (logits - expected).abs().max() < 2e-5 * scale
    assert (blind - expected).abs().max() > 1e-2 * scale


def test_nothing_is_lost_and_no_code_travels(models):
    source, _, native = models("internlm2")
    old, new = (
        torch.cat([tensor.flatten() for path in Checkpoint(directory).shards for tensor in load_file(path).values()])
        for directory in (source, native)
    )
    assert torch.equal(old.sort().values, new.sort().values)  # the same numbers, in other places
    assert (native / "BASE_README.md").read_text() == "# A model\n"
    assert not list(native.glob("*.py"))
    assert not (native / "preprocessor_config.json").exists()
    assert "auto_map" not in "".join(path.read_text() for path in native.glob("*.json"))
    manifest = json.loads((native / "emloc.json").read_text())
    assert manifest["request"] == {
        "layout": "internvl_chat",
        "native": manifest["request"]["native"],
        "source": Checkpoint(source).fingerprint(Inputs()),
        "files": Inputs().hash(Checkpoint(source).side_files()),
    }
    assert manifest["result"]["split"] == 3 + 2


@pytest.mark.parametrize("case", ["qwen2", "internlm2"])
def test_the_processor_tiles_images_and_writes_the_source_s_prompt(models, case):
    _, reference, native = models(case)
    processor = AutoProcessor.from_pretrained(native)
    image = Image.effect_noise((24, 8), 60).convert("RGB")  # three tiles side by side, and a thumbnail
    prompt = processor.apply_chat_template(MESSAGE, add_generation_prompt=True, tokenize=False)
    begin = "<s>" if case == "internlm2" else ""
    assert prompt == (f"{begin}<|im_start|>user\n<IMG_CONTEXT>\nthe cat.<|im_end|>\n<|im_start|>assistant\n")
    inputs = processor(images=[image], text=[prompt], add_special_tokens=False, return_tensors="pt")
    assert inputs["pixel_values"].shape == (4, 3, 8, 8)
    model = AutoModelForImageTextToText.from_pretrained(native)
    ids = inputs["input_ids"]
    assert (ids == model.config.image_token_id).sum() == 4 * 4
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (ids == end).sum() == 1
    assert model.generation_config.eos_token_id == end
    with torch.no_grad():
        expected = reference(ids, inputs["pixel_values"], model.config.image_token_id)
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


def test_a_system_message_of_the_config_is_written_where_a_conversation_has_none(models, tmp_path):
    source = shutil.copytree(models("qwen2")[0], tmp_path / "source")
    edit(source, "config.json", system_message='你好 "a"', template="Hermes-2")
    tokenizer = AutoTokenizer.from_pretrained(import_job(source, tmp_path / "out").run())
    question = {"role": "user", "content": "hi"}
    system = '<|im_start|>system\n你好 "a"<|im_end|>'
    assert tokenizer.apply_chat_template([question], tokenize=False) == f"{system}<|im_start|>user\nhi<|im_end|>"
    own = tokenizer.apply_chat_template([{"role": "system", "content": "x"}, question], tokenize=False)
    assert own == "<|im_start|>system\nx<|im_end|><|im_start|>user\nhi<|im_end|>"


def test_an_imported_model_is_compressed(models, rows_file, tmp_path):
    native = models("internlm2, biases")[2]
    settings = CompressSettings(samples=6, selection=3, ratio=0.6)
    emulator = compress_job(native, rows_file, tmp_path / "emulator", settings).run()
    model = AutoModelForImageTextToText.from_pretrained(emulator)
    assert type(model.model.language_model.layers[0].self_attn.q_proj).__name__ == "LowRankLinear"


@pytest.mark.parametrize("case", most_thorough(["qwen2", "internlm2, biases"], "qwen2"))
def test_an_entry_of_a_source_is_planned_for_rows_before_it_is_imported(models, tmp_path, case):
    source, _, native = models(case)
    Image.new("RGB", (16, 8)).save(tmp_path / "image.png")
    row = {"messages": [*MESSAGE, {"role": "assistant", "content": "yes"}], "images": [str(tmp_path / "image.png")]}
    entry = {"id": "org/own", "family": "internvl", "layout": "internvl", "presets": {"default": {}}}
    config = {name: value for name, value in read_json(native / "config.json").items() if name[0] != "_"}
    (tmp_path / "own.toml").write_text(tomli_w.dumps({**entry, "config": config}))
    with local_hub(tmp_path / "cache") as hub:
        hub.add("org/own", source)
        published, imported = (
            emloc_core.plan(str(model), data=[row], memory="4GiB", measure=False).describe()["workload"]
            for model in (tmp_path / "own.toml", native)
        )
    assert published == imported
    assert imported["images"] == 3  # two tiles and a thumbnail


def test_other_commands_say_that_a_source_must_be_imported(models, tmp_path, rows_file, capsys, monkeypatch):
    arguments = ["emloc", "compress", models("qwen2")[0], "--data", rows_file, "-o", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
    with pytest.raises(SystemExit, match="1"):
        main()
    assert "emloc import" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bias", [False, True])
def test_a_text_model_of_internlm2_becomes_a_llama(tmp_path, bias):
    config = internlm2_config(bias=bias)
    reference = randomise(InternLM2(config))
    source = save_source(tmp_path / "source", reference, config, shards=1)
    native = import_job(source, tmp_path / "native").run()
    model, report = AutoModelForCausalLM.from_pretrained(native, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert "auto_map" not in "".join(path.read_text() for path in native.glob("*.json"))
    end = [text for text, _, _ in sentencepiece_pieces()].index("[UNUSED_2]")
    assert AutoTokenizer.from_pretrained(native).convert_tokens_to_ids("<|im_end|>") == end
    ids = torch.randint(3, 300, (2, 9))
    with torch.no_grad():
        expected = reference(reference.get_input_embeddings()(ids))
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


TEXTS = ["the cat.", " the  cows|at abc", "abc\n東京 the", "ababcabc bcbc", "", "a"]


@pytest.mark.parametrize("text", TEXTS)
def test_internlm2_s_tokenizer_is_sentencepiece_s(models, text):
    tokenizer = AutoTokenizer.from_pretrained(models("internlm2")[2])
    pieces = sentencepiece_pieces()
    expected = SentencePieceProcessor(model_proto=sentencepiece_model(pieces)).encode(text)
    assert tokenizer.encode(text) == [1, *expected]
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    marked = tokenizer.encode(f"<|im_start|>{text}<|im_end|><IMG_CONTEXT>", add_special_tokens=False)
    start, end = len(pieces) - 3, len(pieces) - 2  # [UNUSED_1] and [UNUSED_2], which the files beside it rename
    assert marked == [start, *expected, end, len(pieces) + 2]


def test_at_most_one_fused_tensor_is_read_at_a_time(models, tmp_path, monkeypatch):
    """Everything else is copied from file to file. The tensors read before are gone when the next is."""
    source = models("internlm2")[0]
    keys_read, alive, inner = [], weakref.WeakSet(), Checkpoint.slices

    @contextmanager
    def watched(self, keys):
        with inner(self, keys) as slices:
            yield {key: Watched(key, piece) for key, piece in slices.items()}

    class Watched:
        def __init__(self, key, piece):
            self.key, self.piece = key, piece

        def __getitem__(self, index):
            assert not list(alive), f"{keys_read[-1]} is still held when {self.key} is read"
            tensor = self.piece[index]
            keys_read.append(self.key)
            alive.add(tensor)
            return tensor

    monkeypatch.setattr(Checkpoint, "slices", watched)
    import_job(source, tmp_path / "out").run()
    assert sorted(keys_read) == sorted(key for key in weights(source) if "qkv." in key)


def test_an_output_of_something_else_is_not_overwritten(source, tmp_path, monkeypatch):
    out = import_job(source, tmp_path / "out").run()
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert import_job(source, out).run() == out
    assert before == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    other = replace(INTERNVL_CHAT, config=lambda *args: {**INTERNVL_CHAT.config(*args), "use_cache": False})
    with monkeypatch.context() as changed:
        changed.setattr(plugin_manager(), "layout_for", lambda _: other)
        with pytest.raises(EmlocError, match="made from something else: what the layout's plugin makes of it changed"):
            import_job(source, out).run()
    edit(source, "tokenizer_config.json", model_max_length=5)
    with pytest.raises(EmlocError, match="made from something else: files"):
        import_job(source, out).run()
    edit(source, "config.json", max_dynamic_patch=6)
    with pytest.raises(EmlocError, match=r"made from something else: .*the source changed"):
        import_job(source, out).run()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(EmlocError, match="was not written by emloc"):
        import_job(source, tmp_path / "mine").run()


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from emloc_core.model.importing import Import
    from emloc_core.requests import ImportRequest

    source, output, kill_at = sys.argv[1:]

    def progress(what, done, total):
        if done == int(kill_at):
            os.kill(os.getpid(), signal.SIGKILL)

    Import(ImportRequest(source=source, output=Path(output))).run(progress)
"""


@pytest.mark.thorough
def test_an_import_that_was_killed_goes_on(models, tmp_path):
    source, _, native = models("internlm2")
    command = [sys.executable, "-c", textwrap.dedent(KILLED), source, tmp_path / "out", "1"]
    killed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "out").exists()
    first = tmp_path / ".out.partial" / "content" / "model-00001-of-00002.safetensors"
    written = first.stat().st_mtime_ns
    out = import_job(source, tmp_path / "out").run()
    assert (out / first.name).stat().st_mtime_ns == written
    contents = [
        {path.name: path.read_bytes() for path in directory.iterdir() if path.name not in ("timing.json", "emloc.json")}
        for directory in (native, out)
    ]
    assert contents[0] == contents[1]


def test_the_command_tells_first_and_then_does(source, tmp_path, capsys):
    arguments = ["import", str(source), "-o", str(tmp_path / "out"), "--json"]
    cli.main([*arguments, "--dry-run"], standalone_mode=False)
    preview = json.loads(capsys.readouterr().out)
    assert (preview["layout"], preview["model_type"], preview["split"]) == ("internvl_chat", "internvl", 5)
    assert preview["tensors"] == len(weights(source))
    assert not preview["finished"]
    assert not (tmp_path / "out").exists()
    cli.main(arguments, standalone_mode=False)
    result = json.loads(capsys.readouterr().out)
    assert result["result"]["bytes"] == preview["bytes"]
    assert result["result"]["tensors"] == preview["tensors"] + 2 * preview["split"]
    assert Path(result["output"]) == tmp_path / "out"


def test_every_family_of_the_layouts_is_installed():
    """What a layout makes, the other commands take."""
    for name in ("internvl_chat", "internlm2"):
        assert plugin_manager().layout_for({"model_type": name}).name == name
    assert plugin_manager().family_for({"model_type": "internvl", "text_config": {"model_type": "llama"}})
