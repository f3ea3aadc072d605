"""The families in the tree, on tiny models: the declaration fits, and a streamed forward equals the whole one."""

from dataclasses import replace
from fnmatch import fnmatchcase

import pytest
import torch
import transformers
from emloc_gemma import GEMMA, GEMMA_VL
from emloc_glm import GLM
from emloc_internvl import INTERNVL
from emloc_llama import LLAMA
from emloc_phi import PHI
from emloc_qwen import QWEN, QWEN_MOE, QWEN_VL
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from support.jobs import compress_job, merge_job, train_job
from support.models import tiny_tokenizer
from support.ranks import plan_ranks
from support.rows import example_rows, write_jsonl
from transformers import AutoConfig

from emloc_core.conformance import check_family
from emloc_core.conformance.activations import deviation
from emloc_core.conformance.inputs import image_inputs, number_tokenizer, text_rows, tiny_samples
from emloc_core.data.rows import load_rows
from emloc_core.emulator.declared import find_linears
from emloc_core.errors import EmlocError
from emloc_core.files.checkpoint import Checkpoint
from emloc_core.model.opened import OpenModel
from emloc_core.model.skeleton import build_model
from emloc_core.model.streaming import Stream
from emloc_core.plugins.manager import plugin_manager
from emloc_core.scaffold.scaffold import scaffold
from emloc_core.settings import CompressSettings, TrainSettings
from emloc_core.standins import LowRank
from emloc_core.standins.experts import StandInExperts
from emloc_core.standins.low_rank import LowRankLinear
from emloc_core.tuning.trl import lora_config

TREE = (LLAMA, QWEN, QWEN_MOE, QWEN_VL, GEMMA, GEMMA_VL, PHI, GLM, INTERNVL)
TINY = [config for family in TREE for config in family.tiny_configs]


def label(config) -> str:
    inner = config.get("text_config", {}).get("model_type")
    return f"{config['model_type']}+{inner}" if inner else config["model_type"]


def tiny_config(settings):
    settings = dict(settings)
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def tiny_model(settings):
    """Return the family and the tiny model of a config, whose weights are neither all zero nor all one."""
    family = plugin_manager().family_for(settings)
    config = tiny_config(settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, family.auto_class).from_config(config, dtype=torch.float32).eval()
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return family, model


def stream(skeleton, rows):
    """Return the logits of rows, streamed."""
    forwards = [lambda row=row: skeleton.model(**row, use_cache=False).logits for row in rows]
    return Stream(skeleton).run(forwards)


@pytest.fixture(params=TINY, ids=label)
def saved(request, tmp_path):
    """A tiny model on disk, its family, and the whole model in memory."""
    family, model = tiny_model(request.param)
    model.save_pretrained(tmp_path)
    return OpenModel(Checkpoint(tmp_path), family).skeleton, family, model


def text(length: int) -> torch.Tensor:
    return torch.randint(3, 120, (1, length), generator=torch.Generator().manual_seed(length))


def with_images(config) -> dict[str, torch.Tensor]:
    """Return a row with two pictures, of unlike sizes where the model takes any, and text around them."""
    if config.model_type == "gemma3":
        return image_inputs(config)
    ids, generator = text(40), torch.Generator().manual_seed(0)
    vision = config.vision_config
    if config.model_type == "internvl":
        for start in (2, 8):
            ids[0, start : start + config.image_seq_length] = config.image_token_id
        return {"input_ids": ids, "pixel_values": torch.randn(2, 3, *vision.image_size, generator=generator)}
    grids = [[1, 8, 8], [1, 4, 6]]
    start = 2
    for _, height, width in grids:
        end = start + 1 + height * width // vision.spatial_merge_size**2
        ids[0, start], ids[0, end] = config.vision_start_token_id, config.vision_end_token_id
        ids[0, start + 1 : end] = config.image_token_id
        start = end + 2
    patches = sum(height * width for _, height, width in grids)
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == config.image_token_id).int(),
        "pixel_values": torch.randn(
            patches, 3 * vision.temporal_patch_size * vision.patch_size**2, generator=generator
        ),
        "image_grid_thw": torch.tensor(grids),
    }


def rows_of(family, config) -> list[dict[str, torch.Tensor]]:
    rows = [{"input_ids": text(length)} for length in (9, 21)]
    return [*rows, with_images(config)] if family.modality == "image-text" else rows


def test_every_model_type_has_a_tiny_model():
    for family in TREE:
        assert {config["model_type"] for config in family.tiny_configs} == family.model_types


def test_every_linear_is_in_the_plan_or_kept_dense_with_a_reason(saved):
    skeleton, family, model = saved
    plan = plan_ranks(skeleton.model, family, 0.5)
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    planned = {linear.path for linear in plan.linears}
    assert planned < linears
    for path in linears - planned - {"lm_head"}:
        assert any(fnmatchcase(path, pattern) and reason for pattern, reason in family.keep_dense.items()), path
    lines = "\n".join(plan.lines(LowRank()))
    for kept in plan.kept:
        assert f"{kept.parameters:,} parameters of {kept.pattern} stay dense: {kept.reason}" in lines


def test_streamed_logits_equal_those_of_the_whole_model_bit_for_bit(saved):
    skeleton, family, model = saved
    rows = rows_of(family, model.config)
    with torch.no_grad():
        for row, logits in zip(rows, stream(skeleton, rows), strict=True):
            assert torch.equal(logits, model(**row, use_cache=False).logits)
            assert bool(logits.isfinite().all())


def test_the_tiny_models_use_what_sets_their_family_apart():
    """Pictures, windows, full attention and DeepStack all change the logits, so that the equality above says it."""
    for settings in QWEN_VL.tiny_configs:
        _, model = tiny_model(settings)
        row = with_images(model.config)
        changes = {"qwen2_5_vl": ("fullatt_block_indexes", []), "qwen3_vl": ("deepstack_visual_indexes", [])}
        with torch.no_grad():
            logits = model(**row, use_cache=False).logits
            order = torch.arange(row["input_ids"].shape[1]).expand(3, 1, -1)  # places in one dimension
            assert not torch.allclose(logits, model(**row, position_ids=order, use_cache=False).logits, atol=1e-3)
            if change := changes.get(settings["model_type"]):
                setattr(model.model.visual, *change)
                assert not torch.allclose(logits, model(**row, use_cache=False).logits, atol=1e-3)
    _, model = tiny_model(QWEN.tiny_configs[0])
    assert set(model.config.layer_types) == {"sliding_attention", "full_attention"}


def moe(tmp_path):
    """A tiny Qwen3-MoE with a tokenizer on disk, whose tokens all go to the same two of four experts."""
    _, model = tiny_model(QWEN_MOE.tiny_configs[0])
    for layer in model.model.layers[1:]:
        layer.mlp.gate.weight.data.zero_()
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base", model


def test_all_of_a_mixture_becomes_smaller_but_its_routers(tmp_path):
    base, model = moe(tmp_path)
    plan = plan_ranks(OpenModel(Checkpoint(base), QWEN_MOE).skeleton.model, QWEN_MOE, 0.5)
    compressed = {path.removeprefix("model.layers.") for path in plan.ranks}
    attention = {f"{index}.self_attn.{name}_proj" for index in range(3) for name in "qkvo"}
    experts = {f"{index}.mlp.experts.{name}_proj" for index in (1, 2) for name in ("gate_up", "down")}
    dense_layer = {f"0.mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert compressed == attention | dense_layer | experts
    before, _ = plan.parameters(LowRank())
    kept = {kept.pattern: kept.parameters for kept in plan.kept}
    assert kept == {"model.layers.*.mlp.gate": 2 * 4 * 32}
    outside = ("norm", "embed", "lm_head")
    others = sum(
        parameter.numel() for name, parameter in model.named_parameters() if any(part in name for part in outside)
    )
    assert before + sum(kept.values()) + others == sum(parameter.numel() for parameter in model.parameters())


def test_an_expert_that_no_token_goes_to_does_no_harm(tmp_path):
    base, model = moe(tmp_path)
    reached = set()

    def note(_module, _args, output):
        reached.update(output[2].unique().tolist())

    for layer in model.model.layers[1:]:
        layer.mlp.gate.register_forward_hook(note)
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in Checkpoint(base).tensors  # as published: one per expert
    rows = load_rows(str(write_jsonl(tmp_path / "rows.jsonl", example_rows())))
    settings = CompressSettings(kind="low-rank", samples=8, selection=0)
    emulator = compress_job(base, rows, tmp_path / "emulator", settings).run()
    small = transformers.AutoModelForCausalLM.from_pretrained(emulator, dtype="auto").eval()
    with torch.no_grad():
        model(input_ids=text(30))
        assert bool(small(input_ids=text(30)).logits.isfinite().all())
    assert len(reached) == 2
    assert all(bool(parameter.isfinite().all()) for parameter in small.parameters())
    for index in (1, 2):  # they are fitted to what the others are given
        factors, experts = (part.model.layers[index].mlp.experts for part in (small, model))
        product = factors.weight["gate_up_proj"] @ factors.V["gate_up_proj"]
        for expert in set(range(4)) - reached:
            assert deviation(product[expert], experts.gate_up_proj[expert]) < 0.9


def test_a_lora_of_a_mixture_goes_on_its_linears():
    _, model = tiny_model(QWEN_MOE.tiny_configs[0])
    lora = get_peft_model(model, lora_config(TrainSettings(), QWEN_MOE.lora_targets()))
    assert not [name for name, _ in lora.named_parameters() if "lora_" in name and "experts" in name]


@pytest.mark.parametrize(
    ("targets", "complaint"),
    [
        (["gate_proj", "up_proj"], r"PEFT would put a LoRA on the parameters of model.layers.\d.mlp.experts"),
        (["gate_proj"], "PEFT refuses these targets: Cannot convert PEFT target"),
        (["experts"], r"matches model.layers.1.mlp.experts"),
    ],
)
def test_a_lora_on_fused_experts_is_refused_before_anything_is_trained(targets, complaint, tmp_path):
    base, _ = moe(tmp_path)
    rows = write_jsonl(tmp_path / "rows.jsonl", example_rows())
    with pytest.raises(EmlocError, match=complaint):
        train_job(base, rows, tmp_path / "adapter", TrainSettings(target_modules=targets))


@pytest.mark.parametrize("settings", QWEN_VL.tiny_configs, ids=label)
def test_a_lora_of_pictures_goes_on_the_blocks_alone(settings):
    """Not on the convolution and the mergers, whose parts have the same names as those of the blocks."""
    family, model = tiny_model(settings)
    planned = {linear.path for linear in find_linears(model, family).linears}
    lora = get_peft_model(model, lora_config(TrainSettings(), family.lora_targets()))
    reached = {name.removeprefix("base_model.model.").partition(".lora_A")[0]
             for name, _ in lora.named_parameters() if ".lora_A" in name}  # fmt: skip
    assert reached == planned


def test_the_declaration_of_a_nested_model_is_moved_to_where_it_stands():
    family = INTERNVL.with_nested(QWEN_MOE, "model.language_model")
    assert [tower.blocks for tower in family.towers] == [
        "model.vision_tower.encoder.layer", "model.language_model.layers",
    ]  # fmt: skip
    assert family.keep_dense.keys() == {"model.language_model.layers.*.mlp.gate", "model.multi_modal_projector.*"}
    assert family.nested == {}
    assert family.auto_class == "AutoModelForImageTextToText"


@pytest.mark.thorough
def test_a_nested_model_may_begin_otherwise_than_with_model(tmp_path):
    AutoConfig.for_model("gpt_neox").save_pretrained(tmp_path)
    inner = scaffold(tmp_path / "config.json").family
    assert inner.towers[0].blocks == "gpt_neox.layers"
    settings = {**INTERNVL.tiny_configs[-1], "text_config": dict(inner.tiny_configs[0])}
    with plugin_manager().declaring(inner):
        results = check_family(replace(INTERNVL, tiny_configs=[settings]))
        assert [str(result) for result in results if not result.passed] == []


def test_the_experts_of_a_nested_mixture_become_smaller():
    settings = {**INTERNVL.tiny_configs[0], "text_config": QWEN_MOE.tiny_configs[0]}
    family, model = tiny_model(settings)
    plan = plan_ranks(model, family, 0.5)
    assert [path for path in plan.ranks if "experts" in path] == [
        f"model.language_model.layers.{index}.mlp.experts.{name}_proj"
        for index in (1, 2)
        for name in ("gate_up", "down")
    ]


def test_factors_of_experts_are_found_beside_legacy_names(tmp_path):
    settings = {**INTERNVL.tiny_configs[0], "text_config": QWEN_MOE.tiny_configs[0]}
    family, model = tiny_model(settings)
    model.save_pretrained(tmp_path / "base")
    number_tokenizer(model.config).save_pretrained(tmp_path / "base")
    experts = "language_model.model.layers.1.mlp.experts.0.up_proj.weight"
    assert experts in Checkpoint(tmp_path / "base").tensors
    small = emulator_of(tmp_path / "base", family, model.config, tmp_path / "emulator")
    assert sum(isinstance(module, StandInExperts) for module in small.modules()) == 2
    assert experts not in Checkpoint(tmp_path / "emulator").tensors
    with torch.no_grad():
        assert bool(small(**with_images(model.config)).logits.isfinite().all())


def test_what_lies_below_a_pattern_stays_dense_with_it():
    family, model = tiny_model(INTERNVL.tiny_configs[0])
    projector = sum(parameter.numel() for parameter in model.model.multi_modal_projector.parameters())
    (kept,) = find_linears(model, replace(family, keep_dense={"model.multi_modal_projector": "for this test"})).kept
    assert (kept.parameters, kept.reason) == (projector, "for this test")


def test_a_class_that_transformers_does_not_have_is_named():
    family = replace(LLAMA, auto_class="AutoModelForNothing")
    with pytest.raises(EmlocError, match="'llama' declares the class AutoModelForNothing"):
        build_model(tiny_config(LLAMA.tiny_configs[0]), family, torch.float32)


def test_a_nested_model_that_no_family_declares_is_named():
    with pytest.raises(EmlocError, match="'nonesuch', the text_config of this 'internvl'"):
        plugin_manager().family_for({"model_type": "internvl", "text_config": {"model_type": "nonesuch"}})


@pytest.mark.parametrize("part", [{}, {"text_config": None}, {"text_config": {}}])
def test_a_config_that_does_not_say_what_is_nested_is_refused(part):
    with pytest.raises(EmlocError, match="text_config"):
        plugin_manager().family_for({"model_type": "internvl", **part})


#: Model type -> how names of its modules begin in files of older versions of transformers, and of save_pretrained.
LEGACY = {
    "internvl": {"language_model.model.", "vision_tower.", "multi_modal_projector."},
    "qwen2_vl": {"model.layers.", "visual."},
    "qwen2_5_vl": {"model.layers.", "visual."},
}


@pytest.fixture(params=[config for config in TINY if config["model_type"] in LEGACY], ids=label)
def legacy(request, tmp_path):
    """A tiny model on disk under the names of its modules, and under legacy names; a tokenizer beside each."""
    family, model = tiny_model(request.param)
    for name in ("modules", "legacy"):
        model.save_pretrained(tmp_path / name)
        number_tokenizer(model.config).save_pretrained(tmp_path / name)
    stored = {name for name, _ in model.named_parameters()}  # tied ones once
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name in stored}
    save_file(tensors, tmp_path / "modules" / "model.safetensors", {"format": "pt"})
    keys = Checkpoint(tmp_path / "legacy").tensors
    for beginning in LEGACY[request.param["model_type"]]:
        assert any(key.startswith(beginning) for key in keys)
        assert not any(key.startswith(beginning) for key in tensors)
    return family, model, tmp_path / "modules", tmp_path / "legacy"


def emulator_of(base, family, config, output):
    """Return an emulator that text and a picture were given for, loaded as anyone would load it."""
    samples = tiny_samples(family, config)
    stage = compress_job(base, text_rows(samples), output, CompressSettings(samples=1, selection=0, ratio=0.5))
    stage.samples = samples
    return getattr(transformers, family.auto_class).from_pretrained(stage.run(), dtype="auto").eval()


def test_names_of_either_kind_are_streamed(legacy):
    family, model, *directories = legacy
    rows = rows_of(family, model.config)
    for directory in directories:
        streamed = stream(OpenModel(Checkpoint(directory), family).skeleton, rows)
        with torch.no_grad():
            assert all(
                torch.equal(a, model(**row, use_cache=False).logits) for a, row in zip(streamed, rows, strict=True)
            )


@pytest.mark.thorough
def test_the_emulator_of_legacy_names_is_that_of_module_names(legacy, tmp_path):
    family, model, *directories = legacy
    emulators = [emulator_of(base, family, model.config, tmp_path / f"emulator-{base.name}") for base in directories]
    planned = find_linears(model, family).linears
    assert sum(isinstance(module, LowRankLinear) for module in emulators[1].modules()) == len(planned)
    row = with_images(model.config)
    with torch.no_grad():
        first, second = (emulator(**row).logits for emulator in emulators)
    # The same numbers at other places of another file: how a weight lies in memory decides how its products round.
    assert deviation(first, second) < 1e-5


def test_merging_keeps_legacy_names(legacy, tmp_path):
    family, model, _, base = legacy
    lora = get_peft_model(model, lora_config(TrainSettings(lora_rank=2), family.lora_targets()))
    for name, parameter in lora.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    lora.save_pretrained(tmp_path / "adapter")
    merged = merge_job(tmp_path / "adapter", base, tmp_path / "merged", allow_uncorrected=True).run()
    assert Checkpoint(merged).tensors.keys() == Checkpoint(base).tensors.keys()
    auto_class = getattr(transformers, family.auto_class)
    loaded = auto_class.from_pretrained(merged, dtype="auto").eval()
    row = with_images(loaded.config)
    wrapped = PeftModel.from_pretrained(auto_class.from_pretrained(base, dtype="auto"), tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.allclose(loaded(**row).logits, wrapped(**row).logits, atol=1e-4)
        with wrapped.disable_adapter():
            assert not torch.allclose(loaded(**row).logits, wrapped(**row).logits, atol=1e-2)
