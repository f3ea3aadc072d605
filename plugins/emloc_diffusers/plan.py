"""The memory of tuning a transformer on pictures, from its config alone: a real step, run on tensors without contents.

As :mod:`emloc_core.memory.tracing` does it for tokens, but all blocks are traced.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model

from emloc_core.emulator.declared import find_linears
from emloc_core.emulator.method import method_of
from emloc_core.memory.fake import fake, without_contents
from emloc_core.memory.tracing import Ledger
from emloc_core.model.overhead import overhead
from emloc_core.model.skeleton import build_model
from emloc_core.plugins.manager import plugin_manager
from emloc_core.settings import CompressSettings, TrainSettings
from emloc_core.standins.registry import format_named
from emloc_core.tuning.trl import lora_config
from emloc_diffusers.calls import call_of
from emloc_diffusers.flow import squared_error
from emloc_diffusers.transformer import Config

#: Configs of published transformers, where they differ from the defaults of their classes.
PUBLISHED: dict[str, dict[str, Any]] = {
    "black-forest-labs/FLUX.1-dev": {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True},
    "black-forest-labs/FLUX.2-dev": {"_class_name": "Flux2Transformer2DModel"},
    "Qwen/Qwen-Image": {"_class_name": "QwenImageTransformer2DModel"},
}
#: Tokens of a prompt, and pixels of a patch's side: those of all pipelines that are known here.
_TOKENS, _PATCH = 512, 16


@dataclass(frozen=True)
class Planned:
    """What tuning needs.

    Attributes:
        parameters: of the base.
        base: its bytes, in bfloat16.
        emulator: bytes of the emulator's weights.
        terms: bytes by term, at the peak of a step.
        phase: forward or backward, whichever needs more.
    """

    parameters: int
    base: int
    emulator: int
    terms: Mapping[str, int]
    phase: str

    @property
    def total(self) -> int:
        """Sum of all terms."""
        return sum(self.terms.values())


def plan(
    config: Config, train: TrainSettings, kind: str, ratio: float | None = None, side: int = 512, device: str = "cuda"
) -> Planned:
    """Return what a step on an emulator needs, without encoders: what they answer is kept, and they are gone.

    Args:
        config: of the transformer.
        train: how the LoRA is tuned.
        kind, ratio: of the emulator.
        side: height and width of pictures, in pixels.
        device: ``cuda`` or ``cpu``.

    Raises:
        EmlocError: the class or the kind is not known, or the ratio is out of range.
    """
    family = plugin_manager().family_for({"model_type": config.model_type})
    model: Any = build_model(config, family, torch.bfloat16)
    format, call = format_named(kind), call_of(config.model_type)
    parameters = sum(each.numel() for each in model.parameters())
    settings = CompressSettings(kind=kind, **({} if ratio is None else {"ratio": ratio}))
    ranks = method_of(settings, format, find_linears(model, family, format), model).plan().ranks
    format.replace(model, ranks)
    emulator = sum(each.numel() * each.itemsize for each in model.parameters())
    patches = side // _PATCH
    shapes = {
        name: (_TOKENS, *shape[1:]) if len(shape) == 2 else shape for name, shape in call.made_up(model.config).items()
    }
    pixels = (call.channels(model.config), patches * call.patch, patches * call.patch)
    lora: Any = get_peft_model(model, lora_config(train, family.lora_targets(), None), low_cpu_mem_usage=True)
    for name, parameter in lora.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
    if train.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    peak, phase = _traced(lora, call, train, pixels, shapes)
    terms = {**peak, "optimiser": 2 * peak["adapter"], "overhead": overhead(device, tuning=True)}
    return Planned(parameters, 2 * parameters, emulator, {name: size for name, size in terms.items() if size}, phase)


def _traced(
    lora: Any, call: Any, train: TrainSettings, pixels: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Counter[str], str]:
    """Run a step's forward and backward on fake tensors; return the larger peak, and its phase."""
    lora.train()
    with fake({}) as mode:
        parameters = without_contents(lora, mode)
        with Ledger() as ledger:
            for parameter in parameters:
                ledger.enter(parameter, "adapter" if parameter.requires_grad else "weights")
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(lambda each: ledger.enter(each.grad, "gradients"))
            rows = train.batch_size
            latents, noise = torch.zeros(rows, *pixels), torch.zeros(rows, *pixels)
            prompt = {name: torch.zeros(rows, *shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
            share, weight = torch.zeros(rows), torch.ones(rows)
            with torch.autocast("cpu", torch.bfloat16, enabled=train.bf16):
                loss = squared_error(lora, call, latents, noise, share, prompt, weight).mean()
            ledger.phase = "backward"
            loss.backward()
    phase, peak = max(ledger.phases.items(), key=lambda entry: entry[1].total())
    return peak, phase
