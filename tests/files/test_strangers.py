"""Models and adapters from strangers: their Python is never run, and they cannot cause a download."""

import ast
import io
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from emloc_llama import LLAMA
from support.paths import ROOT
from transformers import AutoConfig, AutoModelForCausalLM

from emloc_core.data.tokenize import load_processor
from emloc_core.errors import EmlocError
from emloc_core.evaluation.loading import load_system
from emloc_core.files import pretrained
from emloc_core.files.documents import read_json, write_json
from emloc_core.model.skeleton import build_model

EVIL = "from pathlib import Path\nPath({ran!r}).touch()\nclass Evil:\n    pass\nEvilConfig = EvilT = Evil\n"


@pytest.fixture
def says_yes(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Answer every question with yes, as ``yes |`` does."""
    stdin = io.StringIO("y\n" * 1000)
    monkeypatch.setattr(sys, "stdin", stdin)
    return stdin


class Evil:
    """A copy of a model with a Python file that leaves a mark when it is imported."""

    def __init__(self, model: Path, directory: Path) -> None:
        self.directory, self.mark = directory, directory.parent / "it-ran"
        shutil.copytree(model, directory)
        (directory / "evil.py").write_text(EVIL.format(ran=str(self.mark)))

    def edit(self, name: str, **fields: Any) -> None:
        path = self.directory / name
        write_json(path, {**(read_json(path) if path.exists() else {}), **fields})


@pytest.fixture
def evil(tiny_model: Path, tmp_path: Path, says_yes: io.StringIO) -> Iterator[Evil]:
    model = Evil(tiny_model, tmp_path / "evil")
    yield model
    assert not model.mark.exists(), "the model's own code ran"
    assert says_yes.tell() == 0, "a question was asked on the terminal"


TOKENIZER = {"tokenizer_class": "EvilT", "auto_map": {"AutoTokenizer": [None, "evil.EvilT"]}}


@pytest.mark.parametrize("command", ["plan", "compress"])
def test_a_tokenizers_own_code_is_not_run(
    evil: Evil, emloc: Any, rows_file: Path, tmp_path: Path, command: str
) -> None:
    evil.edit("tokenizer_config.json", **TOKENIZER)
    settings = ["-o", tmp_path / "out", "--ratio", "0.6", "--samples", 4, "--selection", 2]
    _, _, err = emloc(command, evil.directory, "--data", rows_file, *(settings if command == "compress" else ()))
    assert "unexpected" not in err


def test_code_that_a_config_needs_is_refused_with_a_sentence(evil: Evil) -> None:
    evil.edit("config.json", model_type="evil", auto_map={"AutoConfig": "evil.EvilConfig"})
    with pytest.raises(EmlocError) as caught:
        pretrained.load_config(evil.directory / "config.json")
    assert caught.value.code == "refused"


@pytest.mark.parametrize("kind", ["AutoConfig", "AutoModelForCausalLM", "AutoModel", "AutoTokenizer"])
def test_code_that_is_not_needed_is_passed_over(evil: Evil, kind: str) -> None:
    evil.edit("config.json", auto_map={kind: "evil.Evil"})
    load_system(evil.directory, None)


def test_a_part_of_a_model_cannot_ask(evil: Evil) -> None:
    """Inside a model transformers loads parts by their configs, with no argument of ours."""
    config = AutoConfig.for_model("clip_vision_model")
    config.auto_map = {"AutoModelForCausalLM": "evil.Evil"}
    config._name_or_path = str(evil.directory)
    with pytest.raises(ValueError, match="custom code"):
        AutoModelForCausalLM.from_config(config)


PROCESSORS = ["processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"]


@pytest.mark.parametrize("file", [*PROCESSORS, "tokenizer_config.json"])
def test_a_processors_own_code_is_not_run(evil: Evil, file: str) -> None:
    evil.edit(file, processor_class="EvilT", auto_map={"AutoProcessor": "evil.EvilT"})
    with pytest.raises(EmlocError):
        load_processor(evil.directory)


@pytest.mark.parametrize("kind", ["AutoImageProcessor", "AutoVideoProcessor", "AutoFeatureExtractor"])
def test_code_of_a_part_of_a_processor_is_not_run(evil: Evil, kind: str) -> None:
    part = {"image_processor_type": "EvilT", "video_processor_type": "EvilT", "auto_map": {kind: "evil.EvilT"}}
    for file in PROCESSORS:
        evil.edit(file, **part, image_processor=part, video_processor=part)
    evil.edit("processor_config.json", processor_class="InternVLProcessor")
    with pytest.raises(EmlocError):
        load_processor(evil.directory)


def test_a_processor_names_no_further_model(evil: Evil) -> None:
    further = {"audio_tokenizer_class": "DacModel", "audio_tokenizer_name_or_path": "somebody/else"}
    evil.edit("processor_config.json", audio_tokenizer=further)
    with pytest.raises(EmlocError, match="names another model"):
        load_processor(evil.directory)


@pytest.mark.parametrize(
    "fields",
    [
        {"attn_implementation": "evil/kernel"},
        {"_attn_implementation": "evil/kernel@main:forward"},
        {"attn_implementation": {"": "sdpa", "text_config": "evil/kernel"}},
        {"attn_implementation": "paged|evil/kernel"},
        {"attn_implementation": ["evil/kernel"]},
        {"text_config": {"attn_implementation": "evil/kernel"}},
        {"vision_config": {"parts": [{"_attn_implementation": "evil/kernel"}]}},
        {"experts_implementation": "evil/kernel"},
        {"_experts_implementation": "deepgemm"},
    ],
)
def test_kernels_of_the_hub_are_refused(evil: Evil, emloc: Any, fields: dict[str, Any]) -> None:
    evil.edit("config.json", **fields)
    code, _, err = emloc("plan", evil.directory)
    assert code == 1
    assert "built into transformers" in err


@pytest.mark.parametrize("name", ["eager", "sdpa", None])
def test_built_in_attention_is_left_alone(tiny_model: Path, tmp_path: Path, name: str | None) -> None:
    content = {**read_json(tiny_model / "config.json"), "attn_implementation": name}
    write_json(tmp_path / "config.json", content)
    assert pretrained.load_config(tmp_path / "config.json")._attn_implementation == name


def test_flash_attention_is_refused_where_it_would_be_fetched(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = {**read_json(tiny_model / "config.json"), "attn_implementation": "flash_attention_2"}
    write_json(tmp_path / "config.json", content)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    pretrained.load_config(tmp_path / "config.json")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "kernels" or None)
    with pytest.raises(EmlocError) as caught:
        pretrained.load_config(tmp_path / "config.json")
    assert caught.value.code == "refused"


@pytest.mark.parametrize("fields", [{"num_attention_heads": -1}, {"pad_token_id": 1 << 70}, {"dtype": 3.5}])
def test_a_config_that_no_model_can_be_built_from_is_refused(evil: Evil, fields: dict[str, Any]) -> None:
    evil.edit("config.json", **fields)
    with pytest.raises(EmlocError, match="config"):
        build_model(pretrained.load_config(evil.directory / "config.json"), LLAMA, torch.float32)


def test_an_unknown_quantisation_is_not_loaded(evil: Evil) -> None:
    evil.edit("config.json", quantization_config={"quant_method": "mxfp4"})
    with pytest.raises(EmlocError, match="'mxfp4'") as caught:
        load_system(evil.directory, None)
    assert caught.value.code == "unsupported"


@pytest.mark.parametrize("skipped", [3, "lm_head", [3], ["(a"], ["(.|.)*x"], [".*.*.*.*x"]])
def test_names_of_modules_that_are_not_packed_are_checked(evil: Evil, skipped: Any) -> None:
    packed = {"quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_skip_modules": skipped}
    evil.edit("config.json", quantization_config=packed)
    with pytest.raises(EmlocError, match="llm_int8_skip_modules"):
        pretrained.load_config(evil.directory / "config.json")


def test_an_adapter_in_a_models_directory_is_not_put_on_it(evil: Evil) -> None:
    evil.edit("adapter_config.json", peft_type="LORA", base_model_name_or_path="somebody/else")
    with pytest.raises(EmlocError, match="holds a model and an adapter"):
        load_system(evil.directory, None)


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "XLORA", None])
def test_only_loras_are_loaded(tiny_model: Path, tmp_path: Path, kind: str | None) -> None:
    """Some of the other adapters load tokenizers and models that their config names."""
    write_json(tmp_path / "adapter_config.json", {"peft_type": kind, "tokenizer_kwargs": {"trust_remote_code": True}})
    with pytest.raises(EmlocError, match="only LoRAs"):
        load_system(tiny_model, tmp_path)


def test_pickled_adapters_are_not_loaded(tiny_model: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "adapter_config.json", {"peft_type": "LORA"})
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(EmlocError, match="safetensors"):
        load_system(tiny_model, tmp_path)


def _loads(path: Path) -> list[str]:
    """Return where a file loads something through transformers, PEFT or lm-eval itself."""
    loads = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        name = getattr(node, "attr", None) or getattr(node, "id", None)
        imported = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom | ast.Import) else []
        for word in [name, *imported]:
            is_loader = word in ("from_pretrained", "from_config", "pipeline", "trust_remote_code")
            is_auto = str(word).startswith("Auto") and str(word) not in ("AutoConfig", "Auto")
            if is_loader or is_auto:
                loads.append(f"{path.relative_to(ROOT)}:{node.lineno}: {word}")
    return loads


def test_everything_is_loaded_in_one_place() -> None:
    files = [path for folder in ("emloc_core", "plugins") for path in sorted((ROOT / folder).rglob("*.py"))]
    loads = [load for path in files if path.name != "pretrained.py" for load in _loads(path)]
    assert loads == []
    assert _loads(ROOT / "emloc_core" / "files" / "pretrained.py")
