"""Checks where PEFT would put a LoRA, without weights: only a LoRA on a Linear can be corrected and merged."""

import warnings
from collections.abc import Mapping
from typing import Any

from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from torch import nn

from emloc_core.emulator.declared import all_linears
from emloc_core.errors import EmlocError, did_you_mean
from emloc_core.model.opened import OpenModel, open_model
from emloc_core.settings import ALL_LINEAR, PolishSettings, TrainSettings
from emloc_core.standins.expert_loras import expert_stacks
from emloc_core.standins.transfer import module_problems, require
from emloc_core.standins.vocabulary import packed_layers
from emloc_core.tuning.trl import lora_config, require_tracker


def check(model: str, settings: Mapping[str, Any], polish: Mapping[str, Any]) -> None:
    """Refuse settings that name what a model or its trainer does not have. Reads no weights.

    Args:
        polish: the settings of exact steps, if any follow.
    """
    opened, train = open_model(model, "cpu"), TrainSettings(**settings)
    for stage_settings in (train, PolishSettings(**polish)):
        opened.objective.check(stage_settings)
        require_tracker(stage_settings)
    choose_targets(opened, train)


def choose_targets(model: OpenModel, settings: TrainSettings) -> list[str]:
    """Return the ends of the paths of the modules that get a LoRA, sorted. Reads no weights.

    Args:
        model: the model; an emulator has the same Linears as its base.

    Raises:
        EmlocError: a target is refused; names the target and the module.
    """
    if settings.lora_experts:
        expert_stacks(model.build())  # which refuses a model without
    chosen = settings.target_modules
    special = settings.rank_pattern or settings.layers_to_transform or settings.trains_modules
    if not chosen and not special:  # a family's own targets have passed the conformance kit
        return model.family.lora_targets()
    if chosen == [ALL_LINEAR]:
        chosen = all_linears(model.build())
    targets = sorted(set(chosen or model.family.lora_targets()))
    _require_linears(model, settings, targets)
    return targets


def _require_linears(opened: OpenModel, settings: TrainSettings, targets: list[str]) -> None:
    """Refuse targets that match no module, or on which PEFT would adapt anything but a Linear."""
    model = opened.build()
    linears = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    names = sorted({path.rpartition(".")[2] for path in linears})
    remedy = f"Give ends of paths that match only Linears: {', '.join(names)}."
    for target in targets:
        modules = [path for path, _ in model.named_modules() if f".{path}".endswith(f".{target}")]
        if not modules:  # PEFT ignores it, or takes it for a part of a fused tensor, which is not a module
            raise EmlocError(f"The model has no module {target!r}.{did_you_mean(target, names)}", remedy)
        if other := [path for path in modules if path not in linears]:
            kind = type(model.get_submodule(other[0])).__name__
            raise EmlocError(f"The target {target!r} matches {other[0]}, a {kind}, not a Linear.", remedy)
    theirs = "Leave out the targets that match them."
    config = lora_config(settings.model_copy(update={"lora_experts": False}), targets, opened.objective.task)
    require(module_problems(config.to_dict(), model, packed_layers(opened.checkpoint.config)))
    try:  # for some model types PEFT maps targets to others, such as fused experts
        with warnings.catch_warnings(action="ignore"):
            lora = get_peft_model(model, config, low_cpu_mem_usage=True)
    except ValueError as error:
        raise EmlocError(f"PEFT refuses these targets: {error}", theirs) from error
    _require_matches(lora, settings)
    for path, module in lora.named_modules():
        if isinstance(module, LoraLayer) and not isinstance(module.get_base_layer(), nn.Linear):
            where = path.removeprefix("base_model.model.").removesuffix(".base_layer")
            raise EmlocError(
                f"With the targets {', '.join(targets)}, PEFT would put a LoRA on the parameters of {where}, which is "
                "not a Linear.",
                theirs,
            )


def _require_matches(lora: nn.Module, settings: TrainSettings) -> None:
    """Refuse ranks, layers and modules that match nothing, which PEFT ignores."""
    adapted = [path for path, module in lora.named_modules() if isinstance(module, LoraLayer)]
    for name in settings.rank_pattern or {}:
        if not any(get_pattern_key([name], path) == name for path in adapted):
            raise EmlocError(f"rank_pattern: no LoRA is on {name!r}.", "Give the ends of paths of modules with a LoRA.")
    for layer in settings.layers_to_transform or []:
        if not any(str(layer) in path.split(".") for path in adapted):
            raise EmlocError(f"layers_to_transform: the model has no layer {layer} with a target.", "Count from 0.")
    paths = [path for path, _ in lora.named_modules()]
    for name in settings.modules_to_save or []:
        if not any(f".{path}".endswith(f".{name}") for path in paths):
            raise EmlocError(
                f"modules_to_save: the model has no module {name!r}.", "Give the end of a path, such as lm_head."
            )
