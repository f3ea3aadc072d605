"""Models that no plugin declares: observed, checked, kept, and used again by later stages and processes."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.jobs import compress_job
from support.marks import thorough
from support.models import save_tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from emloc_core.errors import EmlocError
from emloc_core.family import TINY
from emloc_core.files.manifest import read_manifest
from emloc_core.observed import look
from emloc_core.observed.record import DECLARATIONS, KNOWN, digest, from_record, recall, to_record
from emloc_core.plugins.manager import STRICT, plugin_manager
from emloc_core.scaffold import scaffold
from emloc_core.scaffold.observe import ROUTED
from emloc_core.scaffold.stored import UNREAD
from emloc_core.settings import CompressSettings
from emloc_core.standins.experts import StandInExperts

#: Attention and MLP in parallel, one after the other, with norms behind them; fused Linears; a tower of another name;
#: transposed weights.
TYPES = (
    "gpt2",
    *thorough("granite", "gpt_neox", "opt"),
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("olmo2", "bloom", "cohere")),
)
#: Sizes that these types call by other names.
OTHER_NAMES = {"opt": {"ffn_dim": 64, "word_embed_proj_dim": 32}}
TRAIN = ("--steps", 2, "--lr", "1e-2")


def model_of(model_type: str, directory: Path) -> Path:
    return save_tiny_model({"model_type": model_type, **TINY, **OTHER_NAMES.get(model_type, {})}, directory)


def content(model_type: str, **settings: object) -> dict:
    """The content of the config.json of a model type, as a user has it."""
    return json.loads(AutoConfig.for_model(model_type, **settings).to_json_string(use_diff=False))


@pytest.fixture(autouse=True)
def a_new_process():
    """Forget what other tests observed."""
    KNOWN.clear()
    yield
    KNOWN.clear()


@pytest.fixture
def unchecked(monkeypatch) -> None:
    """Leave out the checks of what is observed, which take most of the time."""
    monkeypatch.setattr(look, "_require_checks", lambda _: None)


@pytest.fixture
def never_again(monkeypatch) -> Callable[[], None]:
    """Begin a new process, as far as families go, in which looking at a model is an error."""

    def begin() -> None:
        KNOWN.clear()
        monkeypatch.setattr(look, "_draft", lambda *_: pytest.fail("the model was looked at again"))

    return begin


@pytest.mark.parametrize("model_type", TYPES)
def test_every_stage_runs_and_later_ones_use_the_declaration_that_was_stored(
    model_type, emloc, rows_file, tmp_path, never_again
):
    model = model_of(model_type, tmp_path / "model")
    data = ("--data", rows_file)
    code, _, err = emloc("compress", model, *data, "-o", tmp_path / "emulator", "--samples", 8, "--selection", 4)
    assert code == 0, err
    assert f"No plugin declares '{model_type}'; observed: " in err
    assert "all checks passed" in err
    never_again()
    steps = (
        ("train", tmp_path / "emulator", *data, "-o", tmp_path / "adapter", *TRAIN),
        ("correct", tmp_path / "adapter", "-o", tmp_path / "corrected"),
        ("polish", tmp_path / "corrected", *data, "-o", tmp_path / "polished", *TRAIN),
        ("merge", tmp_path / "polished", "-o", tmp_path / "merged"),
        ("export", tmp_path / "polished", "-o", tmp_path / "served"),
    )
    for step in steps:
        never_again()
        code, _, err = emloc(*step)
        assert code == 0, err
        assert "No plugin declares" not in err
    outputs = ("emulator", "adapter", "corrected", "polished", "merged", "served")
    stored = [read_manifest(tmp_path / name)[DECLARATIONS] for name in outputs]
    assert all(declarations == stored[0] for declarations in stored)
    assert stored[0][0]["config"] == digest(json.loads((model / "config.json").read_text()))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.model_type == model_type


@pytest.mark.thorough
def test_a_model_that_reads_answers_in_both_directions_by_their_token_types_is_refused():
    """PaliGemma 2: a text without token types is read in one."""
    with pytest.raises(EmlocError, match="The logits of a token depend on later ones"):
        plugin_manager().family_for(content("paligemma", text_config={"model_type": "gemma2"}))


def test_strictness_refuses_what_would_be_observed_and_what_was(emloc, rows_file, tmp_path, monkeypatch):
    model = model_of("granite", tmp_path / "model")
    compress = ("compress", model, "--data", rows_file, "-o", tmp_path / "emulator", "--kind", "nf4", "--selection", 4)
    code, _, err = emloc("--strict-families", *compress)
    assert (code, "No installed family declares the model type 'granite'" in err) == (1, True)
    assert emloc(*compress)[0] == 0  # the option holds for one command
    monkeypatch.setenv(STRICT, "1")
    code, _, err = emloc("train", tmp_path / "emulator", "--data", rows_file, "-o", tmp_path / "adapter", *TRAIN)
    assert (code, "No installed family declares the model type 'granite'" in err) == (1, True)


@pytest.mark.parametrize(
    ("model_type", "reason", "code"),
    [
        ("bart", "is an encoder-decoder", "unsupported"),
        ("clip", "neither a causal language model nor an image-text model", "unsupported"),
        ("roberta", "The logits of a token depend on later ones", "unsupported"),
        *thorough(("blt", "The code of this 'blt' fails (ValueError: Expected parameter logits", "plugin")),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_reason(model_type, reason, code):
    with pytest.raises(EmlocError, match="No plugin declares the model type") as refused:
        plugin_manager().family_for(content(model_type))
    assert reason in str(refused.value)
    assert refused.value.code == code


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("model_type", ["gemma", *thorough("phi")])
def test_a_model_type_that_another_family_has_for_a_name_is_observed(model_type):
    (other,) = [family for family in plugin_manager().families() if family.name == model_type]
    family = plugin_manager().family_for(content(model_type))
    assert (family.name, family.model_types) == (f"{model_type}_model", {model_type})
    assert other in plugin_manager().families()
    record = family.observed[0]
    recall({DECLARATIONS: [{**record, "family": {**record["family"], "name": other.name}}]})  # of an earlier version
    assert plugin_manager().family_for(content(model_type)).name == other.name


@pytest.mark.usefixtures("unchecked")
def test_what_was_observed_is_kept_by_config(tmp_path, monkeypatch, never_again):
    monkeypatch.setenv("EMLOC_CACHE", str(tmp_path))
    parallel, serial = (content("stablelm", use_parallel_residual=value) for value in (True, False))
    families = [plugin_manager().family_for(config) for config in (parallel, serial)]
    assert [len(family.towers[0].input_groups[0]) for family in families] == [5, 3]  # gate and up read it too, or not
    never_again()
    assert [plugin_manager().family_for(config) for config in (parallel, serial)] == families
    with pytest.raises(pytest.fail.Exception):
        plugin_manager().family_for({**serial, "num_hidden_layers": 3})


def test_a_record_is_the_same_for_what_is_made_from_the_model():
    base = content("granite")
    emulator = {
        **base,
        "quantization_config": {"ranks": {}},
        "emloc_kind": "nf4",
        "dtype": "bfloat16",
        "transformers_version": "9",
    }
    assert digest(base) == digest(emulator)
    assert digest(base) != digest({**base, "hidden_size": 64})


@pytest.mark.thorough
def test_a_bias_that_is_tied_is_as_good_as_a_weight():
    bert = content("bert", is_decoder=True)  # whose output layer shares its bias with what is before it
    family = plugin_manager().family_for(bert)
    assert {tower.name for tower in family.towers} == {"language"}


@pytest.mark.usefixtures("unchecked")
def test_a_record_that_a_stranger_changed_is_not_used(tmp_path):
    config = content("granite")
    family = plugin_manager().family_for(config)
    record = to_record(family, config, "seen")
    assert from_record(record).towers == family.towers
    for name, value in [
        ("auto_class", "Trainer"), ("auto_class", "pipeline"), ("modality", "video"),
        ("towers", [{"name": "language"}]), ("keep_dense", ["lm_head"]),
    ]:  # fmt: skip
        changed = {**record, "family": {**record["family"], name: value}}
        (tmp_path / "emloc.json").write_text(json.dumps({"kind": "emulator", DECLARATIONS: [changed, 5, {}]}))
        KNOWN.clear()
        recall(read_manifest(tmp_path))
        assert not KNOWN, name


@pytest.mark.usefixtures("unchecked")
def test_fused_experts_are_compressed_where_a_forward_shows_that_their_layout_is_known(monkeypatch):
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = content("mixtral")
    (tower,) = plugin_manager().family_for(config).towers
    assert tower.experts == ["mlp.experts"]
    plain = MixtralExperts.forward
    monkeypatch.setattr(MixtralExperts, "forward", lambda self, *args: 2 * plain(self, *args))
    KNOWN.clear()
    family = plugin_manager().family_for(config)
    assert not family.towers[0].experts
    assert family.keep_dense["model.layers.*.mlp.experts"] == ROUTED


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("model_type", "compressed"),
    [  # transposed, with biases; transposed; with a norm; in a class that transformers does not mark
        ("gpt_oss", True),
        *thorough(("aria_text", True), ("muse_spark", True), ("llama4_text", False)),
    ],
)
def test_experts_of_other_layouts_are_compressed_too_or_stay_dense_for_a_reason(model_type, compressed):
    family = plugin_manager().family_for(content(model_type))
    experts = [path for tower in family.towers for path in tower.experts]
    assert experts == (["mlp.experts"] if compressed else [])
    assert compressed == (ROUTED not in family.keep_dense.values())


@pytest.mark.thorough
def test_experts_of_another_layout_are_packed_and_loaded(rows_file, tmp_path):
    sizes = {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", *["full_attention"] * 2],
    }
    base = save_tiny_model({"model_type": "gpt_oss", **TINY, **sizes}, tmp_path / "base")
    emulator = compress_job(base, rows_file, tmp_path / "emulator", CompressSettings(samples=4, selection=2)).run()
    small, ids = AutoModelForCausalLM.from_pretrained(emulator).eval(), torch.arange(5, 40)[None]
    stacks = [module for module in small.modules() if isinstance(module, StandInExperts)]
    assert [sorted(stack.ranks) for stack in stacks] == [["down_proj", "gate_up_proj"]] * 3
    small.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        logits = small(ids).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()(ids).logits, logits)
        exact = AutoModelForCausalLM.from_pretrained(base).eval()(ids).logits
    assert 1e-3 < float((logits - exact).norm() / exact.norm()) < 0.5


def test_a_cast_to_the_dtype_of_a_weight_by_another_name_is_found_by_an_emulator_of_packed_weights(monkeypatch):
    from transformers.models.granite.modeling_granite import GraniteMLP

    def forward(self, hidden):
        weight = self.up_proj.weight
        return self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden.to(weight.dtype)))

    monkeypatch.setattr(GraniteMLP, "forward", forward)
    with pytest.raises(EmlocError, match="the check 'packed' fails"):
        plugin_manager().family_for(content("granite"))


@pytest.mark.thorough
def test_where_no_image_can_be_made_up_the_language_tower_is_observed_on_text_and_that_is_said():
    family = plugin_manager().family_for(content("git"))
    assert [tower.name for tower in family.towers] == ["language"]
    assert family.modality == "image-text"
    assert "on text alone, since no image could be made up" in family.observed[0]["found"]


@pytest.mark.thorough
def test_a_model_that_takes_no_row_without_an_image_is_observed_with_one():
    towers = plugin_manager().family_for(content("blip-2")).towers
    assert [tower.blocks.partition(".")[0] for tower in towers] == ["vision_model", "qformer", "language_model"]


@pytest.mark.thorough
@pytest.mark.usefixtures("unchecked")
def test_a_linear_of_which_nothing_reads_some_outputs_stays_dense():
    family = plugin_manager().family_for(content("deepseek_v4"))
    assert family.keep_dense["model.layers.*.self_attn.compressor.kv_proj"] == UNREAD


def test_a_block_that_no_tiny_model_has_is_refused(monkeypatch):
    monkeypatch.setattr(scaffold, "undeclared", lambda *_: ["model.layers.7.odd_proj"])
    with pytest.raises(EmlocError, match=r"model.layers.7.odd_proj \(1 in all\) is in no group"):
        plugin_manager().family_for(content("granite"))


@pytest.mark.slow
def test_a_zoo_converts_a_model_that_no_plugin_declares(rows_file, tmp_path):
    """Its worker is another process, as on a cluster."""
    model_of("olmo2", tmp_path / "models" / "olmo")
    command = ["zoo", "convert", tmp_path / "models", "--data", rows_file, "-o", tmp_path / "zoo", "--samples", "8"]
    process = subprocess.run(
        [sys.executable, "-m", "emloc_core", *map(str, command)], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    (emulator,) = (tmp_path / "zoo").rglob("emulator/emloc.json")
    assert read_manifest(emulator.parent)[DECLARATIONS][0]["family"]["model_types"] == ["olmo2"]
