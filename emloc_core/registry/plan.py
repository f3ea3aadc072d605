"""The plan for a model by its name: what ``emloc plan`` and :func:`emloc_core.plan` return."""

from typing import TYPE_CHECKING, Any

from emloc_core.errors import EmlocError
from emloc_core.files.checkpoint import read_config_json
from emloc_core.memory.budget import Budget
from emloc_core.model.image_shape import parse_size
from emloc_core.plugins.manager import plugin_manager
from emloc_core.processes.environment import without_collections
from emloc_core.registry.registry import argument_of, config_of
from emloc_core.settings import AUTO, FACTORS, CompressSettings, TrainSettings
from emloc_core.stages.precheck import check_names, check_rows

if TYPE_CHECKING:
    from emloc_core.memory.plan import MemoryPlan


def plan_model(
    model: str,
    train: TrainSettings,
    *,
    memory: str | None,
    headroom: str | None,
    ratio: float | None,
    kind: str,
    image_size: str | None,
    device: str,
    card: str | None,
    measure: bool,
    **rows: Any,
) -> "MemoryPlan":
    """Plan the memory of every stage, and compare the ways to tune; imports torch only after names are checked.

    Args:
        memory, headroom, ratio, kind, image_size, device, card, measure: see :func:`emloc_core.plan`.
        rows: ``data``, ``split``, ``columns``, ``length`` and ``images``: see
            :func:`emloc_core.memory.workload.make_workload`.

    Raises:
        EmlocError: the model cannot be planned, or a setting is wrong.
    """
    gpu = None
    if card is not None:
        from emloc_core.memory.cards import find_card

        if device == "cpu":
            raise EmlocError("--card plans for a GPU, and --device cpu for a machine without one.", "Give one of them.")
        gpu = find_card(card)
        device, memory = "cuda", memory or str(gpu.memory)
    budget = Budget.named(memory, headroom, device)
    size = parse_size(image_size) if image_size is not None else None
    if kind == AUTO and ratio is not None:
        kind = FACTORS
    check_names(CompressSettings(kind=kind))
    check_rows(rows["data"])
    with config_of(model, with_tokenizer=rows["data"] is not None) as file:
        plugin_manager().family_for(read_config_json(file))
        with without_collections():
            import torch

            from emloc_core.memory.decision import decide
            from emloc_core.memory.plan import make_plan
            from emloc_core.memory.planned_model import planned_model
            from emloc_core.memory.speed import measure as measured
            from emloc_core.memory.workload import make_workload

            workload = make_workload(file, train, device, image_size=size, **rows)
            dtype = torch.bfloat16 if train.bf16 else planned_model(file).dtype
            speed = gpu.speed if gpu else measured(workload.device, file.parent, dtype) if measure else None
            emulator = CompressSettings(kind=kind, **{} if ratio is None else {"ratio": ratio})
            decision = decide(file, workload, budget, emulator, speed)
            name, layout = argument_of(model)
            return make_plan(name, decision, card=gpu.name if gpu else None, layout=layout, advise=ratio is None)
