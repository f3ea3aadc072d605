"""A LoRA in the plainest form: one rank, no patterns, and no scale, because servers read these differently."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.nn import functional

from emloc_core.algorithms.lora import Lora
from emloc_core.errors import EmlocError
from emloc_core.family import Family

#: vLLM's default for ``--max-lora-rank``, and the values that it allows.
VLLM_RANK, VLLM_RANKS = 16, (1, 8, 16, 32, 64, 128, 256, 320, 512)


def plain(loras: Mapping[str, Lora]) -> dict[str, Lora]:
    """Return equivalent LoRAs, all of the largest rank and with a scale of 1.

    Halves of a lower rank get zeros; B takes the scale, in fp32 at least.
    """
    rank = max(lora.rank for lora in loras.values())
    return {path: _plain(lora, rank) for path, lora in loras.items()}


def _plain(lora: Lora, rank: int) -> Lora:
    missing = rank - lora.rank
    b = lora.b.to(torch.promote_types(lora.b.dtype, torch.float32)) * lora.scale
    if not bool(torch.isfinite(b).all()):
        raise EmlocError("The LoRA multiplied by its scale has NaN or Inf.", "Train again.", code="not-finite")
    return Lora(functional.pad(lora.a, (0, 0, 0, missing)).to(b.dtype), functional.pad(b, (0, missing)), 1.0)


def plain_config(loras: Mapping[str, Lora], base: str, modules: Iterable[str]) -> dict[str, Any]:
    """Return PEFT's config for the LoRAs from :func:`plain`.

    Args:
        base: path or hub id of the model.
        modules: paths of all its modules.
    """
    rank = next(iter(loras.values())).rank
    stacks = sorted(path for path, lora in loras.items() if lora.is_stacked)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "target_modules": _targets(loras.keys() - set(stacks), modules),
        "target_parameters": stacks or None,
    }


def _targets(loras: Collection[str], modules: Iterable[str]) -> list[str]:
    """Return the last parts of the paths; the whole paths if the last parts would match other modules too."""
    ends = {path.rpartition(".")[2] for path in loras}
    matched = {path for path in modules if path.rpartition(".")[2] in ends}
    return sorted(ends if matched == set(loras) else loras)


def warnings(loras: Mapping[str, Lora], family: Family) -> Iterator[str]:
    """Yield what servers will not accept, each with what to do."""
    rank = next(iter(loras.values())).rank
    if rank > VLLM_RANK:
        limit = next((size for size in VLLM_RANKS if size >= rank), None)
        yield f"Its rank is {rank}, above vLLM's default of {VLLM_RANK}: " + (
            f"start it with --max-lora-rank {limit}." if limit else "vLLM supports no such rank; merge it instead."
        )
    if any(lora.is_stacked for lora in loras.values()):
        yield "It has LoRAs on experts, which few servers take. Merge the adapter, and serve the merged model."
    if family.modality == "text":
        return
    language = [tower.blocks for tower in family.towers if tower.name == "language"]
    if other := [path for path in loras if not any(path.startswith(f"{blocks}.") for blocks in language)]:
        yield (
            f"{len(other)} of its {len(loras)} Linears are outside the language model ({other[0]}, for one): servers "
            "ignore or reject such LoRAs. Merge the adapter, and serve the merged model."
        )
