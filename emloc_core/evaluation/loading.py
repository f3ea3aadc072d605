"""Loads a model, with or without an adapter, for inference; in parts, where a GPU has no room for all of it."""

import warnings
from pathlib import Path
from typing import Any

import click

from emloc_core import devices
from emloc_core.errors import EmlocError, first_line
from emloc_core.units import human_bytes

#: Share of a GPU's free memory for a model that fits, and for the layers of one that does not: a layer from the CPU's
#: memory, and the cache of keys and values, take the rest.
_WHOLE, _PART = 0.9, 0.6


def load_system(model: Path, adapter: Path | None, *, images: bool | None = False) -> tuple[Any, Any]:
    """Load a model, its adapter if there is one, and its tokenizer; on the GPU if there is one.

    Layers that do not fit the GPU wait in CPU memory, and are copied when they are used.

    Args:
        images: whether there are images: then the model's processor is returned, which contains the tokenizer. None:
            it is returned if the model reads images and has one.

    Raises:
        EmlocError: the model cannot be loaded, does not fit in memory, does not read images or has no processor though
            there are images, or the adapter does not fit it.
    """

    from emloc_core.data.tokenize import load_processor, load_tokenizer
    from emloc_core.files.checkpoint import Checkpoint
    from emloc_core.files.manifest import read_manifest
    from emloc_core.files.pretrained import load_model
    from emloc_core.observed.record import recall
    from emloc_core.plugins.manager import plugin_manager

    checkpoint = Checkpoint(model)
    recall(read_manifest(model))
    family = plugin_manager().family_for(checkpoint.config)
    if images is None:
        images = family.modality != "text" and any(model.glob("*processor_config.json"))
    if images and family.modality == "text":
        raise EmlocError(
            f"A task shows images, but models of the family {family.name} only read text.",
            "Give a model for images and text, or another task.",
            code="mismatch",
        )
    processing = load_processor(model) if images else load_tokenizer(model)
    parts = _parts(checkpoint.nbytes)
    try:
        loaded = load_model(family.auto_class, model, device_map="auto" if parts else None, max_memory=parts)
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise EmlocError(f"The model {model} cannot be loaded ({reason}).", "Check the directory.") from error
    _require_memory(loaded)
    if adapter is not None:
        loaded = _add_adapter(loaded, adapter, parts)
    if not parts:
        loaded = loaded.to(devices.accelerator() or devices.CPU)
    return loaded.eval(), processing


def _parts(nbytes: int) -> dict[int | str, int] | None:
    """Return how many bytes of a model to place on which device; None: all of it on one."""
    import torch

    from emloc_core.model.device import free_memory, free_of

    here = devices.accelerator()
    if here is None:
        return None
    free = [free_of(torch.device(here, gpu)) for gpu in range(devices.count())]
    if nbytes <= _WHOLE * free[0]:
        return None
    parts: dict[int | str, int] = {gpu: int(_PART * room) for gpu, room in enumerate(free)}
    parts["cpu"] = free_memory("cpu")
    if nbytes > sum(parts.values()):
        raise EmlocError(
            f"The model takes {human_bytes(nbytes)}, but GPU and CPU have room for only "
            f"{human_bytes(sum(parts.values()))}.",
            "Free memory, or use a machine with more.",
            code="memory",
        )
    click.echo(
        f"emloc: the model takes {human_bytes(nbytes)}, but the GPU has only {human_bytes(free[0])} free: layers "
        "that do not fit are copied from CPU memory whenever they are used, which is slow",
        err=True,
    )
    return parts


def _require_memory(model: Any) -> None:
    """Refuse layers on disk, where accelerate puts what GPU and CPU have no room for.

    Every token would wait for them, and PEFT would write a copy of them into the working directory.
    """
    if "disk" in getattr(model, "hf_device_map", {}).values():
        raise EmlocError(
            "GPU and CPU have too little free memory for the model's layers.",
            "Free memory, or use a machine with more.",
            code="memory",
        )


def _add_adapter(model: Any, adapter: Path, parts: dict[int | str, int] | None) -> Any:
    from peft import get_peft_model_state_dict

    from emloc_core.files.header import read_header
    from emloc_core.files.lora import WEIGHTS
    from emloc_core.files.pretrained import load_lora

    try:
        # Not HFLM(peft=...), which is silently ignored if the model is an object.
        with warnings.catch_warnings():
            # torch warns about each weight that waits elsewhere; the LoRA itself is loaded.
            warnings.filterwarnings("ignore", ".*copying from a non-meta parameter")
            combined = load_lora(model, adapter, max_memory=parts)
    except (OSError, ValueError, RuntimeError) as error:
        reason = first_line(error)
        raise EmlocError(
            f"The adapter {adapter} cannot be put on the model ({reason}).", "Check that it belongs to this model."
        ) from error
    # without PEFT's copy of an output projection below a LoRA, which not all files have
    expected = {key for key in read_header(adapter / WEIGHTS)[0] if not key.endswith(".base_layer.weight")}
    differing = sorted(expected ^ set(get_peft_model_state_dict(combined, save_embedding_layers=False)))
    if differing:  # PEFT only warns, and leaves these layers unchanged
        raise EmlocError(
            f"The adapter {adapter} does not fit the model: {len(differing)} of its tensors have no place or are"
            f" missing, {differing[0]} for one.",
            "Use it on the model that it was trained for.",
            code="mismatch",
        )
    return combined
