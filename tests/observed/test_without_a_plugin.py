"""With a family's plugin disabled, what is observed gives the same bytes of an emulator as the plugin does."""

import hashlib
import json
from importlib import import_module

import pytest
import torch
from emloc_demo.data import write_data
from emloc_demo.model import write_base
from support.jobs import compress_job
from support.marks import thorough
from support.paths import ROOT

from emloc_core.conformance.inputs import number_tokenizer
from emloc_core.conformance.tiny import random_model
from emloc_core.observed.record import KNOWN
from emloc_core.plugins.manager import plugin_manager
from emloc_core.scaffold.config_arguments import make_config
from emloc_core.settings import CompressSettings

#: Families of a text model each; the second has norms behind its Linears, the others fused Linears, or experts.
FAMILIES = ("llama", *thorough("gemma", "glm", "phi", "qwen-moe"))


@pytest.fixture
def disable(monkeypatch):
    """Return a function that disables all plugins which declare a family, in this process."""

    def off():
        monkeypatch.setattr(plugin_manager(), "_families", {})

    KNOWN.clear()
    yield off
    KNOWN.clear()


def weights(emulator):
    """Return the digests of an emulator's weights, and its config, by file."""
    files = [*emulator.glob("*.safetensors"), emulator / "config.json"]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def emulators(base, data, directory, disable, kind):
    """Make an emulator with the plugin and one without; return both."""

    settings = CompressSettings(samples=4, selection=2, kind=kind)
    declared = compress_job(base, data, directory / "declared", settings)
    assert not declared.base.family.observed
    with_it = declared.run()
    disable()
    observed = compress_job(base, data, directory / "observed", settings)
    assert observed.base.family.observed
    return with_it, observed.run()


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_observed_of_a_tiny_model_gives_the_same_bytes(name, tmp_path, disable):
    (family,) = [family for family in plugin_manager().families() if family.name == name]
    config = make_config(family.tiny_configs[0])
    random_model(family, config).save_pretrained(tmp_path / "base")
    number_tokenizer(config).save_pretrained(tmp_path / "base")
    numbers = torch.randint(3, 100, (12, 16), generator=torch.Generator().manual_seed(0)).tolist()
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"text": "{" ".join(map(str, row))}"}}\n' for row in numbers))
    declared, observed = emulators(tmp_path / "base", rows, tmp_path, disable, "nf4")
    assert weights(observed) == weights(declared)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SmolLM2-135M", "Gemma-3-270M"])
def test_what_is_observed_of_a_real_model_gives_the_same_bytes(name, tmp_path, disable, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    write = {"SmolLM2-135M": write_base, "Gemma-3-270M": import_module("quality_bases").write_gemma}[name]
    conversations = [json.loads(line)["messages"] for line in write_data(tmp_path / "data")[0].open()]
    texts = ["\n\n".join(turn["content"] for turn in turns) for turns in conversations[:12]]  # no template is needed
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    declared, observed = emulators(write(tmp_path / "base"), rows, tmp_path, disable, "low-rank")
    assert weights(observed) == weights(declared)
