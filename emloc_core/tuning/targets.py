"""Where PEFT would put a LoRA. Only one on a Linear can be carried over, which the model's shape alone says."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from emloc_core.errors import EmlocError, did_you_mean
from emloc_core.family import Family
from emloc_core.files.pretrained import load_config
from emloc_core.model.skeleton import build_model
from emloc_core.settings import TrainSettings
from emloc_core.tuning.trl import lora_config


def require_linears(config_file: Path, family: Family, settings: TrainSettings, targets: Sequence[str]) -> None:
    """Refuse targets that name no module, and those that PEFT would put on anything but a Linear. Reads no weights.

    Args:
        config_file: the model's ``config.json``; an emulator has its Linears where the base has them.
        family: the model's.
        settings: of the LoRA.
        targets: ends of module paths.

    Raises:
        EmlocError: names the target and the module.
    """
    model: nn.Module = build_model(load_config(config_file), family, torch.float32)
    linears = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    names = sorted({path.rpartition(".")[2] for path in linears})
    remedy = f"Name ends of paths of Linears, long enough to tell them from other modules: {', '.join(names)}."
    for target in targets:
        modules = [path for path, _ in model.named_modules() if f".{path}".endswith(f".{target}")]
        if not modules:  # PEFT ignores it, or takes it for a part of a fused tensor, which has no module of its own
            raise EmlocError(f"No module of the model is called {target!r}.{did_you_mean(target, names)}", remedy)
        if other := [path for path in modules if path not in linears]:
            kind = type(model.get_submodule(other[0])).__name__
            raise EmlocError(f"The target {target!r} names {other[0]}, which is no Linear but of {kind}.", remedy)
    theirs = "Leave out the names that it takes for theirs."
    try:  # PEFT takes targets of some model types for others, such as those of experts that are fused
        with warnings.catch_warnings(action="ignore"):
            config = lora_config(settings, list(targets))
            lora = get_peft_model(model, config, low_cpu_mem_usage=True)
    except ValueError as error:
        raise EmlocError(f"PEFT refuses these targets: {error}", theirs) from error
    for path, module in lora.named_modules():
        if isinstance(module, LoraLayer) and not isinstance(module.get_base_layer(), nn.Linear):
            where = path.removeprefix("base_model.model.").removesuffix(".base_layer")
            raise EmlocError(
                f"With the targets {', '.join(targets)}, PEFT would put a LoRA on the parameters of {where}, which is "
                "no Linear.",
                theirs,
            )
