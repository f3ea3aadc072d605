"""Traced steps allocate what real steps do, and a few blocks stand for all."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from emloc_gemma import GEMMA
from emloc_internvl import INTERNVL
from emloc_qwen import QWEN, QWEN_MOE, QWEN_VL
from support.jobs import train_job
from support.marks import thorough
from support.planned import PICTURED, label, workload, write_config
from support.rows import write_jsonl
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, MiniMaxConfig

import emloc_core.memory.depth
import emloc_core.memory.planned_model
from emloc_core.family import Family
from emloc_core.memory.depth import repetition
from emloc_core.memory.fake import fake
from emloc_core.memory.model import MemoryModel, Need
from emloc_core.memory.tracing import Ledger, Phases
from emloc_core.memory.workload import Workload
from emloc_core.model.image_shape import image_shape
from emloc_core.settings import TrainSettings
from emloc_core.tuning.trainer import LoraTrainer


def peak(phases: Phases) -> int:
    return max(composition.total() for composition in phases.values())


def allocated(model: torch.nn.Module, inputs: Mapping[str, torch.Tensor], run: Callable[[], object]) -> int:
    """Return the peak of what a run on real tensors allocates, weights and inputs included."""
    with Ledger() as ledger, torch.no_grad():
        for parameter in model.parameters():
            ledger.enter(parameter, "weights")
        for tensor in inputs.values():
            ledger.enter(tensor, "activations")
        run()
    return peak(ledger.phases)


def tensors(need: Need) -> int:
    """Return what a plan says of tensors: all but the overhead."""
    return need.total - need.terms["overhead"]


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


def test_what_lies_on_the_meta_device_takes_nothing() -> None:
    """The stacks of packed experts do, in the module that is replaced: code asks for their shapes."""
    stack = torch.empty(4, 3, 2, device="meta")
    with fake({}), Ledger() as ledger:
        assert stack.mT.shape == (4, 2, 3)
    assert not ledger.phases


def test_logits_are_told_from_activations(tiny_model: Path) -> None:
    terms = MemoryModel(tiny_model / "config.json", workload(batch=16, length=128)).tuning().terms
    assert terms["logits"] > 16 * 128 * 128 * 4  # some tensors in fp32, as wide as the vocabulary


@pytest.mark.parametrize(
    ("checkpointing", "bf16"),
    [
        (True, True),
        *thorough((False, False), (True, False), (False, True)),
    ],
)
def test_a_trace_equals_what_the_trainer_allocates(
    checkpointing: bool, bf16: bool, tiny_emulator: Path, tiny_model: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The trainer's own step, on real tensors, under the same ledger; every token counts, as plans assume."""
    peaks: list[tuple[tuple[int, ...], int]] = []
    step = LoraTrainer.training_step

    def followed(self: LoraTrainer, model: torch.nn.Module, inputs: dict, *rest: object) -> object:
        with Ledger() as ledger:
            for parameter in model.parameters():
                ledger.enter(parameter, "weights")
            for tensor in inputs.values():
                ledger.enter(tensor, "activations")
            loss = step(self, model, inputs, *rest)
        peaks.append((tuple(inputs["input_ids"].shape), peak(ledger.phases)))
        return loss

    monkeypatch.setattr(LoraTrainer, "training_step", followed)
    settings = TrainSettings(steps=2, batch_size=6, gradient_checkpointing=checkpointing, bf16=bf16)
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": "animal: cat, colour: red. " * 8}] * 12)
    train_job(tiny_emulator, rows, tmp_path / "adapter", settings).run()
    for (batch, length), real in peaks:
        model = MemoryModel(tiny_model / "config.json", Workload(batch, length, 0, settings, "cpu"))
        terms = model.tuning(model.plan(0.6)).terms
        traced = sum(size for term, size in terms.items() if term not in ("optimiser", "overhead"))
        assert traced == pytest.approx(real, rel=0.01)


def test_a_trace_equals_what_generate_allocates(tiny_model: Path) -> None:
    real = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = torch.ones(4, 48, dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[0, :10] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    real_peak = allocated(real, inputs, lambda: real.generate(**inputs, max_new_tokens=1, min_new_tokens=1))
    need = MemoryModel(tiny_model / "config.json", workload(batch=4, length=48)).inference()
    assert tensors(need) == pytest.approx(real_peak, rel=0.01)


def test_a_model_whose_cache_is_its_own_is_traced(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {"num_local_experts": 2, "layer_types": ["linear_attention", "full_attention"], "block_size": 16}
    config = MiniMaxConfig(vocab_size=256, num_key_value_heads=1, **sizes, **experts)
    config.dtype, config.architectures = "float32", ["MiniMaxForCausalLM"]
    config.save_pretrained(tmp_path)
    real = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.ones(1, 48, dtype=torch.int64)
    real_peak = allocated(real, {"input_ids": ids}, lambda: real.generate(ids, max_new_tokens=1, min_new_tokens=1))
    need = MemoryModel(tmp_path / "config.json", workload(batch=1, length=48)).inference()
    assert tensors(need) == pytest.approx(real_peak, rel=0.01)


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


@pytest.mark.parametrize(("family", "settings"), PICTURED, ids=label)
def test_a_trace_equals_a_step_with_images(family: Family, settings: dict, tmp_path: Path) -> None:
    file = write_config(tmp_path / "model", family, **settings)
    size = (16, 24) if family is QWEN_VL else None
    model = MemoryModel(file, replace(workload(batch=2, length=60, images=2), image_size=size))
    config = AutoConfig.from_pretrained(file.parent)
    real = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    inputs = images_of(file, size)
    real_peak = allocated(real, inputs, lambda: real(**inputs, use_cache=True, logits_to_keep=1))
    assert tensors(model.inference()) == pytest.approx(real_peak, rel=0.01)


def test_a_trace_equals_a_step_of_experts(tmp_path: Path) -> None:
    file = write_config(tmp_path / "model", QWEN_MOE)
    model = MemoryModel(file, workload(batch=2, length=200))
    real = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(file.parent), dtype=torch.float32).eval()
    ids = torch.ones(2, 200, dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[0, :10] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": torch.zeros_like(ids)}
    real_peak = allocated(real, inputs, lambda: real(**inputs, use_cache=True, logits_to_keep=1))
    assert tensors(model.inference()) == pytest.approx(real_peak, rel=0.01)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        (QWEN_MOE, {**QWEN_MOE.tiny_configs[0], "mlp_only_layers": [0, 1]}),
        *thorough(
            (QWEN, QWEN.tiny_configs[1]),
            (GEMMA, GEMMA.tiny_configs[0]),
            (QWEN_MOE, {**QWEN_MOE.tiny_configs[0], "mlp_only_layers": []}),
            *PICTURED,
        ),
    ],
    ids=label,
)
@pytest.mark.parametrize("checkpointing", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_few_blocks_extended_equal_all_blocks(
    family: Family, settings: dict, checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The towers of images take most of the time, so what is tuned alternates for them: the emulator or the base."""
    deep: dict[str, Any] = {**settings, "num_hidden_layers": 5}
    if settings.get("mlp_only_layers"):  # dense ones come before those with experts
        deep["num_hidden_layers"] = 7
    if types := settings.get("layer_types"):  # which repeat after three blocks
        deep |= {"num_hidden_layers": 8, "layer_types": (types * 3)[:8]}
    if family.modality == "image-text":
        depth = "num_hidden_layers" if family is INTERNVL else "depth"
        text, vision = settings["text_config"], {**settings["vision_config"], depth: 5}
        # As in real models, the cache of a block is smaller than its hidden states, or it would hide these. Where
        # DeepStack adds to what the first blocks put out, six are traced, else three.
        layers = 8 if "deepstack_visual_indexes" in vision else 5
        text = {**text, "num_hidden_layers": layers, "num_key_value_heads": 1}
        deep = {**settings, "text_config": text, "vision_config": vision}
        if "fullatt_block_indexes" in vision:
            vision["fullatt_block_indexes"] = [4]
    file = write_config(tmp_path / "deep", family, "bfloat16", **deep)
    images = int(family.modality == "image-text")
    size = (8, 12) if family is QWEN_VL else None
    load = replace(workload(images=images, gradient_checkpointing=checkpointing), image_size=size)

    def needs() -> list[Need]:
        model = MemoryModel(file, load)
        if checkpointing:
            return [model.tuning(model.plan(0.5)), *([] if images else [model.tuning()])]
        # Short rows need most in the tower of images, long ones in that of text.
        inference = [MemoryModel(file, replace(load, length=length)).inference() for length in (32, 128)]
        return [model.tuning(), *([] if images else [model.tuning(model.plan(0.5))]), *inference]

    few = needs()
    if images and not checkpointing:  # else what DeepStack adds to the first blocks would not be seen
        assert few[-1].phase == "language forward"
    monkeypatch.setattr(emloc_core.memory.depth, "_OUTER", 100)
    emloc_core.memory.planned_model._cached.cache_clear()
    all_blocks = needs()
    if settings["model_type"] == "qwen2_5_vl":  # the numbers that say where windows end are fewer without windows
        assert [need.total for need in few] == pytest.approx([need.total for need in all_blocks], abs=64)
    else:
        assert few == all_blocks


@pytest.mark.parametrize(
    ("blocks", "apart", "period"),
    [
        ("a", 0, 1),
        ("aaaa", 0, 1),
        ("abab", 0, 2),
        ("ssfssfs", 0, 3),
        ("ddeee", 2, 1),
        ("dabab", 1, 2),
        ("abcd", 0, 4),
    ],
)
def test_first_blocks_may_differ_from_those_that_repeat(blocks: str, apart: int, period: int) -> None:
    assert repetition(blocks) == (apart, period)


def test_blocks_of_unlike_ranks_are_traced_whole(tmp_path: Path) -> None:
    model = MemoryModel(write_config(tmp_path / "deep", QWEN, num_hidden_layers=5), workload())
    plan = model.plan(0.5)
    unlike = plan.with_ranks({path: rank - (index % 5 == 0) for index, (path, rank) in enumerate(plan.ranks.items())})
    assert model.tuning(unlike).terms["weights"] == model.parameters(unlike) * 4
