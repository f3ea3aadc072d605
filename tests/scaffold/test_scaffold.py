"""``emloc families scaffold``: what is observed in a model, and drafts that the conformance kit accepts."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from support.marks import most_thorough, thorough
from support.paths import ROOT
from torch import nn
from transformers import AutoConfig

from emloc_core.cli import cli
from emloc_core.conformance import check_family
from emloc_core.errors import EmlocError
from emloc_core.family import TINY, Family
from emloc_core.plugins.manager import plugin_manager
from emloc_core.scaffold import merge
from emloc_core.scaffold.config_arguments import make_config
from emloc_core.scaffold.deduce import LOST, UNREACHED
from emloc_core.scaffold.draft import Draft
from emloc_core.scaffold.observe import GATE, LISTED, OTHER, READ, ROUTED, ROUTER, UNCALLED, Observation, block_lists
from emloc_core.scaffold.scaffold import _empty_family, check_draft, scaffold
from emloc_core.scaffold.shrink import shrink
from emloc_core.scaffold.stored import OTHERWISE, TIED, UNNAMED

#: Architectures whose draft has to be accepted without an edit.
TEXT = ("gpt_neox", "gemma3_text", "phi3", "mistral", "olmo2")
#: idefics3 asks a model without weights where it is; lfm2_vl takes a list of patches, with a mask and their grid.
IMAGES = ("llava", "gemma3", "llava_onevision", "idefics3", "lfm2_vl")
MORE = [
    *thorough(*TEXT[1:3], *IMAGES[3:]),
    *(pytest.param(name, marks=pytest.mark.slow) for name in (*TEXT[3:], *IMAGES[1:3])),
]
#: What else a config of Qwen4-Exp needs to have an indexer.
QWEN4_EXP = {"indexer_n_heads": 16, "indexer_kv_heads": 1, "indexer_head_dim": 256}
#: What a config.json of Qwen3-VL says beyond the defaults.
QWEN3_VL = {
    "text_config": {
        "eos_token_id": 151645,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]},
    }
}
#: Lines of a declaration at most, where there is one tower.
MOST_LINES = 40


@pytest.fixture
def save(tmp_path):
    """Write the config of a model type, with the class's defaults and what is given, and return the file."""

    def write(model_type: str, **settings) -> Path:
        file = tmp_path / f"{model_type}.json"
        file.write_text(json.dumps(AutoConfig.for_model(model_type, **settings).to_dict()))
        return file

    return write


def declared(draft: Draft) -> Family:
    """Execute the draft's source as a plugin is, and return the family that it declares."""
    module: dict = {}
    exec(draft.source, module)
    (family,) = module["emloc_families"]()
    return family


def groups(family: Family) -> dict[str, list[list[str]]]:
    """Return the input groups of every tower by the path of its blocks."""
    return {tower.blocks: [list(group) for group in tower.input_groups] for tower in family.towers}


@pytest.mark.parametrize("model_type", [*thorough(TEXT[0], IMAGES[0]), *MORE])
def test_the_kit_accepts_the_draft_without_an_edit(save, model_type):
    draft = scaffold(save(model_type))
    results = check_family(declared(draft))
    assert len(results) > 10
    assert [f"{result.check}: {result}" for result in results if not result.passed] == []
    assert not [note for note in draft.notes if note.startswith("Edit")]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("model_type", "switch", "value"),
    [
        ("falcon", "parallel_attn", True),
        ("falcon", "parallel_attn", False),
        ("stablelm", "use_parallel_residual", True),
    ],
)
def test_every_branch_of_an_architecture_is_observed_and_has_a_tiny_config(save, model_type, switch, value):
    draft = scaffold(save(model_type, **{switch: value}))
    family = declared(draft)
    (tower,) = family.towers
    first, following = tower.input_groups[0], list(tower.input_groups[1:])
    assert not [path for path in first if path.startswith("mlp.")]  # it reads another input in one of the branches
    assert [group[0].partition(".")[0] for group in following] == [first[0].partition(".")[0], "mlp", "mlp"]
    assert len(family.tiny_configs) == 2
    assert any(note.startswith("Note: with ") for note in draft.notes)
    assert [f"{result.check}: {result}" for result in check_family(family) if not result.passed] == []


def test_groups_of_all_kinds_of_block_stand_as_they_run():
    """Attention and convolution never run in one block; the feed-forward Linears run behind either."""
    alike = frozenset({frozenset(("w1", "w3")), frozenset(("q", "k"))})
    convolution = merge.Block(["in_proj", "w1", "w3", "w2"], alike, {})
    attention = merge.Block(["q", "k", "o", "w1", "w3", "w2"], alike, {})
    stack = merge.merged("layers", [convolution, attention])
    assert stack.groups == [["in_proj"], ["q", "k"], ["o"], ["w1", "w3"], ["w2"]]
    parallel = merge.Block(["q", "k", "w1"], alike | {frozenset(pair) for pair in (("q", "w1"), ("k", "w1"))}, {})
    serial = merge.Block(["q", "k", "w1"], alike, {"o": "dense in this one"})
    stack = merge.merged("layers", [parallel, serial, attention])
    assert stack.groups == [["q", "k"], ["w1", "w3"], ["w2"]]
    assert stack.dense == {"o": "dense in this one"}


@pytest.mark.parametrize("model_type", most_thorough(TEXT, *TEXT[:2]))
def test_a_declaration_takes_few_lines(save, model_type):
    declaration = scaffold(save(model_type)).source.partition("= Family(")[2].partition("@hookimpl")[0]
    assert 15 < len(declaration.strip().splitlines()) <= MOST_LINES


@pytest.mark.parametrize("model_type", most_thorough(["phi3", "gemma3", "deepseek_v3"], "phi3"))
def test_the_source_is_formatted_and_free_of_lint(save, tmp_path, model_type):
    file = tmp_path / "draft.py"
    file.write_text(scaffold(save(model_type)).source)
    root = ROOT
    for command in (["format", "--check"], ["check"]):
        process = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--config", root / "pyproject.toml", file],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert process.returncode == 0, process.stdout


@pytest.mark.parametrize(
    "model_type", most_thorough(["llama", "qwen2", "qwen3", "qwen3_moe", "internvl"], "llama", "qwen3_moe")
)
def test_families_in_the_tree_are_found_again(save, model_type):
    file = save(model_type)
    draft = scaffold(file)
    config = json.loads(file.read_text())
    family = plugin_manager().family_for(config)
    with plugin_manager().declaring(declared(draft)):
        again = plugin_manager().family_for(config)
    experts = any(tower.experts for tower in again.towers)
    expected = {
        blocks: [group for group in listed if not (experts and group[0].startswith("mlp."))]  # all layers have experts
        for blocks, listed in groups(family).items()
    }
    assert groups(again) == expected
    assert again.modality == family.modality
    assert again.auto_class == family.auto_class
    assert "declares" in draft.notes[0]


@pytest.mark.thorough
def test_mergers_between_the_blocks_of_a_tower_are_no_tower(save):
    draft = scaffold(save("qwen3_vl", **QWEN3_VL))
    assert [tower.blocks for tower in draft.family.towers] == ["model.visual.blocks", "model.language_model.layers"]
    assert "in between" in draft.family.keep_dense["model.visual.deepstack_merger_list.*"]
    assert [result.check for result in check_family(declared(draft)) if not result.passed] == []


def test_fused_experts_of_a_known_layout_are_compressed_and_get_no_lora(save):
    """In some model types, PEFT mistakes the names of MLPs for names of experts."""
    draft = scaffold(save("deepseek_v3"))
    (tower,) = draft.family.towers
    assert tower.experts == ["mlp.experts"]
    assert ["mlp.gate_proj", "mlp.up_proj"] in tower.input_groups  # of the layers without experts
    assert ["self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"] in tower.input_groups
    assert "o_proj" in tower.lora_targets
    assert not [target for target in tower.lora_targets if target.endswith(("gate_proj", "up_proj", "down_proj"))]
    assert any("gets no LoRA by default" in note for note in draft.notes)


@pytest.mark.thorough
def test_what_no_gradient_reaches_gets_no_lora(save):
    """An indexer ranks tokens; which ones come first has no derivative."""
    draft = check_draft(scaffold(save("deepseek_v32")))
    (tower,) = draft.family.towers
    assert any("self_attn.indexer.wk" in group for group in tower.input_groups)
    assert not [target for target in tower.lora_targets if "indexer" in target or target in ("wk", "wq_b")]
    assert any("indexer.wk" in note and "no gradient reaches it" in note for note in draft.notes)
    assert not [note for note in draft.notes if note.startswith("Edit")]


@pytest.mark.thorough
def test_what_peft_drops_as_it_loads_an_adapter_gets_no_lora(save):
    """A renaming of old checkpoints matches the model's own names of its shared experts."""
    draft = check_draft(scaffold(save("laguna")))
    (tower,) = draft.family.towers
    assert ["mlp.shared_experts.down_proj"] in tower.input_groups
    assert "mlp.down_proj" in tower.lora_targets
    assert "down_proj" not in tower.lora_targets
    assert any("shared_experts.down_proj" in note and LOST in note for note in draft.notes)
    assert not [note for note in draft.notes if note.startswith("Edit")]


@pytest.mark.thorough
def test_weights_that_are_stored_together_stay_dense(save):
    draft = check_draft(scaffold(save("qianfan_ocr")))
    assert draft.family.keep_dense["model.vision_tower.layers.*.attention.q_proj"] == OTHERWISE
    (language,) = [tower for tower in draft.family.towers if tower.name == "language"]
    assert "q_proj" not in language.lora_targets  # which would be the vision tower's too
    assert not [note for note in draft.notes if note.startswith("Edit")]


@pytest.mark.thorough
def test_a_weight_of_another_name_in_the_checkpoint_stays_dense(save):
    draft = check_draft(scaffold(save("inkling2_text")))
    assert draft.family.keep_dense["model.layers.*.self_attn.k_proj.sconv.weight_proj"] == UNNAMED
    assert not [note for note in draft.notes if note.startswith("Edit")]


@pytest.mark.thorough
def test_a_module_outside_the_blocks_that_runs_twice_needs_no_edit(save):
    """Streaming reads what is outside the blocks again."""
    draft = check_draft(scaffold(save("ovis2")))
    assert draft.family.modality == "image-text"
    assert not [note for note in draft.notes if note.startswith("Edit")]


@pytest.mark.thorough
def test_towers_that_text_and_images_do_not_reach_need_no_edit(save):
    draft = scaffold(save("video_llava"))
    assert draft.family.keep_dense["model.video_tower.*"] == UNREACHED
    assert [note.partition(":")[0] for note in draft.notes if "video_tower" in note] == ["Check"]


def test_a_weight_that_is_used_without_a_call_stays_dense(save):
    draft = scaffold(save("mamba"))
    assert draft.family.keep_dense["backbone.layers.*.mixer.dt_proj"] == UNCALLED
    assert any(note.startswith("Check") and "dt_proj" in note for note in draft.notes)


@pytest.mark.thorough
def test_a_weight_that_a_kernel_takes_stays_dense(save):
    """In training on a GPU alone, which no forward here shows."""
    settings = {"time_step_limit": [0.0, 100.0], "attn_layer_indices": [1]}
    draft = scaffold(save("bamba", **settings))
    assert draft.family.keep_dense["model.layers.*.mamba.out_proj"] == READ
    (tower,) = draft.family.towers
    assert [group[0] for group in tower.input_groups] == [
        "mamba.in_proj", "self_attn.q_proj", "self_attn.o_proj", "feed_forward.gate_proj", "feed_forward.down_proj",
    ]  # fmt: skip
    grouped = replace(tower, input_groups=[tower.input_groups[0], ["mamba.out_proj"], *tower.input_groups[1:]])
    kept = {name: why for name, why in draft.family.keep_dense.items() if why != READ}
    (failed,) = [result for result in check_family(replace(draft.family, towers=[grouped], keep_dense=kept))
                 if not (result.passed or result.blocked)]  # fmt: skip
    assert failed.check == "linears"
    assert "BambaMixer reads the weight of model.layers.0.mamba.out_proj without calling it" in failed.message


def test_what_the_kit_finds_wrong_is_named(save):
    draft = scaffold(save("starcoder2"))  # which the kit accepts: see test_the_command_speaks_json
    tower = draft.family.towers[0]
    broken = Draft(Family(**{**vars(draft.family), "towers": [tower], "keep_dense": {"head": "none is there"}}), "")
    assert any(note.startswith("Edit: the check 'names' fails") for note in check_draft(broken).notes)


def test_a_family_has_a_name_that_a_package_can_have():
    family = _empty_family(AutoConfig.for_model("bert-generation"))
    assert (family.name, family.model_types) == ("bert_generation", {"bert-generation"})


def test_a_draft_has_a_name_that_no_other_family_has(save, tmp_path):
    file = save("gemma")
    scaffolded = run(file)
    name = re.search("families new (.*) --from", scaffolded.stderr)[1]
    new = ["families", "new", name, "--from", str(file), "-o", str(tmp_path / "plugin")]
    assert CliRunner().invoke(cli, new).exception is None
    assert _empty_family(AutoConfig.for_model("llama")).name == "llama"  # which declares this type


def test_infinity_in_a_config_is_drafted(save):
    file = save("mamba2", time_step_limit=[0.5, math.inf])
    assert "[0.5, Infinity]" in file.read_text()
    (tiny,) = declared(scaffold(file)).tiny_configs
    assert tiny["time_step_limit"] == [0.5, math.inf]


def test_what_is_no_family_is_refused(save, tmp_path, monkeypatch):
    def refused(file: Path) -> str:
        with pytest.raises(EmlocError) as caught:
            scaffold(file)
        return str(caught.value)

    assert "encoder-decoder" in refused(save("t5"))
    assert "neither a causal language model nor" in refused(save("vit"))
    unknown = tmp_path / "unknown.json"
    unknown.write_text('{"model_type": "nothing_of_that_name"}')
    assert "transformers cannot read" in refused(unknown)
    unknown.write_text("{")
    assert "is not valid JSON" in refused(unknown)
    monkeypatch.setattr("emloc_core.scaffold.scaffold.TINY_PARAMETERS", 10_000)
    large = refused(save("phi3"))
    assert "cannot be shrunk" in large
    assert "parameters are left; large: no size by name" in large
    assert "cannot be shrunk" in refused(save("deepseek_v2"))  # its defaults lack what its forward needs
    assert "AutoModelForCausalLM cannot build" in refused(save("phi", hidden_act="none_of_that_name"))


def test_a_model_without_blocks_is_refused(save, monkeypatch):
    monkeypatch.setattr("emloc_core.scaffold.scaffold.block_lists", lambda _: [])
    with pytest.raises(EmlocError, match="no list of blocks"):
        scaffold(save("phi3"))


def test_a_model_is_opened_whole_where_its_text_alone_could_not_be_opened_again(save):
    words = ("<image>", "<|extra_200|>", "<|visual token 000000|>")
    family = scaffold(save("emu3", vocabulary_map=dict(zip(words, (9, 10, 11), strict=True))), alone=True).family
    assert family.auto_class == "AutoModelForImageTextToText"


def test_a_tiny_config_is_taken_as_it_is(save):
    (tiny,) = scaffold(save("phi3", **TINY)).family.tiny_configs
    assert {name: tiny.get(name) for name in TINY if name in tiny} == {
        name: TINY[name] for name in TINY if name in tiny
    }
    assert tiny["hidden_size"] == TINY["hidden_size"]
    assert tiny["num_hidden_layers"] == TINY["num_hidden_layers"]


def test_shrinking_keeps_heads_dividing_and_a_block_of_each_kind():
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    small = shrink(AutoConfig.for_model("gemma3_text", num_hidden_layers=12, layer_types=kinds * 2))
    assert small["layer_types"] == ["sliding_attention", "full_attention"]
    assert small["num_hidden_layers"] == 2
    config = AutoConfig.for_model("qwen2", num_attention_heads=28, num_key_value_heads=4, hidden_size=3584)
    small = shrink(config)
    assert small["num_attention_heads"] % small["num_key_value_heads"] == 0
    assert small["num_key_value_heads"] < small["num_attention_heads"]
    one = AutoConfig.for_model("llama", num_attention_heads=32, num_key_value_heads=1)
    assert shrink(one)["num_key_value_heads"] == 1
    assert "num_key_value_heads" not in shrink(AutoConfig.for_model("llama", num_attention_heads=32))
    vision = {"depth": 8, "fullatt_block_indexes": [3, 7]}
    small = shrink(AutoConfig.for_model("qwen2_5_vl", vision_config=vision))["vision_config"]
    assert (small["depth"], small["fullatt_block_indexes"]) == (3, [1])  # one without, one with, one behind it
    wide = {"05": {"head_dim": 512}, "11": {"head_dim": 512}}
    kinds = [*kinds, *kinds]
    single = shrink(AutoConfig.for_model("gemma4_text", num_hidden_layers=12, layer_types=kinds, per_layer_config=wide))
    assert single["num_hidden_layers"] == 2
    hybrid = shrink(AutoConfig.for_model("jamba", num_hidden_layers=32))
    assert hybrid["num_hidden_layers"] == 8  # a whole period


def test_shrinking_keeps_what_is_equal_or_adds_up():
    """Sizes under names of their own follow those that they were equal to."""
    small = shrink(AutoConfig.for_model("inkling2"))
    assert small["vision_config"]["text_hidden_size"] == small["text_config"]["hidden_size"]
    assert shrink(AutoConfig.for_model("muse_glimmer"))["out_hidden_size"] == 4 * 64  # four patches side by side
    small = shrink(AutoConfig.for_model("gemma3n_text", num_kv_shared_layers=15))
    assert (small["num_kv_shared_layers"], small["num_hidden_layers"]) == (2, 6)  # a sliding one and a full one
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [8, 12, 12]}
    small = shrink(AutoConfig.for_model("glm4v_text", rope_parameters=rope))
    assert small["rope_parameters"]["mrope_section"] == [2, 1, 1]  # a quarter of 16, in the same order
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [22, 22, 20]}
    small = shrink(AutoConfig.for_model("ernie4_5_vl_moe_text", rope_parameters=rope))
    assert small["rope_parameters"]["mrope_section"] == [3, 3, 2]


def test_shrinking_keeps_a_projection_of_embeddings():
    for width, expected in ((512, 32), (1024, 64)):
        small = make_config(shrink(AutoConfig.for_model("opt", hidden_size=1024, word_embed_proj_dim=width)))
        assert (small.hidden_size, small.word_embed_proj_dim) == (64, expected)


def test_shrinking_keeps_heads_wider_than_the_model():
    small = make_config(shrink(AutoConfig.for_model("zamba2", use_shared_attention_adapter=True)))
    assert small.attention_head_dim * small.num_attention_heads == small.attention_hidden_size == 2 * small.hidden_size


@pytest.mark.parametrize(("scale_factor", "patches"), [(2, 8), (3, 9), (4, 8)])
def test_shrinking_keeps_patches_in_whole_squares(scale_factor, patches):
    vision = make_config(shrink(AutoConfig.for_model("idefics3", scale_factor=scale_factor))).vision_config
    assert vision.image_size == patches * vision.patch_size


def test_shrinking_keeps_a_block_at_which_something_happens():
    """The section around a tower may repeat the place, and wins."""
    vision = make_config(shrink(AutoConfig.for_model("minicpmv4_6"))).vision_config
    assert (vision.insert_layer_id, vision.num_hidden_layers) == (1, 3)


def test_shrinking_keeps_blocks_on_both_sides_of_a_boundary():
    kinds = ["conv", "conv", "full_attention", "conv"] * 2
    small = shrink(AutoConfig.for_model("lfm2_moe", num_hidden_layers=8, layer_types=kinds, num_dense_layers=3))
    assert small["layer_types"] == ["conv", "full_attention", "conv", "full_attention"]
    assert make_config(small).num_dense_layers == 2
    config = AutoConfig.for_model("deepseek_v3", num_hidden_layers=12, first_k_dense_replace=5)
    assert shrink(config)["first_k_dense_replace"] == 1
    assert make_config(shrink(config, 3)).first_k_dense_replace == 3


def test_blocks_with_what_no_block_of_the_tiny_model_holds_are_added_to_it(save):
    """Blocks share weights, with an adapter for each block: a block alone looks as if it had a single adapter."""
    draft = scaffold(save("zamba2"), alone=True)
    assert not [note for note in draft.notes if note.startswith("Edit")]
    (tiny,) = draft.family.tiny_configs
    assert tiny["layers_block_type"].count("hybrid") == 2
    (tower,) = draft.family.towers
    assert not [path for group in tower.input_groups for path in group if "shared" in path]
    dense = draft.family.keep_dense.items()
    assert {why for path, why in dense if path.endswith("transformer.self_attn.q_proj")} == {TIED}


def test_shrinking_keeps_the_key_value_heads_of_some_blocks_dividing():
    small = shrink(AutoConfig.for_model("inkling_text"))
    assert (small["swa_num_attention_heads"], small["swa_num_key_value_heads"]) == (4, 2)


def test_shrinking_keeps_an_indexer_choosing():
    small = shrink(AutoConfig.for_model("qwen4_exp_text", indexer_budget=2048, indexer_compress_ratio=16, **QWEN4_EXP))
    assert (small["indexer_budget"], small["indexer_compress_ratio"]) == (8, 4)  # fewer than a row has tokens


def test_shrinking_places_a_mark_that_the_config_leaves_open():
    small = shrink(AutoConfig.for_model("blip-2"))
    assert 0 < small["image_token_index"] < 128


def test_shrinking_keeps_what_makes_a_model_itself():
    granite = {"attention_multiplier": 0.0078125, "embedding_multiplier": 12.0, "logits_scaling": 16.0}
    small = shrink(AutoConfig.for_model("granite", **granite, attention_dropout=0.1, rms_norm_eps=1e-5))
    assert granite.items() <= small.items()
    assert not {"attention_dropout", "rms_norm_eps", "initializer_range"} & small.keys()
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 8192
    small = shrink(AutoConfig.for_model("llama", rope_parameters=rope, max_position_embeddings=131072))
    assert small["rope_parameters"] == {**rope, "original_max_position_embeddings": 128}
    assert shrink(AutoConfig.for_model("lfm2", block_ff_dim=12288))["intermediate_size"] <= 96
    kinds = ["conv", "conv", "full_attention"]
    assert shrink(AutoConfig.for_model("lfm2", num_hidden_layers=6, layer_types=kinds * 2))["layer_types"] == kinds[1:]


class Scaled(nn.Linear):
    """A Linear that computes something else."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class Experts(nn.Module):
    """Fused experts."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8, 8))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.weight[0]


class Block(nn.Module):
    """A block with one of everything that a Linear can be."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.near, self.twice, self.idle, self.scaled = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), Scaled(8, 8)
        self.moe = nn.ModuleDict({"router": nn.Linear(8, 3), "experts": Experts(), "gate": nn.Linear(8, 1)})
        self.convolution = nn.Conv1d(5, 5, 3, padding=1)
        self.branches = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.halves = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out = self.v(hidden.clone()) + self.q(hidden) + self.k(hidden)
        out = out + self.near(hidden + 1e-3)  # almost the same input is another one
        out = self.twice(self.twice(out)) + self.scaled(out)
        out = out + self.moe["experts"](out) * self.moe["gate"](out) + self.moe["router"](out).sum()
        out = out + self.convolution(out)
        out = out + sum(branch(out) for branch in self.branches)
        return out + torch.cat([self.halves[0](out[:, :2]), self.halves[1](out[:, 2:])], dim=1)  # as experts are given


class Mixer(nn.Module):
    """Holds one Linear, smaller than a block."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.linear(hidden)


class Model(nn.Module):
    """Two stacks, of which the second in the tree runs first; mixers in between; a list that no forward reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.late = nn.ModuleList([Block() for _ in range(3)])
        self.early = nn.ModuleList([Mixer() for _ in range(2)])
        self.mixers = nn.ModuleList([Mixer() for _ in range(2)])
        self.unused = nn.ModuleList([Mixer() for _ in range(2)])
        self.head = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, hidden: torch.Tensor, use_cache: bool) -> torch.Tensor:
        assert not use_cache
        for block in self.early:
            hidden = block(hidden)
        for index, block in enumerate(self.late):
            hidden = block(hidden)
            if index < len(self.mixers):
                hidden = hidden + self.mixers[index](hidden)
        return hidden


@pytest.fixture(scope="module")
def observation() -> Observation:
    torch.manual_seed(0)
    model = Model().eval()
    return Observation(model, block_lists(model), {"hidden": torch.randn(1, 5, 8)})


def test_lists_of_blocks_hold_linears_and_are_not_nested():
    assert block_lists(Model()) == ["late", "early", "mixers", "unused"]


def test_stacks_stand_in_order_of_execution(observation):
    assert [stack.path for stack in observation.stacks] == ["early", "late"]
    assert observation.interleaved == {"mixers": "late"}
    assert observation.unreached == ["unused"]


def test_linears_of_one_group_read_equal_inputs(observation):
    assert observation.stacks[1].groups == [["v", "q", "k"], ["near"], ["branches.0", "branches.1"]]


def test_what_cannot_be_compressed_has_its_reason(observation):
    assert observation.stacks[1].dense == {
        "twice": "runs 2 times a forward",
        "idle": UNCALLED,
        "scaled": OTHER,
        "moe.router": ROUTER,
        "moe.experts": ROUTED,
        "moe.gate": GATE,
        "halves": LISTED,
    }


def run(*arguments: str | Path):
    return CliRunner().invoke(cli, ["families", "scaffold", *map(str, arguments)])


def test_the_command_prints_a_module_or_writes_it(save, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    save("olmo2").rename(model / "config.json")
    printed = run(model)
    assert printed.exception is None, printed.exception
    compile(printed.stdout, "draft", "exec")
    output = tmp_path / "plugins" / "olmo2.py"
    written = run(model, "-o", output)
    assert written.exception is None, written.exception
    assert output.read_text() == printed.stdout
    assert "224 Linears in 32 blocks" in written.stdout
    again = run(model, "-o", output)
    assert isinstance(again.exception, EmlocError)
    assert output.read_text() == printed.stdout
    blocked = run(model, "-o", output / "within" / "a_file.py")
    assert isinstance(blocked.exception, EmlocError)
    assert [path.name for path in output.parent.iterdir()] == ["olmo2.py"]


def test_no_package_is_advised_for_what_is_declared_already(save):
    assert "families new" not in run(save("llama")).stderr


def test_the_command_speaks_json(save):
    result = run(save("starcoder2"), "--json", "--check")
    assert result.exception is None, result.exception
    content = json.loads(result.stdout)
    assert ["mlp.c_fc"] in content["towers"][0]["input_groups"]
    assert content["model_types"] == ["starcoder2"]
    assert content["notes"] == []
    assert content["checked"] is True
    assert "passes every check" in result.stderr
    assert "emloc families new starcoder2 --from" in result.stderr
    compile(content["source"], "draft", "exec")


def test_a_model_whose_own_code_fails_is_refused(save, tmp_path, monkeypatch):
    fault = ValueError("Expected parameter logits")  # as BLT's does, unless a tiny model's numbers are lucky
    monkeypatch.setattr("emloc_core.scaffold.scaffold.unread_features", lambda *_: raises(fault))
    file = save("blt")
    command = ("families", "new", "mine", "--from", file, "-o", tmp_path / "plugin")
    failed = CliRunner().invoke(cli, [*map(str, command)]).exception
    assert isinstance(failed, EmlocError)
    assert "The code of this 'blt' fails (ValueError: Expected parameter logits" in str(failed)
    assert "`emloc families new blt --model-type blt` writes a plugin" in failed.fix
    assert not (tmp_path / "plugin").exists()


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), MemoryError()])
def test_a_fault_of_the_machine_is_not_said_to_be_of_the_model(fault, save, monkeypatch):
    monkeypatch.setattr("emloc_core.scaffold.scaffold.unread_features", lambda *_: raises(fault))
    with pytest.raises(type(fault)):
        scaffold(save("phi3"))


def raises(error: Exception) -> None:
    raise error


def test_the_command_refuses_what_is_not_there(tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        result = run(path)
        assert isinstance(result.exception, EmlocError)
        assert "config" in str(result.exception) or "no model" in str(result.exception)
