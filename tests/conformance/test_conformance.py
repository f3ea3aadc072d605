"""The conformance kit: green for the families in the tree, and each check fails where what it is about is broken."""

import json
from dataclasses import replace

import pytest
import torch
from emloc_internvl import INTERNVL
from emloc_llama import LLAMA
from emloc_qwen import QWEN, QWEN_MOE
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import dropout, linear
from transformers.models.llama import modeling_llama as llama

from emloc_core.conformance import check_family, checks
from emloc_core.conformance.check import Subject, check
from emloc_core.conformance.tuning import Tuned
from emloc_core.family import TINY, Tower
from emloc_core.files.lora import WEIGHTS
from emloc_core.memory.model import MemoryModel
from emloc_core.plugins import manager as plugins
from emloc_core.plugins.manager import plugin_manager
from emloc_core.testing import conformance_tests

pytest_plugins = ["pytester"]

# One test a tiny config and check, of every family that is installed.
globals().update({f"test_{family.name}": conformance_tests(family) for family in plugin_manager().families()})

#: Two blocks: one that ends the model, and one that does not.
SHALLOW = {"num_hidden_layers": 2}
ONE = replace(LLAMA, model_types=frozenset({"llama"}), tiny_configs=[LLAMA.tiny_configs[0] | SHALLOW])
GROUPS = ONE.towers[0].input_groups
CHECKS = {check.name: check for check in (*checks.WHOLE, *checks.EACH)}
WHOLE = {check.name for check in checks.WHOLE}


def with_groups(*groups, **options):
    return replace(ONE, towers=[replace(ONE.towers[0], input_groups=groups, **options)])


def subject_of(family, tmp_path, name="linears"):
    return checks.make_subject(family, -1 if name in WHOLE else 0, tmp_path)


def tied_qwen():
    tied = [config for config in QWEN.tiny_configs if config.get("tie_word_embeddings")][:1]
    return replace(QWEN, model_types=frozenset({tied[0]["model_type"]}), tiny_configs=[tied[0] | SHALLOW])


def fails(result, message):
    """A failed check reports the fault as one that it looks for: what is wrong, and how to fix it."""
    assert not result.passed
    assert message in result.message
    assert result.remedy
    assert not result.traceback
    return True


_FALCON_GROUPS = [
    ["self_attention.query_key_value"],
    ["self_attention.dense"],
    ["mlp.dense_h_to_4h"],
    ["mlp.dense_4h_to_h"],
]
_FALCON_SIZES = {name: TINY[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
#: Attention and MLP are parallel in one branch, and one after the other in the other.
FALCON = replace(
    LLAMA,
    name="falcon",
    model_types=frozenset({"falcon"}),
    towers=[Tower("language", "transformer.h", _FALCON_GROUPS)],
    tiny_configs=[{"model_type": "falcon", **_FALCON_SIZES, "parallel_attn": True}],
)
#: Check -> declarations that it refuses, with what it says.
DECLARATIONS = [
    ("model-types", replace(ONE, auto_class="AutoModelForCausalLlama"), "no class 'AutoModelForCausalLlama'"),
    ("model-types", replace(ONE, tiny_configs=[]), "no tiny config is of the model type 'llama'"),
    ("model-types", replace(ONE, model_types=frozenset({"llama", "mistral"})), "model type 'mistral'"),
    ("model-types", replace(ONE, tiny_configs=LLAMA.tiny_configs), "'mistral', which is not among model_types"),
    ("model-types", replace(ONE, tiny_configs=["llama"]), "a tiny config is 'llama', not a mapping"),
    ("names", with_groups(*GROUPS, ["mlp.gate_porj"]), "the path 'mlp.gate_porj' is in no block"),
    ("names", replace(ONE, keep_dense={"lm_haed": "large"}), "keep_dense names 'lm_haed'"),
    ("names", with_groups(*GROUPS, lora_targets=["q_porj"]), "the LoRA target 'q_porj'"),
    ("names", with_groups(*GROUPS, blocks="model.layer"), "the blocks 'model.layer' of the tower 'language'"),
    ("branches", FALCON, "with new_decoder_architecture=True, the Linears of a 'falcon' run in another"),
    ("builds", replace(ONE, tiny_configs=[{**TINY, "model_type": "llama", "hidden_size": "wide"}]), "refuses"),
    ("builds", replace(ONE, tiny_configs=[{**TINY, "model_type": "llama", "hidden_act": "sulu"}]), "cannot build"),
    ("builds", replace(INTERNVL, nested={"words_config": "model.language_model"}), "has no words_config"),
    ("builds", replace(ONE, model_types=frozenset({"lama"}), tiny_configs=[{**TINY, "model_type": "lama"}]),
     "transformers has no model type 'lama'."),
    ("linears", with_groups(*GROUPS, blocks="model"), "model is a LlamaModel, not a list of blocks"),
    ("linears", with_groups(["input_layernorm"]), "model.layers.0.input_layernorm is a LlamaRMSNorm, not a Linear"),
    ("linears", with_groups(*GROUPS, blocks="model.layer"), "The model has no 'model.layer'"),
    ("linears", with_groups(*GROUPS[:3]), "mlp.down_proj is a Linear that is neither in an input group nor kept"),
    ("linears", with_groups(*GROUPS, ["mlp.up_proj"]), "model.layers.0.mlp.up_proj is in several input groups"),
    ("linears", replace(ONE, keep_dense={"*": "no reason"}), "names no Linear"),
    ("linears", replace(INTERNVL, keep_dense={}), "linear_1 is a Linear outside the blocks that is not kept dense"),
    ("linears", replace(ONE, keep_dense={**LLAMA.keep_dense, "*.up_proj": "no reason"}),
     "mlp.up_proj of model.layers is to be compressed, and kept dense"),
    ("linears", replace(QWEN_MOE, keep_dense={**QWEN_MOE.keep_dense, "model.layers.*.mlp.experts": "no reason"}),
     "mlp.experts.down_proj of model.layers is to be compressed, and kept dense"),
    ("linears", replace(INTERNVL, towers=()), "model.vision_tower.encoder.layer is a list of blocks that no tower"),
    ("linears", replace(QWEN_MOE, towers=[replace(QWEN_MOE.towers[0], experts=())]),
     "model.layers.1.mlp.experts is a Qwen3MoeExperts that is neither"),
    ("blocks", replace(INTERNVL, modality="text"), "no row reaches model.vision_tower.encoder.layer.0"),
    ("blocks", replace(ONE, modality="image-text"), "does not say how an image becomes tokens"),
    ("blocks", replace(ONE, modality="image-text", tiny_inputs=lambda _: {"input_ids": torch.tensor([[999]])}),
     "does not run on rows made up for it"),
    ("input-groups", with_groups([*GROUPS[0], *GROUPS[1]], *GROUPS[2:]),
     "model.layers.0.self_attn.o_proj does not read the input that model.layers.0.self_attn.q_proj reads"),
    ("input-groups", with_groups(*reversed(GROUPS)), "mlp.gate_proj runs before model.layers.0.mlp.down_proj"),
    ("trains", with_groups(*GROUPS, lora_targets=[]), "No tower gets a LoRA by default"),
    ("trains", with_groups(*GROUPS, lora_targets=["embed_tokens"]), "model.embed_tokens, a Embedding, got a LoRA"),
    ("trains", with_groups(*GROUPS, lora_targets=["q_porj"]), "PEFT cannot put a LoRA on q_porj"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "family", "message"), DECLARATIONS, ids=lambda value: str(value)[:40])
def test_a_wrong_declaration_is_found(name, family, message, tmp_path):
    assert fails(CHECKS[name].on(subject_of(family, tmp_path, name)), message)


def test_a_tiny_config_for_every_branch_is_enough(tmp_path):
    serial = {**FALCON.tiny_configs[0], "parallel_attn": False}
    family = replace(FALCON, tiny_configs=[*FALCON.tiny_configs, serial])
    result = CHECKS["branches"].on(subject_of(family, tmp_path, "branches"))
    assert result.passed, str(result)


def test_towers_in_the_wrong_order_are_found(tmp_path):
    config = {"model_type": "internvl", **INTERNVL.tiny_configs[-1]}
    language = replace(LLAMA.towers[0], blocks="model.language_model.layers")
    towers = [language, *INTERNVL.towers]
    kept = {**INTERNVL.keep_dense, **LLAMA.keep_dense}
    family = replace(INTERNVL, towers=towers, nested={}, keep_dense=kept, tiny_configs=[config])
    result = CHECKS["blocks"].on(subject_of(family, tmp_path))
    assert fails(result, "runs before model.language_model.layers.0, which is declared before it")


def spare(module_class, monkeypatch, layer, forward=None):
    """Give every module of a class one more part, ``spare``; a forward may use it."""
    make = module_class.__init__

    def init(self, *args, **kwargs):
        make(self, *args, **kwargs)
        self.spare = layer()

    monkeypatch.setattr(module_class, "__init__", init)
    if forward:
        monkeypatch.setattr(module_class, "forward", forward)


def mlp(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def test_blocks_that_run_twice_are_found(tmp_path, monkeypatch):
    once = llama.LlamaModel.forward
    monkeypatch.setattr(llama.LlamaModel, "forward", lambda *args, **kw: [once(*args, **kw), once(*args, **kw)][1])
    assert fails(CHECKS["blocks"].on(subject_of(ONE, tmp_path)), "model.layers.0 runs more than once per row")


def test_logits_that_are_no_numbers_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(llama.LlamaMLP, "forward", lambda self, x: mlp(self, x) / 0)
    assert fails(CHECKS["blocks"].on(subject_of(ONE, tmp_path)), "logits are not all finite")


def test_logits_that_depend_on_later_tokens_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(llama.LlamaMLP, "forward", lambda self, x: mlp(self, x) + x.mean(1, keepdim=True))
    subject = subject_of(ONE, tmp_path)
    assert fails(CHECKS["causal"].on(subject), "The logits of a token depend on later ones")
    assert subject.raised["causal"].code == "unsupported"


def test_a_linear_that_does_not_run_is_found(tmp_path, monkeypatch):
    spare(llama.LlamaMLP, monkeypatch, lambda: nn.Linear(32, 32))
    family = with_groups(*GROUPS, ["mlp.spare"])
    assert fails(CHECKS["input-groups"].on(subject_of(family, tmp_path)), "no row reaches model.layers.0.mlp.spare")


def test_a_linear_that_runs_twice_is_found(tmp_path, monkeypatch):
    forward = lambda self, x: mlp(self, x) + self.spare(self.spare(x))  # noqa: E731
    spare(llama.LlamaMLP, monkeypatch, lambda: nn.Linear(32, 32), forward)
    family = with_groups(*GROUPS, ["mlp.spare"])
    result = CHECKS["input-groups"].on(subject_of(family, tmp_path))
    assert fails(result, "model.layers.0.mlp.spare runs more than once per row")


@pytest.mark.parametrize(
    ("raised", "explanation"),
    [
        ("'LlamaModel' object has no attribute '0'", "blocks names a module that is not a list of blocks"),
        ("Tensor on device cpu is not on the expected device meta!", "a weight that is not loaded at that moment"),
        ("Tensor.item() cannot be called on meta tensors", "a weight that is not loaded at that moment"),
        ("mat1 and mat2 shapes cannot be multiplied (4x8 and 16x4)", "sizes do not fit each other"),
    ],
)
def test_what_torch_says_is_told_in_words_of_the_declaration(raised, explanation):
    @check()
    def broken(_subject):
        raise RuntimeError(raised)

    result = broken.on(Subject(ONE, "llama"))
    assert explanation in result.message
    assert raised in result.message
    assert "traceback" not in result.remedy
    assert result.traceback


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_lora_on_a_layer_that_training_drops_by_chance_learns(tmp_path, monkeypatch):
    forward = lambda self, x: mlp(self, x) + dropout(self.spare(x), 1.0, self.training)  # noqa: E731
    spare(llama.LlamaMLP, monkeypatch, lambda: nn.Linear(32, 32), forward)
    family = with_groups(*GROUPS[:2], [*GROUPS[2], "mlp.spare"], GROUPS[3])
    assert CHECKS["trains"].on(subject_of(family, tmp_path)).passed


def test_a_linear_that_computes_something_else_is_found(tmp_path, monkeypatch):
    spare(llama.LlamaMLP, monkeypatch, lambda: Doubled(32, 32), lambda self, x: self.spare(mlp(self, x)))
    family = with_groups(*GROUPS, ["mlp.spare"])
    assert fails(CHECKS["products"].on(subject_of(family, tmp_path)), "mlp.spare is not its weight times its input")


def test_an_output_that_is_sliced_by_features_is_found(tmp_path, monkeypatch):
    forward = lambda self, x: mlp(self, x) + self.spare(x)[..., :32]  # noqa: E731
    spare(llama.LlamaMLP, monkeypatch, lambda: nn.Linear(32, 48), forward)
    family = with_groups(*GROUPS[:2], [*GROUPS[2], "mlp.spare"], GROUPS[3])
    result = CHECKS["outputs"].on(subject_of(family, tmp_path))
    assert fails(result, "nothing reads 16 of the 48 output features of model.layers.0.mlp.spare (1 more like it)")


@pytest.mark.parametrize(
    "read", [lambda x: (x - 100).relu(), lambda x: x.argmax(-1, keepdim=True)], ids=["relu", "choice"]
)
def test_an_output_that_no_gradient_reaches_may_still_be_read(tmp_path, monkeypatch, read):
    forward = lambda self, x: mlp(self, x) + read(self.spare(x))  # noqa: E731
    spare(llama.LlamaMLP, monkeypatch, lambda: nn.Linear(32, 32), forward)
    family = with_groups(*GROUPS[:2], [*GROUPS[2], "mlp.spare"], GROUPS[3])
    assert CHECKS["outputs"].on(subject_of(family, tmp_path)).passed


def test_a_model_that_keeps_state_is_found(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(llama.LlamaMLP, "forward", lambda self, x: calls.append(1) or mlp(self, x) * len(calls))
    result = CHECKS["statistics"].on(subject_of(ONE, tmp_path))
    assert fails(result, "streamed, are not those of a whole forward")


def test_a_linear_that_torch_computes_otherwise_where_it_is_frozen_is_no_state(tmp_path, monkeypatch):
    # As some with a bias are, of inputs that are not contiguous.
    forward = lambda self, x: mlp(self, x) * (1 + 1e-6 * self.up_proj.weight.requires_grad)  # noqa: E731
    monkeypatch.setattr(llama.LlamaMLP, "forward", forward)
    assert CHECKS["statistics"].on(subject_of(ONE, tmp_path)).passed


def test_weights_that_are_streamed_wrongly_are_found(tmp_path):
    subject = subject_of(ONE, tmp_path)
    assert CHECKS["products"].on(subject).passed
    subject.model.model.layers[1].mlp.down_proj.weight.data.add_(1)
    result = CHECKS["statistics"].on(subject)
    assert fails(result, "the weight of model.layers.1.mlp.down_proj, streamed, is not the one")


def test_a_weight_that_is_used_without_a_call_is_found(tmp_path, monkeypatch):
    def forward(self, x):
        hidden = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(hidden) + linear(hidden, self.down_proj.weight)

    monkeypatch.setattr(llama.LlamaMLP, "forward", forward)
    assert fails(CHECKS["full-rank"].on(subject_of(ONE, tmp_path / "wide")), "does not run with factors")
    square = replace(ONE, tiny_configs=[{**ONE.tiny_configs[0], "intermediate_size": 32}])
    assert fails(CHECKS["full-rank"].on(subject_of(square, tmp_path / "square")), "logits differ from the base's by")


def test_a_linear_too_small_for_factors_is_found(tmp_path, monkeypatch):
    spare(llama.LlamaMLP, monkeypatch, lambda: nn.Linear(32, 1), lambda self, x: mlp(self, x) * self.spare(x))
    family = with_groups(*GROUPS[:2], [*GROUPS[2], "mlp.spare"], GROUPS[3])
    assert fails(CHECKS["trains"].on(subject_of(family, tmp_path)), "model.layers.0.mlp.spare stayed dense")


@pytest.mark.parametrize("blocks", [1, 3])
def test_a_lora_that_does_not_learn_is_found(blocks, tmp_path, monkeypatch):
    def forward(self, x):
        self.spare(x)
        return mlp(self, x)

    spare(llama.LlamaMLP, monkeypatch, lambda: nn.Linear(32, 32), forward)
    declared = with_groups(*GROUPS[:2], [*GROUPS[2], "mlp.spare"], GROUPS[3])
    family = replace(declared, tiny_configs=[{**ONE.tiny_configs[0], "num_hidden_layers": blocks}])
    result = CHECKS["trains"].on(subject_of(family, tmp_path))
    assert fails(result, "the LoRA on model.layers.0.mlp.spare got no gradient")


def test_a_loss_that_is_no_number_is_found(tmp_path):
    subject = subject_of(ONE, tmp_path)
    subject.tuned = Tuned(model=None, losses=[1.0, float("nan")])
    assert fails(CHECKS["trains"].on(subject), "the loss at step 2 is nan")


def changed(path, change):
    """Change the tensors of a file, and keep its metadata."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, key: tensors.update({key.replace("q_proj", "query"): tensors.pop(key)}), "no place for"),
        (lambda tensors, key: tensors.pop(key), "the adapter lacks"),
    ],
)
def test_other_keys_are_found(tmp_path, change, message):
    subject = subject_of(ONE, tmp_path)
    assert CHECKS["trains"].on(subject).passed
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    changed(subject.adapter / WEIGHTS, lambda tensors: change(tensors, key))
    assert fails(CHECKS["adapter-keys"].on(subject), message)


def test_an_emulator_is_made_of_the_kits_own_samples(tmp_path, monkeypatch):
    monkeypatch.setattr("emloc_core.model.opened.OpenModel.samples", lambda *_: pytest.fail("rows were tokenized"))
    assert subject_of(ONE, tmp_path).emulator


def test_a_wrong_correction_is_found(tmp_path):
    subject = subject_of(ONE, tmp_path)
    assert CHECKS["adapter-keys"].on(subject).passed
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    changed(subject.corrected / WEIGHTS, lambda tensors: tensors[key].mul_(1.01))
    result = CHECKS["correction"].on(subject)
    assert fails(result, "model.layers.1.self_attn.q_proj on the base does not answer as the tuned emulator did")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("model.layers.1.mlp.up_proj.weight", "up_proj.weight is not what PEFT's merge_and_unload gives"),
        ("model.norm.weight", "model.norm.weight has no LoRA and was changed"),
    ],
)
def test_a_wrong_merge_is_found(tmp_path, key, message):
    subject = subject_of(ONE, tmp_path)
    assert CHECKS["correction"].on(subject).passed
    changed(subject.merged / "model.safetensors", lambda tensors: tensors[key].add_(1e-4))
    assert fails(CHECKS["merge"].on(subject), message)


def test_a_wrong_count_is_found(tmp_path, monkeypatch):
    count = MemoryModel.parameters
    monkeypatch.setattr(MemoryModel, "parameters", lambda self, plan=None: count(self, plan) + (plan is not None))
    assert fails(CHECKS["memory"].on(subject_of(ONE, tmp_path)), "parameters in the emulator, which has")


def test_ties_that_come_loose_are_found(tmp_path):
    subject = subject_of(tied_qwen(), tmp_path)
    assert CHECKS["merge"].on(subject).passed
    config = subject.emulator / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": False}))
    result = CHECKS["ties"].on(subject)
    assert fails(result, "lm_head.weight is tied to model.embed_tokens.weight in the base, but not in the emulator")


def test_tied_weights_that_changed_are_found(tmp_path):
    subject = subject_of(tied_qwen(), tmp_path)
    assert CHECKS["merge"].on(subject).passed
    changed(subject.merged / "model.safetensors", lambda tensors: tensors["model.embed_tokens.weight"].add_(1))
    assert fails(CHECKS["ties"].on(subject), "lm_head.weight of the merged checkpoint is not the base's")


def test_a_check_that_cannot_run_fails_and_says_so(tmp_path):
    @check()
    def broken(_subject):
        raise ZeroDivisionError("by nothing")

    @check(broken)
    def behind(_subject):
        raise AssertionError("it must not run")

    subject = subject_of(ONE, tmp_path)
    first, second = broken.on(subject), behind.on(subject)
    assert not first.passed
    assert first.message == "Could not run: ZeroDivisionError: by nothing"
    assert "raise ZeroDivisionError" in first.traceback
    assert not second.passed
    assert second.message == "Could not run: it needs broken, which failed."
    assert (first.blocked, second.blocked) == (False, True)


def test_check_family_gives_a_result_a_check_and_config_and_reports_each():
    reports = []
    llamas = [config | SHALLOW for config in LLAMA.tiny_configs if config["model_type"] == "llama"]
    family = replace(ONE, tiny_configs=llamas)
    results = check_family(family, lambda *now: reports.append(now))
    assert [(result.config, result.check) for result in results] == [
        (label, check.name)
        for label, group in (("all", checks.WHOLE), ("llama", checks.EACH), ("llama-2", checks.EACH))
        for check in group
    ]
    assert all(result.passed for result in results)
    assert [(done, total) for _, done, total in reports] == [
        (done, len(results)) for done in range(1, len(results) + 1)
    ]


def test_an_uninstalled_family_is_checked_and_forgotten(tmp_path):
    family, threads = with_groups(["mlp.down_proj"]), torch.get_num_threads()
    torch.set_num_threads(threads + 1)  # a check takes one, and gives them back
    try:
        assert not CHECKS["linears"].on(subject_of(family, tmp_path)).passed
        assert plugin_manager().family_for({"model_type": "llama"}) is LLAMA
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)


def test_the_command_lists_what_fails_and_exits_with_1(emloc):
    with plugin_manager().declaring(replace(with_groups(*GROUPS[:3]), name="halved")):
        code, out, err = emloc("families", "check", "halved")
    assert code == 1
    assert "halved, all: 3 of 3 checks passed" in out
    assert "halved, llama: 1 of 16 checks passed" in out
    assert "FAILED linears: model.layers.0.mlp.down_proj is a Linear that is neither" in out
    assert "or to keep_dense with the reason" in out
    blocked = [check.name for check in checks.EACH[2:]]  # all that need it, in one line
    assert f"  Not run because checks that they depend on failed: {', '.join(blocked)}.\n" in out
    assert out.count("Not run") == out.count("FAILED") == 1
    assert "15 of 19 checks failed" in err


def test_the_command_speaks_json(emloc):
    with plugin_manager().declaring(replace(ONE, name="one")):
        code, out, _ = emloc("families", "check", "one", "--json")
    assert code == 0
    report = json.loads(out)
    assert report["passed"]
    assert len(report["checks"]) == len(CHECKS)
    assert {"family", "config", "check", "passed", "message", "remedy"} <= report["checks"][0].keys()


def test_a_family_without_tiny_configs_fails(emloc):
    with plugin_manager().declaring(replace(ONE, name="bare", tiny_configs=())):
        code, out, err = emloc("families", "check", "bare")
    assert code == 1
    assert "no tiny config is of the model type 'llama'" in out
    assert "3 of 3 checks failed" in err


def test_an_unknown_family_or_none_is_refused(emloc):
    code, _, err = emloc("families", "check", "lama")
    assert code == 1
    assert "Did you mean 'llama'?" in err
    code, _, err = emloc("families", "check")
    assert code == 2
    assert "--all" in err


def test_all_means_every_installed_family(emloc, monkeypatch):
    families = [replace(ONE, name=name, tiny_configs=()) for name in ("one", "two")]
    monkeypatch.setattr(plugins.PluginManager, "families", lambda _: families)
    code, out, _ = emloc("families", "check", "--all")
    assert code == 1
    assert [line for line in out.splitlines() if "checks passed" in line] == [
        "one, all: 0 of 3 checks passed",
        "two, all: 0 of 3 checks passed",
    ]


def test_a_plugins_tests_are_one_a_check_and_say_how_to_mend(pytester):
    pytester.makepyfile(
        test_mine="""
        from dataclasses import replace

        from emloc_core.testing import conformance_tests
        from emloc_llama import LLAMA

        tower = replace(LLAMA.towers[0], input_groups=LLAMA.towers[0].input_groups[:3])
        test_mine = conformance_tests(replace(LLAMA, towers=[tower]))
        """
    )
    result = pytester.runpytest_inprocess("-v", "-p", "no:cacheprovider", "-k", "mistral-builds or mistral-linears")
    result.assert_outcomes(passed=1, failed=1, deselected=49)
    result.stdout.fnmatch_lines(
        [
            "*test_mine?mistral-builds? PASSED*",
            "*test_mine?mistral-linears? FAILED*",
            "*.mlp.down_proj is a Linear that is neither in an input group nor kept dense (2 more like it). "
            "Add it to an input group of its tower, or to keep_dense with the reason*",
        ]
    )
