"""The memory model: exact counts, the search for a ratio, mistakes."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from emloc_internvl import INTERNVL
from emloc_llama import LLAMA
from emloc_qwen import QWEN, QWEN_MOE, QWEN_VL
from peft import get_peft_model
from support.jobs import compress_job, train_job
from support.marks import thorough
from support.planned import CASES, HEADLINE, PICTURED, label, workload, write_config
from transformers import AutoConfig, AutoModelForCausalLM

from emloc_core.algorithms.allocation import Spectrum, global_budget
from emloc_core.emulator import needs
from emloc_core.emulator.decompose import Decomposition
from emloc_core.errors import EmlocError
from emloc_core.family import Family
from emloc_core.files.checkpoint import Checkpoint
from emloc_core.files.documents import read_json
from emloc_core.memory import streamed
from emloc_core.memory.budget import Budget, advice, largest_ratio
from emloc_core.memory.decision import decide
from emloc_core.memory.model import TERMS, MemoryModel
from emloc_core.memory.plan import make_plan
from emloc_core.memory.planned_model import _cached as planned_before
from emloc_core.memory.workload import make_workload
from emloc_core.model.blocks import block_paths
from emloc_core.model.inside import Inside
from emloc_core.model.overhead import overhead
from emloc_core.processes.heap import give_back
from emloc_core.settings import CompressSettings, TrainSettings
from emloc_core.tuning.trl import lora_config
from emloc_core.units import human_bytes, parse_bytes


def test_sizes_are_parsed() -> None:
    assert parse_bytes("24GiB") == 24 * 2**30
    assert parse_bytes("24GB") == parse_bytes("24g") == 24 * 10**9
    assert parse_bytes("800MB") == 8 * 10**8
    assert parse_bytes(" 1.5 TiB ") == 3 * 2**39
    assert parse_bytes("1000000") == 10**6


@pytest.mark.parametrize("text", ["", "lots", "24GiBs", "-3GB", "0GB", "12i", "1e9", "24 GiB free", "GB"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(EmlocError, match="24GiB, 24GB or 800MB"):
        parse_bytes(text)


def test_parameters_are_counted_exactly(tiny_model: Path, tiny_emulator: Path) -> None:
    model = MemoryModel(tiny_model / "config.json", workload())
    real = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert model.parameters() == sum(parameter.numel() for parameter in real.parameters())
    assert model.parameters() * 4 == Checkpoint(tiny_model).nbytes
    assert model.emulator_bytes(model.plan(0.6)) == Checkpoint(tiny_emulator).nbytes


def test_the_terms_of_tuning_are_exact(tiny_model: Path, tiny_emulator: Path, rows_file: Path, tmp_path: Path) -> None:
    adapter = train_job(tiny_emulator, rows_file, tmp_path / "a", TrainSettings(steps=1, lora_rank=3)).run()
    trained = read_json(adapter / "emloc.json")["result"]["trainable_parameters"]
    model = MemoryModel(tiny_model / "config.json", workload(lora_rank=3))
    need = model.tuning(model.plan(0.6))
    assert model.adapter_parameters() == trained
    assert need.terms["adapter"] == 4 * trained
    assert need.terms["optimiser"] == 8 * trained
    assert need.terms["weights"] == Checkpoint(tiny_emulator).nbytes


def test_the_cache_of_keys_and_values_is_exact(tiny_model: Path) -> None:
    need = MemoryModel(tiny_model / "config.json", workload(batch=3, length=20)).inference()
    layers, keys_and_values, heads, width, itemsize = 3, 2, 2, 8, 4
    assert need.terms["kv_cache"] == 3 * 20 * layers * keys_and_values * heads * width * itemsize


@pytest.mark.parametrize(("family", "settings"), CASES, ids=label)
def test_every_model_type_is_planned_and_counted_exactly(family: Family, settings: dict, tmp_path: Path) -> None:
    file = write_config(tmp_path / "model", family, **settings)
    real = getattr(transformers, family.auto_class).from_config(AutoConfig.from_pretrained(file.parent))
    images = int(family.modality == "image-text")
    size = (16, 24) if family is QWEN_VL else None
    model = MemoryModel(file, replace(workload(batch=2, length=48, images=images), image_size=size))
    assert model.parameters() == sum(parameter.numel() for parameter in real.parameters())
    lora = get_peft_model(real, lora_config(TrainSettings(), model.targets))
    assert model.adapter_parameters() == sum(p.numel() for name, p in lora.named_parameters() if "lora_" in name)
    plan = model.plan(0.5)
    assert model.tuning(plan).terms["weights"] == model.parameters(plan) * 4 < model.nbytes
    assert model.inference().total < model.tuning(plan).total


def test_a_model_of_images_is_planned_for_text_alone(tmp_path: Path) -> None:
    file = write_config(tmp_path / "internvl", INTERNVL)
    with_images, text = (MemoryModel(file, workload(length=64, images=images)) for images in (1, 0))
    assert text.tuning().total < with_images.tuning().total
    assert text.tuning().terms["weights"] == with_images.tuning().terms["weights"] == text.parameters() * 4
    dense = {linear.path for linear in text.plan(0.5).linears if linear.rank is None}
    assert dense == {path for path in with_images.plan(0.5).ranks if "vision" in path}
    assert text.tuning(text.plan(0.5)).terms["weights"] == text.parameters(text.plan(0.5)) * 4


def test_a_tower_may_have_no_blocks(tmp_path: Path) -> None:
    file = write_config(tmp_path / "internvl", INTERNVL)
    config = read_json(file)
    config["vision_config"]["num_hidden_layers"] = 0
    file.write_text(json.dumps(config))
    model = MemoryModel(file, workload(length=64, images=1), CompressSettings(kind="nf4"))
    needs = [model.tuning(model.plan()), streamed.compress(model, model.plan()), streamed.exact(model)]
    assert all(need.terms["activations"] for need in needs)


def test_needs_grow_with_ratio_batch_and_length(shallow_model: Path) -> None:
    model = MemoryModel(shallow_model / "config.json", workload())

    def tuning(**changes: int) -> int:
        changed = model.with_workload(replace(model.workload, **changes))
        return changed.tuning(changed.plan(0.5)).total

    ratios = [model.tuning(model.plan(ratio)).total for ratio in (0.1, 0.5)]
    assert sorted(set(ratios)) == ratios
    assert ratios[1] < tuning(batch_size=8)
    assert ratios[1] < tuning(length=64)
    assert model.inference().total < model.with_workload(replace(model.workload, length=128)).inference().total


def test_what_saves_memory_is_seen_to(shallow_model: Path) -> None:
    def tuning(device: str = "cpu", **train: object) -> int:
        need = MemoryModel(shallow_model / "config.json", workload(16, 128, device=device, **train)).tuning()
        return need.total - need.terms["overhead"]

    usual = tuning(gradient_checkpointing=True, accumulation=1, lora_rank=8)
    assert usual < tuning(gradient_checkpointing=False, accumulation=1, lora_rank=8)
    assert usual < tuning(gradient_checkpointing=True, accumulation=2, lora_rank=8)
    assert usual > tuning(gradient_checkpointing=True, accumulation=1, lora_rank=4)
    assert usual > tuning("cuda", gradient_checkpointing=True, accumulation=1, lora_rank=8)  # the loss is one kernel


def test_the_same_ranks_are_followed_once(shallow_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned_before.cache_clear()
    model = MemoryModel(shallow_model / "config.json", workload())
    traces: list[str] = []
    follow = MemoryModel._follow
    monkeypatch.setattr(MemoryModel, "_follow", lambda *args: (traces.append(""), follow(*args))[1])
    emulator = model.tuning(model.plan(0.5))
    assert model.tuning(model.plan(0.5)) == emulator != model.tuning() == model.tuning()
    assert len(traces) == 2
    again, longer = (MemoryModel(shallow_model / "config.json", workload(length=length)) for length in (32, 33))
    assert again.tuning() == model.tuning()
    assert len(traces) == 2
    assert longer.tuning().total > model.tuning().total
    assert len(traces) == 3
    imports = overhead("cpu", tuning=True)
    assert not model.fits(model.nbytes + imports - 1)  # by the weights and the imports alone, which are counted
    assert not model.fits(model.emulator_bytes(model.plan(0.3)) + imports - 1, model.plan(0.3))
    assert len(traces) == 3
    assert not model.fits(model.emulator_bytes(model.plan(0.3)) + imports, model.plan(0.3))
    assert len(traces) == 4


def test_the_chosen_ratio_fits_and_the_next_does_not(shallow_model: Path) -> None:
    model = MemoryModel(shallow_model / "config.json", workload())
    for ratio in (0.13, 0.77):
        budget = model.tuning(model.plan(ratio)).total
        fit = largest_ratio(model, budget)
        assert fit is not None
        assert fit.ratio >= ratio
        assert fit.need.total <= budget
        assert model.tuning(model.plan(fit.ratio + 0.01)).total > budget


def test_the_ends_of_the_search(shallow_model: Path) -> None:
    model = MemoryModel(shallow_model / "config.json", workload())
    smallest = model.tuning(model.plan(0.01)).total
    assert largest_ratio(model, smallest - 1) is None
    fit = largest_ratio(model, 10 * smallest)
    assert fit is not None
    assert fit.ratio == 0.99


def test_another_kind_makes_other_parts_smaller(tmp_path: Path) -> None:
    config = write_config(tmp_path, QWEN_MOE)
    levels = MemoryModel(config, workload(batch=1), CompressSettings(kind="trellis"))
    factors, alone = levels.with_kind("low-rank"), MemoryModel(config, workload(batch=1))
    assert factors.coverage.describe() == alone.coverage.describe() != levels.coverage.describe()
    assert factors.plan().ranks == alone.plan().ranks


def test_what_the_base_needs_is_traced_once_for_all_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned_before.cache_clear()
    base = MemoryModel(write_config(tmp_path, LLAMA, num_hidden_layers=1), workload(batch=1))
    traced = []
    real = MemoryModel._trace_tuning
    monkeypatch.setattr(MemoryModel, "_trace_tuning", lambda self, plan: traced.append(plan) or real(self, plan))
    kinds = [base.with_kind(name) for name in ("nf4", "low-rank")]
    assert len({kind.tuning().total for kind in [*kinds, base]}) == 1
    assert traced == [None]
    needs = [kind.tuning(kind.plan(0.5)).total for kind in kinds]
    assert len(set(needs)) == len(needs)  # what stands in for the base differs
    assert base.tuning(base.plan(0.5)).total == needs[-1]
    assert len(traced) == 1 + len(kinds)


def test_advice_is_computed(shallow_model: Path) -> None:
    model = MemoryModel(shallow_model / "config.json", workload(1, 128, target_modules=["q_proj"], bf16=False))
    shorter = model.with_workload(replace(model.workload, length=64))
    budget = shorter.tuning(shorter.plan(0.5)).total
    smallest, fits = advice(model, budget)
    assert "smallest emulator (low-rank at 0.01) on 1 x 128 tokens" in smallest
    assert fits.startswith(f"1 x 64 tokens fits at {largest_ratio(shorter, budget).ratio:g} (")
    assert "no length fits: even 1 x 64" in list(advice(model, 1000))[1]


def test_advice_names_no_ratio_where_a_kind_has_none(shallow_model: Path) -> None:
    model = MemoryModel(shallow_model / "config.json", workload(1, 128), CompressSettings(kind="trellis"))
    shorter = model.with_workload(replace(model.workload, length=64))
    smallest, half = advice(model, shorter.tuning(shorter.plan(0.5)).total)
    assert smallest.startswith("tuning the smallest emulator (trellis) on 1 x 128")
    assert half.startswith("1 x 64 tokens fits (")


@pytest.mark.thorough
def test_the_smallest_emulator_is_the_one_that_needs_least(shallow_model: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"  # with a large vocabulary, which other kinds pack, and low-rank does not
    config.write_text(json.dumps(read_json(shallow_model / "config.json") | {"vocab_size": 50_000}))
    decision = decide(config, workload(1, 64), Budget(1000))
    least = min(way.bytes for way in decision.ways if way.kind)
    assert decision.advice()[0].endswith(f"needs {human_bytes(least)}")


def test_headroom_is_a_share_with_a_limit_or_what_the_user_says() -> None:
    assert Budget.parse("10GB") == Budget(10**10, 5 * 10**8)
    assert Budget.parse("80GiB").headroom == 1 << 30
    assert Budget.parse("10GB", "8%").usable == 92 * 10**8
    assert Budget.parse("10GB", "2GB").usable == 8 * 10**9
    assert Budget.parse("10GB", "0").usable == 10**10
    with pytest.raises(EmlocError, match="leaves nothing"):
        Budget.parse("10GB", "10GB")
    with pytest.raises(EmlocError, match="not a memory size"):
        Budget.parse("10GB", "a bit")
    with pytest.raises(EmlocError, match="memory size, but none is given"):
        Budget.named(None, "8%")


@pytest.mark.thorough
def test_the_headline_of_the_paper() -> None:
    """InternVL2.5-38B: about 95 GB for ordinary tuning, and an emulator whose tuning fits 24 GiB."""
    settings = TrainSettings()
    model = MemoryModel(HEADLINE, make_workload(HEADLINE, settings))
    assert (model.workload.batch_size, model.workload.length, model.workload.images) == (8, 1024, 1)
    assert model.parameters() == pytest.approx(38.4e9, rel=0.002)
    assert model.tuning().total == pytest.approx(95e9, rel=0.1)
    assert model.tuning(model.plan(0.1)).total <= 24 * 2**30
    assert model.parameters() * 2 > 76e9  # so that inference alone does not fit


def test_stages_that_stream_are_below_the_whole(tmp_path: Path) -> None:
    deep = {"num_hidden_layers": 64, "hidden_size": 512, "intermediate_size": 1024}
    file = write_config(tmp_path / "deep", QWEN, **deep)
    model = MemoryModel(file, workload())
    plan = model.plan(0.5)
    for need in (streamed.compress(model, plan), streamed.correct(model, plan), streamed.merge(model)):
        assert need.terms["weights"] < model.parameters() * 4 / 8


def test_the_sums_of_stage_one_by_hand(tmp_path: Path) -> None:
    """Where down_proj, 1024 x 8192, takes most; tests/emulator/test_needs.py measures how much that is."""
    sizes = {"hidden_size": 1024, "intermediate_size": 8192, "num_attention_heads": 16, "num_key_value_heads": 16}
    file = write_config(tmp_path / "wide", QWEN, **{**sizes, "head_dim": 64})
    m, n = 1024, 8192
    summing = 8 * (n**2 + 2 * m * n) + 8 * 1024 * (5 * n + m)  # beside a weight; of 1024 tokens that wait
    dense = 4 * m**2 + 2 * m * n  # as rows pass through, before down_proj
    inside = 3 * (m + n) * workload().length  # around the activation function
    expected = [
        ({"kind": "nf4"}, summing, dense),
        ({"kind": "trellis", "samples": 64}, summing, dense),
        ({"kind": "trellis"}, summing, dense),
    ]
    rows = []
    for options, statistics, stand_ins in expected:
        model = MemoryModel(file, workload(), CompressSettings(**options))
        plan = model.plan()
        terms = streamed.compress(model, plan).terms
        packed = sum(linear.nbytes(model.format, model.dtype) for linear in plan.linears if linear.block.endswith(".0"))
        assert terms["statistics"] == statistics + packed, options
        assert terms["stand-ins"] == stand_ins * model.dtype.itemsize
        assert terms["weights"] == (4 * m**2 + 3 * m * n + 5 * m) * model.dtype.itemsize  # with norms and biases
        rows.append(terms["activations"] - inside * model.dtype.itemsize)
    assert rows[0] == rows[1]
    assert rows[2] == 4 * rows[0]  # of four times as many
    base = CompressSettings(calibration="base", samples=32)
    model = MemoryModel(file, workload(), base)
    waiting = streamed.compress(model, model.plan()).terms["activations"] - inside * model.dtype.itemsize
    assert rows[0] == 4 * waiting  # of twice as many, in two streams


def test_stage_one_takes_what_its_largest_phase_does(tmp_path: Path) -> None:
    file = write_config(tmp_path / "many words", QWEN, vocab_size=50_000)
    plain, kept = (MemoryModel(file, workload(), CompressSettings(kind="nf4", keep=keep)) for keep in (None, "head"))
    packing, dense = (streamed.compress(model, model.plan()) for model in (plain, kept))
    assert packing.phase == "packing the vocabulary"
    assert dense.phase == "the largest matrix outside the blocks"
    assert packing.total > dense.total
    blocks = write_config(tmp_path / "blocks", QWEN, hidden_size=512, intermediate_size=1024)
    first, even = (CompressSettings(calibration="base", allocator=name, ratio=0.05) for name in ("global", "uniform"))
    by_spectra, uniform = (
        streamed.compress(model, model.plan()).total
        for model in (MemoryModel(blocks, workload(), settings) for settings in (first, even))
    )
    assert by_spectra > uniform  # factors of half of the parameters, in the pass before


@pytest.mark.parametrize("kind", ["nf4", "trellis"])
def test_stage_one_leaves_a_gpu_what_is_planned(tiny_model: Path, rows_file: Path, tmp_path: Path, kind: str) -> None:
    settings = CompressSettings(kind=kind, samples=4, selection=2)
    job = compress_job(tiny_model, rows_file, tmp_path / "e", settings)
    arguments = (job.samples, job.format, lambda *_: None)
    block_needs = Decomposition(job.base.skeleton, job.plan, *arguments).needs(propagated=True)
    model = MemoryModel(tiny_model / "config.json", workload(device="cuda"), settings)
    terms = streamed.compress(model, model.plan(job.settings.ratio)).terms
    most = max(block_needs, key=lambda need: need.nbytes)
    assert most.nbytes - most.inside == terms["weights"] + terms["statistics"] + terms.get("stand-ins", 0)
    inside = most.inside // max(sample.size for sample in job.samples) * model.workload.length
    assert terms["activations"] == 2 * model.step.waiting("calibration", 1) + inside
    assert {"the output layer", "packed embeddings"} <= {need.phase for need in block_needs}


def test_the_sums_of_stage_three_by_hand(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
    file = write_config(tmp_path / "small", QWEN, **{**sizes, "head_dim": 16, "vocab_size": 96})
    model = MemoryModel(file, workload(length=20), CompressSettings(selection=5))
    itemsize, hidden, inner = model.dtype.itemsize, 64, 128
    plan = model.plan(0.5)
    block = 4 * hidden**2 + 3 * hidden * inner + 5 * hidden  # with two norms and three biases
    need = streamed.correct(model, plan)
    assert need.terms["activations"] == 5 * 8 * 20 * hidden * itemsize
    assert need.terms["logits"] == 20 * 96 * (itemsize + 8)
    assert need.terms["weights"] - (16 << 20) == (block + hidden * inner) * itemsize  # as four bits are read
    assert need.terms["adapter"] == 4 * 4 * model.adapter_parameters()
    fixed = streamed.correct(model, plan, 3)
    assert fixed.terms.keys() == {"weights", "adapter", "overhead"}
    assert fixed.terms["weights"] - (16 << 20) == 2 * hidden * inner * itemsize
    assert fixed.terms["adapter"] == 2 * 4 * model.adapter_parameters()


def test_rows_with_images_wait_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "inside", lambda *base: dict.fromkeys(block_paths(*base), Inside(0, 0)))
    file = write_config(tmp_path / "seeing", INTERNVL, **PICTURED[0][1])
    text, seeing = (MemoryModel(file, workload(length=40, images=images)) for images in (0, 2))
    with_text, with_images = (
        (streamed.compress(model, model.plan(0.5)).terms["activations"],
         streamed.correct(model, model.plan(0.5)).terms["activations"])
        for model in (text, seeing)
    )  # fmt: skip
    assert seeing.image is not None
    hidden, vision = (part.hidden_size for part in (text.config.text_config, text.config.vision_config))
    pixels = 2 * torch.Size(seeing.image.pixels).numel()
    widest = max(40 * hidden, 2 * seeing.image.patches * vision)
    for before, after in zip(with_text, with_images, strict=True):
        assert after * 40 * hidden == before * (pixels + widest)


def test_boundaries_of_exact_steps_leave_a_gpu_that_has_no_room_for_them(shallow_model: Path) -> None:
    cpu, gpu = (
        streamed.exact(MemoryModel(shallow_model / "config.json", workload(device=device)), rows=4).total
        for device in ("cpu", "cuda")
    )
    boundaries = 4 * 32 * 32 * 4  # before the one block: 32 numbers of 32 tokens
    besides = {device: overhead(device, tuning=True) for device in ("cpu", "cuda")}
    assert cpu - besides["cpu"] - boundaries == gpu - besides["cuda"] > 0


def test_a_way_that_does_not_fit_and_one_that_is_not_there_are_told_apart(shallow_model: Path) -> None:
    budget = Budget(1000, 50)
    decision = decide(shallow_model / "config.json", workload(objective="dpo"), budget, CompressSettings(kind="nf4"))
    with pytest.raises(EmlocError, match=rf"rows per step, needs .* MB, which does not fit {budget}\."):
        decision.best("lora")
    with pytest.raises(EmlocError, match=r"^The model cannot be tuned by the way 'exact'\.") as refused:
        decision.best("exact")
    assert refused.value.code == "unsupported"


@pytest.mark.thorough
@pytest.mark.parametrize(("images", "kind"), [(0, "trellis"), (1, "low-rank-nf4")])
def test_the_recommended_kind_below_four_bits(images: int, kind: str, tmp_path: Path) -> None:
    file = write_config(tmp_path / "seeing", INTERNVL, **PICTURED[0][1])
    load = workload(batch=1, length=40, images=images)
    rounded = MemoryModel(file, load, CompressSettings(kind="nf4"))
    budget = rounded.tuning(rounded.plan(0.5)).total
    assert decide(file, load, Budget(budget)).emulator.kind == "nf4"
    assert decide(file, load, Budget(budget - 1)).emulator.kind == kind


@pytest.mark.parametrize("kind", ["low-rank", "trellis", *thorough("nf4", "low-rank-nf4", "low-rank-2-bit")])
def test_every_term_has_a_column(kind: str, shallow_model: Path) -> None:
    decision = decide(shallow_model / "config.json", workload(), Budget(10**12), CompressSettings(kind=kind))
    for need in make_plan("small", decision).needs:
        assert need.terms.keys() <= set(TERMS)


def test_a_plan_is_enough_wherever_ranks_are_shared_out(tiny_model: Path) -> None:
    load = workload(gradient_checkpointing=False)  # so that every block's inside counts
    shared, even = (
        MemoryModel(tiny_model / "config.json", load, CompressSettings(calibration="base", allocator=allocator))
        for allocator in ("global", "uniform")
    )
    plan = shared.plan(0.4)
    need = shared.tuning(plan)
    assert need.terms["weights"] == even.tuning(plan).terms["weights"] == shared.emulator_bytes(plan)
    assert need.terms["activations"] > even.tuning(plan).terms["activations"]
    assert shared.tuning(plan, exists=True) == even.tuning(plan)
    shapes = {linear.path: (linear.out_features, linear.in_features) for linear in plan.linears}
    draw = random.Random(0)
    spectra = [
        Spectrum(path, "", torch.rand(min(shape)).double().sort(descending=True).values, draw.random())
        for path, shape in shapes.items()
    ]
    ranks = dict(zip(shapes, global_budget(list(shapes.values()), 0.4, spectra), strict=True))
    actual = shared.tuning(plan.with_ranks(ranks), exists=True)
    assert actual.terms["weights"] <= need.terms["weights"]
    assert actual.terms["activations"] <= need.terms["activations"]


def test_a_config_with_the_fields_of_the_language_model_outside_its_section(tmp_path: Path) -> None:
    """As Qwen2.5-VL was published."""
    config = read_json(write_config(tmp_path / "now", QWEN_VL, **QWEN_VL.tiny_configs[1]))
    text = config.pop("text_config")
    flat = {**text, **config, "vision_config": {**config["vision_config"], "model_type": "qwen2_5_vl"}}
    (tmp_path / "config.json").write_text(json.dumps(flat))
    model = MemoryModel(tmp_path / "config.json", workload())
    assert model.parameters() == MemoryModel(tmp_path / "now" / "config.json", workload()).parameters()
    del flat["hidden_size"]
    (tmp_path / "config.json").write_text(json.dumps(flat))
    with pytest.raises(EmlocError, match=r"has no text_config\.hidden_size"):
        MemoryModel(tmp_path / "config.json", workload())
    del flat["vision_config"]
    (tmp_path / "config.json").write_text(json.dumps({**flat, "hidden_size": 32}))
    with pytest.raises(EmlocError, match="has no vision_config"):
        MemoryModel(tmp_path / "config.json", workload())


@pytest.mark.parametrize("field", ["hidden_size", "vocab_size", "num_hidden_layers"])
def test_a_field_is_missing(field: str, tiny_model: Path, tmp_path: Path) -> None:
    content = read_json(tiny_model / "config.json")
    del content[field]
    file = tmp_path / "config.json"
    file.write_text(json.dumps(content))
    with pytest.raises(EmlocError, match=rf"config\.json has no {field}"):
        MemoryModel(file, workload())


@pytest.mark.parametrize(
    ("section", "field"),
    [("text_config", None), ("text_config", "hidden_size"), ("vision_config", "num_hidden_layers")],
)
def test_a_field_of_a_section_is_missing(section: str, field: str | None, tmp_path: Path) -> None:
    content = read_json(HEADLINE)
    if field:
        del content[section][field]
    else:
        del content[section]
    file = tmp_path / "config.json"
    file.write_text(json.dumps(content))
    with pytest.raises(EmlocError, match=f"has no {section}" + (rf"\.{field}" if field else "")):
        MemoryModel(file, workload(images=1))


def test_other_mistakes(tiny_model: Path, tiny_emulator: Path, tmp_path: Path) -> None:
    content = read_json(tiny_model / "config.json")
    file = tmp_path / "config.json"

    def model_of(**changes: object) -> MemoryModel:
        file.write_text(
            json.dumps({name: value for name, value in {**content, **changes}.items() if value is not None})
        )
        return MemoryModel(file, workload())

    with pytest.raises(EmlocError, match="has no model_type"):
        model_of(model_type=None)
    with pytest.raises(EmlocError, match="No installed family declares the model type 'nonesuch'"):
        model_of(model_type="nonesuch")
    with pytest.raises(EmlocError, match="has no dtype"):
        model_of(dtype=None)
    with pytest.raises(EmlocError, match="num_attention_heads is 4, not a multiple of num_key_value_heads, 3"):
        model_of(num_key_value_heads=3)
    with pytest.raises(EmlocError, match="vocab_size is 1,099,511,627,776, more than any model has"):
        model_of(vocab_size=2**40)
    with pytest.raises(EmlocError, match="has no num_key_value_heads"):  # its class would assume 32
        model_of(model_type="qwen3", num_key_value_heads=None)
    assert model_of(num_key_value_heads=None).config.num_key_value_heads == 4
    for name, value in (("hidden_size", -64), ("hidden_act", "foo"), ("dtype", "float8_e4m3fn")):
        with pytest.raises(EmlocError, match="cannot be built"):
            model_of(**{name: value})
    with pytest.raises(EmlocError, match="The model has no blocks"):
        model_of(num_hidden_layers=0)
    with pytest.raises(EmlocError, match="is an emulator"):
        MemoryModel(tiny_emulator / "config.json", workload())
    with pytest.raises(EmlocError, match="images cannot be planned"):
        MemoryModel(tiny_model / "config.json", workload(images=1))
    with pytest.raises(EmlocError, match="leave no room for text"):
        MemoryModel(HEADLINE, workload(length=512, images=2))


def test_a_model_that_computes_its_shapes_is_refused(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: x[x > 0].sum() + x)  # noqa: ARG005
    with pytest.raises(EmlocError, match="cannot be traced without weights"):
        MemoryModel(tiny_model / "config.json", workload()).tuning()


def test_a_model_that_cannot_recompute_activations_is_planned_without(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.LlamaForCausalLM, "supports_gradient_checkpointing", False)
    with pytest.raises(EmlocError, match=r"cannot recompute the activations of a LlamaForCausalLM\. Give --no-grad"):
        MemoryModel(tiny_model / "config.json", workload()).tuning()
    MemoryModel(tiny_model / "config.json", workload(gradient_checkpointing=False)).tuning()


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="the resident set is read from /proc")
def test_freed_memory_is_given_back() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    blocks = [torch.ones(25_000) for _ in range(2000)]  # 100 kB each: below glibc's lowest threshold
    last = blocks.pop()
    blocks.clear()
    before = resident()
    give_back()
    assert before - resident() > 50e6
    assert last[0] == 1
