"""Operations of a forward pass, against what torch counts while it computes."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from emloc_internvl import INTERNVL
from emloc_qwen import QWEN_VL
from support.planned import CASES, label, workload, write_config
from torch.utils.flop_counter import FlopCounterMode

from emloc_core.family import Family
from emloc_core.memory import arithmetic
from emloc_core.memory.fake import fake, fake_inputs, without_contents
from emloc_core.memory.model import MemoryModel
from emloc_core.memory.planned_model import planned_model
from emloc_core.settings import CompressSettings

#: What torch does not count.
IN_PLACE = {torch.ops.aten.addmm_: lambda _, a, b, **options: 2 * a[0] * a[1] * b[1]}  # noqa: ARG005


def counted(counter: FlopCounterMode) -> int:
    products = counter.get_flop_counts().get("Global", {})
    return sum(count for operation, count in products.items() if "convolution" not in str(operation))


def forward_operations(planned: MemoryModel, model: Any) -> int:
    """What a forward pass of the workload counts; the whole of the model's shapes, without numbers."""
    with fake(planned.step.inputs), torch.no_grad():
        without_contents(model)
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
            model.eval()(**fake_inputs(**planned.step.inputs))
    return counted(counter)


def plan_of(family: Family, settings: dict[str, Any], directory: Path, **options: Any) -> MemoryModel:
    images, size = int(family.modality == "image-text"), (16, 24) if family is QWEN_VL else None
    load = replace(workload(batch=2, length=48, images=images), image_size=size)
    return MemoryModel(
        write_config(directory, family, **settings), load, CompressSettings(**{"kind": "low-rank", **options})
    )


@pytest.mark.parametrize(("family", "settings"), CASES, ids=label)
def test_a_forward_pass_is_counted_exactly(family: Family, settings: dict[str, Any], tmp_path: Path) -> None:
    planned = plan_of(family, settings, tmp_path / "model")
    blocks = [planned.model.get_submodule(tower.blocks) for tower in family.towers]
    routers = [gate.weight.numel() for tower in blocks for block in tower for name, gate in block.named_modules()
               if name.endswith(".gate") and not isinstance(gate, torch.nn.Linear)]  # fmt: skip
    assert bool(routers) == planned.linears.has_experts
    exact = forward_operations(planned, copy.deepcopy(planned_model(planned.config_file).model))
    assert 2 * arithmetic.forward(planned) == exact - 2 * 2 * 48 * sum(routers)


@pytest.mark.parametrize("kind", ["low-rank", "trellis"])
def test_an_emulator_has_its_own(kind: str, tmp_path: Path) -> None:
    planned = plan_of(INTERNVL, INTERNVL.tiny_configs[0], tmp_path / "model", kind=kind)
    plan, model = planned.plan(0.3), copy.deepcopy(planned_model(planned.config_file).model)
    planned.format.replace(model, plan.ranks)
    assert 2 * arithmetic.forward(planned, plan) == forward_operations(planned, model)


def test_without_images_their_tower_computes_nothing(tmp_path: Path) -> None:
    planned = plan_of(INTERNVL, INTERNVL.tiny_configs[0], tmp_path / "model")
    text = planned.with_workload(replace(planned.workload, images=0))
    language = planned.model.get_submodule("model.language_model")
    linears = [module.weight.numel() for module in language.modules() if isinstance(module, torch.nn.Linear)]
    head = planned.model.lm_head.weight.numel()
    assert arithmetic.forward(text) == 2 * 48 * (sum(linears) + head)
