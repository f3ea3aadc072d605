"""The registry: entries of real models, of plugins and of users, and what is refused."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from support.paths import DOCS
from torch import nn

from emloc_core.cli import cli
from emloc_core.emulator.declared import find_linears
from emloc_core.errors import EmlocError
from emloc_core.memory.model import MemoryModel
from emloc_core.memory.workload import Workload
from emloc_core.model.skeleton import build_model
from emloc_core.plugins.manager import PluginManager, plugin_manager
from emloc_core.registry import registry
from emloc_core.registry.entry import Entry, Parameters, Preset, read_entry
from emloc_core.registry.fit import fit
from emloc_core.registry.registry import find, load_entries, resolve
from emloc_core.settings import CompressSettings, TrainSettings
from emloc_core.standins import RECOMMENDED

ENTRIES = load_entries()
#: The same as cases, of which `make test` runs one of text, one of images and one of experts.
DIFFERENT = ("SmolLM2-135M", "InternVL2_5-1B", "gpt-oss-20b")
CASES = [
    pytest.param(entry, id=name, marks=() if name in DIFFERENT else pytest.mark.thorough)
    for entry, name in ((entry, entry.id.rpartition("/")[2]) for entry in ENTRIES)
]

TINY = """
id = "me/tiny"
family = "llama"

[presets.default]
samples = 8

[config]
model_type = "llama"
dtype = "float32"
vocab_size = 128
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
max_position_embeddings = 256
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes an entry: the tiny one, with texts replaced and a text added at its end."""

    def write(name: str = "tiny.toml", *changes: tuple[str, str], more: str = "") -> Path:
        text = TINY
        for old, new in changes:
            assert old in text
            text = text.replace(old, new, 1)
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + more, encoding="utf-8")
        return file

    return write


def refused(function: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    with pytest.raises(EmlocError) as caught:
        function(*arguments, **options)
    return str(caught.value)


def tied_parameters(model: nn.Module) -> int:
    """Return how many parameters the output projection shares with the embedding."""
    if not hasattr(model, "get_output_embeddings"):
        return 0
    head = model.get_output_embeddings().weight
    return head.numel() if head is model.get_input_embeddings().weight else 0


def published(parameters: Parameters) -> tuple[float, int]:
    """Return the number that was published, of parameters or (in GB) of bytes, and how many digits of it."""
    number = parameters.published.rstrip("GMB")
    unit = parameters.published.removeprefix(number)
    return float(number) * {"": 1, "M": 1e6, "B": 1e9, "GB": 1e9}[unit], len(number.replace(".", "").lstrip("0"))


def built(entry: Entry) -> nn.Module:
    family = plugin_manager().family_for(entry.config)
    with entry.config_file() as file:
        return build_model(plugin_manager().objective_of(family).config(file), family, torch.bfloat16)


@pytest.mark.parametrize("entry", CASES)
def test_an_entry_is_the_published_model(entry: Entry) -> None:
    assert entry.parameters is not None
    assert entry.sources["config"]
    assert entry.licence is None or entry.sources["licence"]
    count, digits = published(entry.parameters)
    assert digits >= 3
    assert plugin_manager().family_for(entry.config).name == entry.family
    model = built(entry)
    if text := getattr(model.config, "get_text_config", None):  # by which learning rates are chosen
        assert find_linears(model, plugin_manager().family_for(entry.config)).width == text().hidden_size
    names = model.state_dict().keys()
    tables = sum(buffer.numel() for name, buffer in model.named_buffers() if name in names)
    parameters = tables + sum(parameter.numel() for parameter in model.parameters())
    stored = parameters + tied_parameters(model) * entry.parameters.tied_twice
    size = 2 * stored if entry.parameters.published.endswith("GB") else stored  # bytes of 16 bits
    assert f"{size:.{digits - 1}e}" == f"{count:.{digits - 1}e}"
    linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert set(entry.presets) == {"default", "inference", *(name for name in entry.presets if name.endswith("GB"))}
    for preset in entry.presets.values():
        for target in preset.lora_targets or []:
            assert any(f".{path}".endswith(f".{target}") for path in linears), target


def test_the_series_are_complete() -> None:
    names = {entry.id.rpartition("/")[2] for entry in ENTRIES}
    sizes = {
        "Llama-3.1-": ["8B", "70B", "405B"],
        "Llama-3.2-": ["1B", "3B"],
        "Llama-3.3-": ["70B-Instruct"],
        "Qwen2.5-": ["0.5B", "1.5B", "3B", "7B", "14B", "32B", "72B"],
        "Qwen3-": ["0.6B", "1.7B", "4B", "8B", "14B", "32B", "30B-A3B", "235B-A22B"],
        "Qwen2.5-VL-": ["3B-Instruct", "7B-Instruct", "32B-Instruct", "72B-Instruct"],
        "InternVL2_5-": ["1B", "2B", "4B", "8B", "26B", "38B", "78B"],
        "InternVL3-": ["1B", "2B", "8B", "14B", "38B", "78B"],
        "SmolLM2-": ["135M", "360M", "1.7B"],
        "Qwen3-VL-": [
            "2B-Instruct",
            "4B-Instruct",
            "8B-Instruct",
            "32B-Instruct",
            "30B-A3B-Instruct",
            "235B-A22B-Instruct",
        ],
        "Qwen3-Next-": ["80B-A3B-Instruct"],
        "DeepSeek-": ["V3"],
        "gemma-3-": ["1b-it", "4b-it", "12b-it", "27b-it"],
        "Phi-3-mini-": ["4k-instruct"],
        "Phi-4-mini-": ["instruct"],
        "glm-4-": ["9b-chat-hf"],
        "GLM-4.5-": ["Air"],
        "phi-": ["4"],
        "Mixtral-": ["8x7B-v0.1"],
        "gpt-oss-": ["20b", "120b"],
        "FLUX.": ["1-dev", "1-schnell", "2-dev"],
        "Qwen-": ["Image"],
        "stable-diffusion-": ["3.5-medium"],
        "Z-Image-": ["Turbo"],
    }
    assert names == {series + size for series, ends in sizes.items() for size in ends}
    assert all(entry.layout == ("internvl_chat" if entry.family == "internvl" else None) for entry in ENTRIES)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["SmolLM2-135M", "InternVL2_5-1B"])
def test_a_memory_target_is_planned(name: str) -> None:
    (entry,) = find(name)
    settings = resolve(entry, "inference")
    assert settings.kind == fit(entry, preset="inference").kind == RECOMMENDED[0]
    assert settings.ratio is None
    factors = resolve(entry, "inference", overrides={"kind": "low-rank"}).ratio
    assert factors is not None
    assert 0 < factors < 1
    assert resolve(entry).settled() == CompressSettings(kind="nf4")


def test_another_kind_is_planned_for_a_memory_target(write: Callable[..., Path]) -> None:
    shallow = ("num_hidden_layers = 2", "num_hidden_layers = 1")
    with read_entry(write("tiny.toml", shallow)).config_file() as file:
        model = MemoryModel(file, Workload(1, 16, train=TrainSettings(batch_size=1)), CompressSettings(kind="low-rank"))
        memory = round(model.tuning(model.plan(0.5)).total / 0.95)  # all of it, with the headroom
    target = f'[presets.small]\nmemory = "{memory}"\nlength = 16\nbatch_size = 1\n\n[config]'
    entry = read_entry(write("tiny.toml", shallow, ("[config]", target)))
    assert resolve(entry, overrides={"kind": "nf4"}) == CompressSettings(kind="nf4", samples=8)
    assert resolve(entry, "small", overrides={"kind": "low-rank-nf4", "ratio": 0.2}).ratio == 0.2
    factors = resolve(entry, "small", overrides={"kind": "low-rank-nf4", "samples": 8})
    assert factors.samples == 8
    assert factors.ratio is not None
    assert factors.ratio > (resolve(entry, "small", overrides={"kind": "low-rank"}).ratio or 1)


def test_find() -> None:
    assert [entry.id for entry in find("Qwen/Qwen2.5-7B")] == ["Qwen/Qwen2.5-7B"]
    assert [entry.id for entry in find("qwen2.5-7b")] == ["Qwen/Qwen2.5-7B"]
    assert len(find("Qwen3-*")) == 15
    assert len(find("*/InternVL?*-38B")) == 2
    assert "Did you mean 'Qwen2.5-7B'?" in refused(find, "Qwen2.5-7")
    assert "matches 'Falcon*'" in refused(find, "Falcon*")


def test_entries_of_a_user(write: Callable[..., Path], tmp_path: Path) -> None:
    file = write()
    ids = {entry.id for entry in load_entries([file])}
    assert ids == {entry.id for entry in ENTRIES} | {"me/tiny"}
    write("other.toml", ("me/tiny", "me/other"))
    assert {entry.id for entry in load_entries([tmp_path])} - ids == {"me/other"}
    assert len(load_entries([file, file, Path(registry._PACKAGED[1])])) == len(ENTRIES) + 1  # a file is one entry
    assert "There is no entry at" in refused(load_entries, [tmp_path / "missing.toml"])


def test_two_files_with_one_id(write: Callable[..., Path]) -> None:
    first, second = write("first.toml"), write("second.toml")
    message = refused(load_entries, [first, second])
    assert str(first) in message
    assert str(second) in message
    duplicate = write("taken.toml", ("me/tiny", ENTRIES[0].id))
    assert str(ENTRIES[0].file) in refused(load_entries, [duplicate])


FAULTS = {
    "line": (("samples = 8", "samples = "), "line 6"),
    "unknown field": (('family = "llama"', 'family = "llama"\nlicense = "mit"'), "Did you mean 'licence'?"),
    "unknown setting of a preset": (("samples = 8", "sample = 8"), "'presets.default.sample'. Did you mean 'samples'?"),
    "no size": (("samples = 8", 'memory = "plenty"'), "'plenty' is not a memory size"),
    "samples": (("samples = 8", "samples = 0"), "presets.default.samples = 0"),
    "no preset": (("[presets.default]\nsamples = 8", "[presets]"), "presets"),
    "no id": (('id = "me/tiny"', ""), "id is missing"),
    "no model type": (('model_type = "llama"', ""), "config has no model_type"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_no_entry(write: Callable[..., Path], fault: str) -> None:
    change, expected = FAULTS[fault]
    file = write("tiny.toml", change)
    message = refused(read_entry, file)
    assert message.startswith(str(file))
    assert expected in message


def test_a_wrong_number_of_parameters(write: Callable[..., Path]) -> None:
    file = write(more='[parameters]\npublished = "about 7B"\nsource = "x"\n')
    assert "parameters.published: 'about 7B' is not a number of parameters" in refused(read_entry, file)


@pytest.mark.parametrize("path", ["../model", "/etc", "link/model", "a/../../model"])
def test_a_checkpoint_is_in_the_directory(write: Callable[..., Path], tmp_path: Path, path: str) -> None:
    (tmp_path / "entries").mkdir()
    (tmp_path / "entries" / "link").symlink_to(tmp_path)
    checkpoint = ('family = "llama"', f'family = "llama"\ncheckpoint = "{path}"')
    assert f"{path!r}, outside its directory" in refused(read_entry, write("entries/tiny.toml", checkpoint))


def test_where_the_model_is(write: Callable[..., Path], tmp_path: Path) -> None:
    assert read_entry(write()).model == "me/tiny"
    inside = ('family = "llama"', 'family = "llama"\ncheckpoint = "models/tiny"')
    assert read_entry(write("tiny.toml", inside)).model == str((tmp_path / "models" / "tiny").resolve())


def test_presets() -> None:
    entry = find("Qwen2.5-7B")[0]
    assert "Did you mean 'inference'?" in refused(entry.preset, "inferense")
    train = Preset(lora_targets=["q_proj"], lora_rank=4, batch_size=2).train
    assert (train.target_modules, train.lora_rank, train.batch_size) == (["q_proj"], 4, 2)


def test_a_target_that_nothing_fits(write: Callable[..., Path]) -> None:
    entry = read_entry(write("tiny.toml", ("samples = 8", 'memory = "1MB"\nlength = 64')))
    assert "No emulator's tuning fits 1 MB" in refused(resolve, entry, overrides={"kind": "nf4"})


def test_fingerprints_are_of_values(write: Callable[..., Path]) -> None:
    first = read_entry(write()).fingerprint
    assert read_entry(write("again.toml", ("samples = 8", "samples = 8  # few"))).fingerprint == first
    assert read_entry(write("other.toml", ("samples = 8", "samples = 9"))).fingerprint != first


def plugin(directory: Path, name: str, paths: list[Path]) -> EntryPoint:
    (directory / f"{name}.py").write_text(
        "from pathlib import Path\nfrom emloc_core.hookspecs import hookimpl\n"
        f"@hookimpl\ndef emloc_registry():\n    return [Path(path) for path in {[str(path) for path in paths]!r}]\n"
    )
    return EntryPoint(name, name, "emloc")


def test_entries_of_plugins(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    good = write("good/tiny.toml")
    broken = write("broken.toml", ("samples = 8", "samples = "))
    duplicate = write("taken.toml", ("me/tiny", ENTRIES[0].id))
    manager = PluginManager()
    manager.load(
        [
            plugin(tmp_path, "registry_good", [good.parent]),
            plugin(tmp_path, "registry_broken", [broken]),
            plugin(tmp_path, "registry_taken", [duplicate]),
        ]
    )
    monkeypatch.setattr(registry, "plugin_manager", lambda: manager)
    assert {entry.id for entry in load_entries()} == {entry.id for entry in ENTRIES} | {"me/tiny"}
    errors = {report.name: report.error for report in manager.reports}
    assert errors["registry_good"] is None
    assert "line 6" in str(errors["registry_broken"])
    assert str(ENTRIES[0].file) in str(errors["registry_taken"])
    assert "'registry_broken'" in capsys.readouterr().err
    monkeypatch.setenv("EMLOC_STRICT_PLUGINS", "1")
    assert "registry_broken" in refused(load_entries)


def plan(*arguments: object) -> dict[str, Any]:
    result = CliRunner().invoke(cli, ["plan", *map(str, arguments), "--json"])
    assert result.exception is None, result.exception
    return json.loads(result.stdout)


def test_planning_needs_no_network_and_no_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    report = plan("smollm2-135m", "--memory", "24GB", "--kind", "nf4")
    assert report["model"] == "HuggingFaceTB/SmolLM2-135M"
    assert report["parameters"]["base"] == 134_515_008
    assert not list(tmp_path.iterdir())


def test_planning_from_a_file(write: Callable[..., Path]) -> None:
    assert plan(write(), "--ratio", 0.5, "--memory", "4GB")["family"] == "llama"
    file = write("sizeless.toml", ("hidden_size = 32\n", ""))
    result = CliRunner().invoke(cli, ["plan", str(file)])
    assert str(result.exception).startswith(f"{file} has no hidden_size")


@pytest.mark.thorough
def test_dynamic_rotary_embeddings_are_planned_as_the_default(write: Callable[..., Path]) -> None:
    """They ask for the longest row's length, which InternVL's published configs do."""
    rope = '[config.rope_parameters]\nrope_type = "{}"\nrope_theta = 10000.0\nfactor = 2.0\n'
    kinds = [write(f"{kind}.toml", more=rope.format(kind)) for kind in ("default", "dynamic")]
    default, dynamic = (plan(file, "--ratio", 0.5, "--memory", "4GB")["stages"] for file in kinds)
    assert dynamic == default


def test_nothing_heavy_is_imported() -> None:
    script = "import sys, emloc_core.registry.registry as r; r.load_entries(); print('torch' in sys.modules)"
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "False"


def test_the_page_of_models_is_about_these_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DOCS)
    import generate_models

    text = (DOCS / "models.md").read_text(encoding="utf-8")
    assert re.findall("<!--.*?-->", text) == list(map(generate_models.mark, generate_models.listed_entries())), (
        "run make docs-models"
    )
    lines = text.splitlines()
    for entry in generate_models.listed_entries():
        row, *_ = (line.strip("| ").split(" | ") for line in lines if line.startswith(f"| `{entry.id}` |"))
        fits = dict(zip(generate_models.HEADINGS, row, strict=True))
        for preset in entry.presets.values():  # a memory target that is a card's is one that an emulator is needed for
            if preset.memory not in (None, "inference"):
                (decision,) = (
                    cell for name, cell in fits.items() if name.startswith(preset.memory.replace("GB", " GB"))
                )
                assert decision.partition(",")[0] not in ("whole", "-"), entry.id


@pytest.mark.thorough
def test_the_page_of_models_says_what_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DOCS)
    import generate_models

    lines = (DOCS / "models.md").read_text(encoding="utf-8").splitlines()
    entry = find("SmolLM2-135M")[0]
    figures = generate_models.figures(entry)
    row = f"| `{entry.id}` | {' | '.join(figures[column] for column in generate_models.HEADINGS[1:])} |"
    assert row in lines
