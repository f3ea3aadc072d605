"""The memory model: exact counts, traces equal to what real steps allocate, the search for a ratio, mistakes."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import transformers
from emloc_internvl import INTERNVL
from emloc_llama import LLAMA
from emloc_qwen import QWEN, QWEN_MOE, QWEN_VL
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, Qwen2VLImageProcessor

import emloc_core.finetune
import emloc_core.memory
from emloc_core import streamed
from emloc_core.allocator import give_back
from emloc_core.budget import LARGEST, advice, largest_ratio, parse_bytes
from emloc_core.checkpoint import Checkpoint
from emloc_core.errors import EmlocError
from emloc_core.family import Family
from emloc_core.finetune import FineTuning
from emloc_core.image_shape import image_shape, parse_size
from emloc_core.memory import MemoryModel, Workload
from emloc_core.output import read_json
from emloc_core.tracing import Ledger, Phases
from emloc_core.training import TrainSettings
from emloc_core.workload import make_workload

HEADLINE = Path(__file__).parent / "data" / "internvl2_5_38b" / "config.json"
TINY = [(family, config) for family in (LLAMA, QWEN, QWEN_MOE, QWEN_VL, INTERNVL) for config in family.tiny_configs]


def label(value: Any) -> str | None:
    """Name a tiny config by its model types; leave other values to pytest."""
    if not isinstance(value, Mapping):
        return getattr(value, "name", None)
    inner = value.get("text_config", {}).get("model_type")
    return f"{value['model_type']}+{inner}" if inner else value["model_type"]


def write_config(directory: Path, family: Family, dtype: str = "float32", **changes: object) -> Path:
    settings = {**family.tiny_configs[0], **changes}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    config.dtype = dtype
    directory.mkdir(exist_ok=True)
    config.save_pretrained(directory)
    return directory / "config.json"


def workload(batch: int = 4, length: int = 32, images: int = 0, device: str = "cpu", **train: object) -> Workload:
    return Workload(batch, length, images, TrainSettings(**train), device)


def peak(phases: Phases) -> int:
    return max(composition.total() for composition in phases.values())


def test_sizes_are_parsed() -> None:
    assert parse_bytes("24GiB") == 24 * 2**30
    assert parse_bytes("24GB") == parse_bytes("24g") == 24 * 10**9
    assert parse_bytes("800MB") == 8 * 10**8
    assert parse_bytes(" 1.5 TiB ") == 3 * 2**39
    assert parse_bytes("1000") == 1000


@pytest.mark.parametrize("text", ["", "lots", "24GiBs", "-3GB", "0GB", "12i", "1e9", "24 GiB free", "GB"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(EmlocError, match="no size of memory"):
        parse_bytes(text)


def test_parameters_are_counted_exactly(tiny_model: Path, tiny_emulator: Path) -> None:
    model = MemoryModel(tiny_model / "config.json", workload())
    real = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert model.parameters() == sum(parameter.numel() for parameter in real.parameters())
    assert model.parameters() * 4 == Checkpoint(tiny_model).nbytes
    assert model.weight_bytes(0.6) == Checkpoint(tiny_emulator).nbytes


def test_the_terms_of_tuning_are_exact(tiny_model: Path, tiny_emulator: Path, rows_file: Path, tmp_path: Path) -> None:
    adapter = FineTuning(tiny_emulator, str(rows_file), tmp_path / "a", TrainSettings(steps=1, lora_rank=3)).run()
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


def test_the_ledger_follows_births_and_deaths() -> None:
    with Ledger(widths=[50]) as ledger:
        kept = torch.zeros(1000)
        freed = torch.zeros(2000)
        view = freed[:10]
        del freed
        torch.zeros(3000)  # 4000 + 8000 + 12000 bytes: the peak; the view keeps its storage
        del view
        ledger.phase = "later"
        wide = torch.zeros(2, 50)
        ledger.enter(kept, "weights")
        kept.add_(1)
        torch.zeros(10)
    assert ledger.phases["forward"] == {"activations": 24_000}
    assert ledger.phases["later"] == {"weights": 4000, "activations": 40, "logits": wide.nbytes}


def test_logits_are_told_from_activations(tiny_model: Path) -> None:
    terms = MemoryModel(tiny_model / "config.json", workload(batch=16, length=128)).tuning().terms
    assert terms["logits"] > 16 * 128 * 128 * 4  # some tensors in fp32, as wide as the vocabulary


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("bf16", [True, False])
def test_a_trace_equals_what_the_trainer_allocates(
    checkpointing: bool, bf16: bool, tiny_emulator: Path, tiny_model: Path, rows_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The trainer's own step, on real tensors, under the same ledger."""
    seen: list[tuple[tuple[int, ...], int]] = []
    step = emloc_core.finetune._Trainer.training_step

    def followed(self: emloc_core.finetune._Trainer, model: torch.nn.Module, inputs: dict, *rest: object) -> object:
        with Ledger() as ledger:
            for parameter in model.parameters():
                ledger.enter(parameter, "weights")
            for tensor in inputs.values():
                ledger.enter(tensor, "activations")
            loss = step(self, model, inputs, *rest)
        seen.append((tuple(inputs["input_ids"].shape), peak(ledger.phases)))
        return loss

    monkeypatch.setattr(emloc_core.finetune._Trainer, "training_step", followed)
    settings = TrainSettings(steps=2, batch_size=6, gradient_checkpointing=checkpointing, bf16=bf16)
    FineTuning(tiny_emulator, str(rows_file), tmp_path / "adapter", settings).run()
    for (batch, length), real in seen:
        model = MemoryModel(tiny_model / "config.json", Workload(batch, length, 0, settings, "cpu"))
        terms = model.tuning(model.plan(0.6)).terms
        traced = sum(size for term, size in terms.items() if term not in ("optimiser", "overhead"))
        assert traced == pytest.approx(real, rel=0.01)


def test_a_trace_equals_what_generate_allocates(tiny_model: Path) -> None:
    real = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = torch.ones(4, 48, dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[0, :10] = 0
    with Ledger() as ledger:
        for parameter in real.parameters():
            ledger.enter(parameter, "weights")
        for tensor in (ids, mask):
            ledger.enter(tensor, "activations")
        real.generate(input_ids=ids, attention_mask=mask, max_new_tokens=1, min_new_tokens=1)
    terms = MemoryModel(tiny_model / "config.json", workload(batch=4, length=48)).inference().terms
    assert sum(terms.values()) - terms["overhead"] == pytest.approx(peak(ledger.phases), rel=0.01)


@pytest.mark.parametrize(("family", "settings"), TINY, ids=label)
def test_every_model_type_is_planned_and_counted_exactly(family: Family, settings: dict, tmp_path: Path) -> None:
    file = write_config(tmp_path / "model", family, **settings)
    real = getattr(transformers, family.auto_class).from_config(AutoConfig.from_pretrained(file.parent))
    images = int(family.modality == "image-text")
    size = (16, 24) if family is QWEN_VL else None
    model = MemoryModel(file, replace(workload(batch=2, length=48, images=images), image_size=size))
    assert model.parameters() == sum(parameter.numel() for parameter in real.parameters())
    lora = get_peft_model(real, TrainSettings().lora_config(model.targets))
    assert model.adapter_parameters() == sum(p.numel() for name, p in lora.named_parameters() if "lora_" in name)
    plan = model.plan(0.5)
    assert model.tuning(plan).terms["weights"] == model.parameters(plan) * 4 < model.tuning().terms["weights"]
    assert model.inference().total < model.tuning(plan).total


def images_of(file: Path, size: tuple[int, int] | None) -> dict[str, torch.Tensor]:
    """Return two rows of 60 tokens, the second padded, with two images each, as a processor gives them."""
    config = AutoConfig.from_pretrained(file.parent)
    shape = image_shape(file, config, size)
    ids = torch.ones(2, 60, dtype=torch.int64)
    ids[:, : 2 * shape.tokens] = config.image_token_id
    mask = torch.ones_like(ids)
    mask[1, -5:] = 0
    first, *rest = shape.pixels
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.zeros(4 * first, *rest)}
    if shape.grid:
        inputs["image_grid_thw"] = torch.tensor([shape.grid] * 4)
        inputs["position_ids"] = torch.zeros(3, 2, 60, dtype=torch.int64)
    else:
        inputs["position_ids"] = torch.zeros_like(ids)
    return inputs


PICTURED = [(INTERNVL, INTERNVL.tiny_configs[0]), *((QWEN_VL, settings) for settings in QWEN_VL.tiny_configs[1:])]


@pytest.mark.parametrize(("family", "settings"), PICTURED, ids=label)
def test_a_trace_equals_a_step_with_images(family: Family, settings: dict, tmp_path: Path) -> None:
    file = write_config(tmp_path / "model", family, **settings)
    size = (16, 24) if family is QWEN_VL else None
    model = MemoryModel(file, replace(workload(batch=2, length=60, images=2), image_size=size))
    real = AutoModelForImageTextToText.from_config(model.config, dtype=torch.float32).eval()
    inputs = images_of(file, size)
    with Ledger() as ledger, torch.no_grad():
        for parameter in real.parameters():
            ledger.enter(parameter, "weights")
        for tensor in inputs.values():
            ledger.enter(tensor, "activations")
        real(**inputs, use_cache=True, logits_to_keep=1)
    terms = model.inference().terms
    assert sum(terms.values()) - terms["overhead"] == pytest.approx(peak(ledger.phases), rel=0.01)


def test_a_trace_equals_a_step_of_experts(tmp_path: Path) -> None:
    model = MemoryModel(write_config(tmp_path / "model", QWEN_MOE), workload(batch=2, length=200))
    real = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32).eval()
    ids = torch.ones(2, 200, dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[0, :10] = 0
    with Ledger() as ledger, torch.no_grad():
        for parameter in real.parameters():
            ledger.enter(parameter, "weights")
        for tensor in (ids, mask):
            ledger.enter(tensor, "activations")
        real(input_ids=ids, attention_mask=mask, position_ids=torch.zeros_like(ids), use_cache=True, logits_to_keep=1)
    terms = model.inference().terms
    assert sum(terms.values()) - terms["overhead"] == pytest.approx(peak(ledger.phases), rel=0.01)


@pytest.mark.parametrize(
    ("model_type", "size", "tokens", "pixels", "grid"),
    [
        ("qwen2_vl", None, 256, (1024, 3 * 2 * 14 * 14), (1, 32, 32)),
        ("qwen2_5_vl", (720, 1280), 26 * 46, (52 * 92, 3 * 2 * 14 * 14), (1, 52, 92)),
        ("qwen3_vl", (448, 448), 196, (784, 3 * 2 * 16 * 16), (1, 28, 28)),
        ("internvl", None, 256, (1, 3, 448, 448), ()),
        ("internvl", (448, 448), 256, (1, 3, 448, 448), ()),
    ],
)
def test_an_image_is_as_many_tokens_as_the_processor_makes_of_it(
    model_type: str, size: tuple[int, int] | None, tokens: int, pixels: tuple[int, ...], grid: tuple[int, ...]
) -> None:
    shape = image_shape(Path("config.json"), AutoConfig.for_model(model_type), size)
    assert (shape.tokens, shape.pixels, shape.grid) == (tokens, pixels, grid)
    if grid:
        patch = {"qwen3_vl": 16}.get(model_type, 14)
        picture = numpy.zeros((*(size or (448, 448)), 3), dtype=numpy.uint8)
        made = Qwen2VLImageProcessor(patch_size=patch)(picture, return_tensors="pt")
        assert tuple(made["pixel_values"].shape) == pixels
        assert tuple(made["image_grid_thw"][0].tolist()) == grid


def test_sizes_of_images() -> None:
    assert parse_size("1280x720") == (720, 1280)
    for text in ("", "448", "0x448", "448x", "-1x2", "448x448x3"):
        with pytest.raises(EmlocError, match="no size of an image"):
            parse_size(text)
    with pytest.raises(EmlocError, match="images of 448 x 448 pixels alone"):
        image_shape(HEADLINE, AutoConfig.from_pretrained(HEADLINE), (720, 1280))


@pytest.mark.parametrize(
    ("family", "settings"),
    [(QWEN, QWEN.tiny_configs[1]), (QWEN_MOE, {**QWEN_MOE.tiny_configs[0], "mlp_only_layers": []}), *PICTURED],
    ids=label,
)
@pytest.mark.parametrize("checkpointing", [True, False])
def test_few_blocks_extended_equal_all_blocks(
    family: Family, settings: dict, checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep: dict[str, Any] = {**settings, "num_hidden_layers": 6}
    if family.modality == "image-text":
        depth = "num_hidden_layers" if family is INTERNVL else "depth"
        text, vision = settings["text_config"], {**settings["vision_config"], depth: 5}
        # As in real models, the cache of a block is smaller than its hidden states, or it would hide these.
        text = {**text, "num_hidden_layers": 9, "num_key_value_heads": 1}
        deep = {**settings, "text_config": text, "vision_config": vision}
        if "fullatt_block_indexes" in vision:
            vision["fullatt_block_indexes"] = [4]
    file = write_config(tmp_path / "deep", family, "bfloat16", **deep)
    images = int(family.modality == "image-text")
    size = (8, 12) if family is QWEN_VL else None
    load = replace(workload(images=images, gradient_checkpointing=checkpointing), image_size=size)
    model = MemoryModel(file, load)
    plan = model.plan(0.5)
    few = [model.inference(), model.tuning(), model.tuning(plan)]
    monkeypatch.setattr(emloc_core.memory, "_TRACED", 100)
    whole = [model.inference(), model.tuning(), model.tuning(plan)]
    if settings["model_type"] == "qwen2_5_vl":  # the numbers that say where windows end are fewer without windows
        assert [need.total for need in few] == pytest.approx([need.total for need in whole], abs=64)
    else:
        assert few == whole


def test_a_model_of_images_is_planned_for_text_alone(tmp_path: Path) -> None:
    file = write_config(tmp_path / "internvl", INTERNVL)
    with_images, text = (MemoryModel(file, workload(length=64, images=images)) for images in (1, 0))
    assert text.tuning().total < with_images.tuning().total
    assert text.tuning().terms["weights"] == with_images.tuning().terms["weights"] == text.parameters() * 4
    dense = {linear.path for linear in text.plan(0.5).linears if linear.rank is None}
    assert dense == {path for path in with_images.plan(0.5).ranks if "vision" in path}
    assert text.tuning(text.plan(0.5)).terms["weights"] == text.parameters(text.plan(0.5)) * 4


def test_blocks_of_unlike_ranks_are_traced_whole(tmp_path: Path) -> None:
    model = MemoryModel(write_config(tmp_path / "deep", QWEN, num_hidden_layers=5), workload())
    plan = model.plan(0.5)
    unlike = plan.with_ranks({path: rank - index % 2 for index, (path, rank) in enumerate(plan.ranks.items())})
    assert model.tuning(unlike).terms["weights"] == model.parameters(unlike) * 4


def test_needs_grow_with_ratio_batch_and_length(tiny_model: Path) -> None:
    model = MemoryModel(tiny_model / "config.json", workload())

    def tuning(**changes: int) -> int:
        changed = model.with_workload(replace(model.workload, **changes))
        return changed.tuning(changed.plan(0.5)).total

    ratios = [model.tuning(model.plan(ratio)).total for ratio in (0.1, 0.3, 0.6, 0.9)]
    assert sorted(set(ratios)) == ratios
    assert tuning() < tuning(batch_size=8) < tuning(batch_size=16)
    assert tuning() < tuning(length=64) < tuning(length=128)
    assert model.inference().total < model.with_workload(replace(model.workload, length=128)).inference().total


def test_what_saves_memory_is_seen_to(tiny_model: Path) -> None:
    def tuning(device: str = "cpu", **train: object) -> int:
        need = MemoryModel(tiny_model / "config.json", workload(16, 128, device=device, **train)).tuning()
        return need.total - need.terms["overhead"]

    assert tuning(gradient_checkpointing=True) < tuning(gradient_checkpointing=False)
    assert tuning(accumulation=1) < tuning(accumulation=2)
    assert tuning(lora_rank=4) < tuning(lora_rank=16)
    assert tuning(device="cuda") < tuning(device="cpu")  # there the loss is one kernel


def test_the_chosen_ratio_fits_and_the_next_does_not(tiny_model: Path) -> None:
    model = MemoryModel(tiny_model / "config.json", workload())
    for ratio in (0.13, 0.77):
        budget = model.tuning(model.plan(ratio)).total
        fit = largest_ratio(model, budget)
        assert fit is not None
        assert fit.ratio >= ratio
        assert fit.need.total <= budget
        assert model.tuning(model.plan(fit.ratio + 0.01)).total > budget


def test_the_ends_of_the_search(tiny_model: Path) -> None:
    model = MemoryModel(tiny_model / "config.json", workload())
    smallest = model.tuning(model.plan(0.01)).total
    assert largest_ratio(model, smallest - 1) is None
    fit = largest_ratio(model, 10 * smallest)
    assert fit is not None
    assert fit.ratio == LARGEST


def test_advice_is_computed(tiny_model: Path) -> None:
    model = MemoryModel(tiny_model / "config.json", workload(4, 128))
    smaller = model.with_workload(replace(model.workload, batch_size=2))
    budget = smaller.tuning(smaller.plan(0.5)).total
    lines = list(advice(model, budget))
    assert "ratio 0.01" in lines[0]
    assert lines[1].startswith(f"2 x 128 tokens fits with ratio {largest_ratio(smaller, budget).ratio:g}")
    assert lines[2].startswith("1 x 128 tokens fits with ratio 0.99")
    assert "4 bits" in lines[3]
    shorter = model.with_workload(replace(model.workload, batch_size=1, length=64))
    assert list(advice(model, shorter.tuning(shorter.plan(0.5)).total))[1].startswith("1 x 64 tokens fits")
    hopeless = list(advice(model, 1000))
    assert "no batch and no length fits" in hopeless[1]
    assert "does not fit" in hopeless[2]


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


def test_a_config_with_the_fields_of_the_language_model_outside_its_section(tmp_path: Path) -> None:
    """As Qwen2.5-VL was published."""
    whole = read_json(write_config(tmp_path / "now", QWEN_VL, **QWEN_VL.tiny_configs[1]))
    text = whole.pop("text_config")
    flat = {**text, **whole, "vision_config": {**whole["vision_config"], "model_type": "qwen2_5_vl"}}
    (tmp_path / "config.json").write_text(json.dumps(flat))
    found = MemoryModel(tmp_path / "config.json", workload())
    assert found.parameters() == MemoryModel(tmp_path / "now" / "config.json", workload()).parameters()
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
    with pytest.raises(EmlocError, match="quantised or an emulator"):
        MemoryModel(tiny_emulator / "config.json", workload())
    with pytest.raises(EmlocError, match="images cannot be planned"):
        MemoryModel(tiny_model / "config.json", workload(images=1))
    with pytest.raises(EmlocError, match="leave no text"):
        MemoryModel(HEADLINE, workload(length=512, images=2))


def test_a_model_that_computes_its_shapes_is_refused(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: x[x > 0].sum() + x)  # noqa: ARG005
    with pytest.raises(EmlocError, match="cannot be followed without weights"):
        MemoryModel(tiny_model / "config.json", workload()).tuning()


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
