"""Finds Linears whose weights are stored fused or renamed, so that factors cannot replace them, and LoRAs that plain
PEFT cannot load back because it renames the stored tensors.
"""

import copy
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel

from emloc_core.family import Family
from emloc_core.files.checkpoint import Checkpoint
from emloc_core.model.opened import OpenModel
from emloc_core.model.skeleton import Skeleton
from emloc_core.scaffold.merge import Stack
from emloc_core.standins.vocabulary import vocabulary_layers

OTHERWISE = "the checkpoint stores it together with other weights, or in another order"
RENAMED = "the checkpoint has its weight under another name"
TIED = "its weight is that of another layer, too"
UNREAD = "nothing reads some of its outputs"
UNNAMED = "its name in the checkpoint does not end in .weight, which factors stand beside"


def stored_otherwise(model: PreTrainedModel, family: Family, stacks: Sequence[Stack]) -> dict[str, str]:
    """Return the weights whose stand-ins a checkpoint, as transformers saves it, could not store -> why.

    It checks the Linears in groups, the token embedding, and the output layer.
    """
    with TemporaryDirectory(prefix="emloc-scaffold-") as directory:
        model.save_pretrained(directory)
        skeleton = OpenModel(Checkpoint(Path(directory)), family).skeleton
        linears = [name for name, module in skeleton.model.named_modules() if isinstance(module, nn.Linear)]
        reasons = {name: _reason(skeleton, name, model) for name in linears if is_grouped(name, stacks)}
        uses = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
        reasons |= {name: TIED for name in reasons if uses[id(model.get_parameter(f"{name}.weight"))] > 1}
        for path in vocabulary_layers(model):
            # If transformers renames the module itself, its pattern may match only the weight.
            renamed = (key.split(".")[-2:-1] != path.split(".")[-1:] for key in skeleton.stored(f"{path}.weight"))
            reasons[path] = RENAMED if any(renamed) else None
    return {name: reason for name, reason in reasons.items() if reason}


def is_grouped(linear: str, stacks: Sequence[Stack]) -> bool:
    """Return whether a Linear is in a group of some stack."""
    location = _locate(linear, stacks)
    return any(location == (stack.path, path) for stack in stacks for group in stack.groups for path in group)


def _locate(linear: str, stacks: Sequence[Stack]) -> tuple[str, str] | None:
    """Return the list of blocks that a Linear is in, and its path within a block; None if it is in none."""
    for stack in stacks:
        if linear.startswith(f"{stack.path}."):
            return stack.path, linear.removeprefix(f"{stack.path}.").partition(".")[2]
    return None


def _reason(skeleton: Skeleton, path: str, model: PreTrainedModel) -> str | None:
    keys = skeleton.sources(f"{path}.weight")
    with skeleton.checkpoint.slices(keys) as stored:
        if not all(torch.equal(tensor[...], model.get_parameter(f"{path}.weight")) for tensor in stored.values()):
            return OTHERWISE
    return None if keys[0].endswith(".weight") else UNNAMED


def keep_dense(stacks: Sequence[Stack], reasons: Mapping[str, str]) -> None:
    """Remove Linears, by path with the reason to stay dense, from the groups of ``stacks``, in all blocks."""
    locations = {location: reason for linear, reason in reasons.items() if (location := _locate(linear, stacks))}
    for stack in stacks:
        dense = {path: reason for (blocks, path), reason in sorted(locations.items()) if blocks == stack.path}
        groups = ([path for path in group if path not in dense] for group in stack.groups)
        stack.groups = [group for group in groups if group]
        stack.dense |= dense


def lost_by_peft(model: PreTrainedModel, linears: Sequence[str]) -> set[str]:
    """Return the paths of the Linears whose LoRA PEFT saves but does not load; none if PEFT refuses any of them.

    PEFT applies the renamings by which transformers reads old checkpoints to the names in an adapter, though these are
    already the model's. A pattern that matches such a name leads to a module that does not exist.
    """
    with warnings.catch_warnings(action="ignore"):
        try:
            tuned = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=list(linears), r=1))
        except ValueError:  # for example Mamba's, which a kernel takes
            return set()
        saved = get_peft_model_state_dict(tuned, save_embedding_layers=False)
        ones = {name: torch.ones_like(tensor) for name, tensor in saved.items()}
        set_peft_model_state_dict(tuned, ones)
        loaded = get_peft_model_state_dict(tuned, save_embedding_layers=False)
    lost = {name.partition(".lora_")[0] for name, tensor in loaded.items() if not bool((tensor == 1).all())}
    return {name.removeprefix("base_model.model.") for name in lost}
