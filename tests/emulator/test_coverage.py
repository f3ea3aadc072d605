"""Whatever stays dense is reported: in a warning before the work begins, and in the output."""

import json
from dataclasses import replace

import pytest
from emloc_llama import LLAMA
from emloc_qwen import QWEN_MOE
from support.models import save_tiny_model

import emloc_core
from emloc_core.conformance.tiny import on_meta, tiny_config
from emloc_core.emulator.coverage import coverage
from emloc_core.emulator.declared import find_linears
from emloc_core.family import TINY
from emloc_core.files.manifest import read_manifest
from emloc_core.plugins.manager import plugin_manager

GROUPS = LLAMA.towers[0].input_groups
#: The declaration, without its attention.
FORGETFUL = replace(LLAMA, towers=[replace(LLAMA.towers[0], input_groups=GROUPS[2:])])
SETTINGS = ("--samples", "4", "--selection", "2", "--ratio", "0.5")


def covered(family, settings):
    model = on_meta(family, tiny_config(settings))
    return coverage(model, family, find_linears(model, family))


def test_every_linear_of_a_whole_declaration_has_its_place():
    coverage = covered(LLAMA, LLAMA.tiny_configs[0])
    assert coverage.undeclared == ()
    assert coverage.warnings == []
    assert coverage.compressible > 0.7


def test_what_nobody_declared_is_named_with_its_share(tiny_model, rows_file, tmp_path, emloc):
    with plugin_manager().declaring(FORGETFUL):
        code, _, err = emloc("compress", tiny_model, "--data", rows_file, *SETTINGS, "-o", tmp_path / "emulator")
    assert code == 0
    assert "warning: the family 'llama' does not mention model.layers.*.self_attn.q_proj (" in err
    assert "and 1 more, which stay dense: add them to its input_groups" in err
    undeclared = read_manifest(tmp_path / "emulator")["result"]["coverage"]["undeclared"]
    assert {part["pattern"].rpartition(".")[2] for part in undeclared} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert all(part["modules"] == TINY["num_hidden_layers"] for part in undeclared)
    (query,) = [part for part in undeclared if part["pattern"].endswith("q_proj")]
    assert query["parameters"] == 3 * 32 * 32
    assert 0 < query["share"] < 0.2


def test_plan_and_dry_run_warn_as_well(shallow_model, rows_file, tmp_path, emloc):
    with plugin_manager().declaring(FORGETFUL):
        _, out, _ = emloc("plan", shallow_model, "--length", 32, "--kind", "nf4", "--memory", "4GB")
        compress = ("compress", shallow_model, "--data", rows_file, *SETTINGS, "-o", tmp_path / "emulator", "--dry-run")
        _, shown, err = emloc(*compress, "--json")
    assert "warning: the family 'llama' does not mention" in out
    assert "does not mention" in err
    assert json.loads(shown)["coverage"]["undeclared"][0]["pattern"] == "model.layers.*.self_attn.q_proj"


def test_a_small_compressible_share_is_said_with_what_helps(tmp_path, rows_file):
    settings = {**QWEN_MOE.tiny_configs[0], "num_experts": 32, "mlp_only_layers": []}
    base = save_tiny_model(settings, tmp_path / "base")
    with pytest.warns(UserWarning, match=r"only \d+\.\d% of the parameters") as caught:
        emloc_core.compress(base, str(rows_file), tmp_path / "emulator", samples=4, ratio=0.5, allocator="global")
    message = str(caught[0].message)
    assert "what stays dense: model.layers.*.mlp.experts (" in message
    assert "`emloc train MODEL --exact`" in message
    assert read_manifest(tmp_path / "emulator")["result"]["coverage"]["compressible"] < 0.5


def test_a_head_that_is_tied_counts_once_and_is_no_familys_affair():
    coverage = covered(LLAMA, LLAMA.tiny_configs[1])
    assert coverage.undeclared == ()
    assert [(part.pattern, part.parameters) for part in coverage.dense if part.pattern == "lm_head"] == []
