"""Finds LoRAs that plain PEFT cannot load back onto a model because it renames the stored tensors."""

import copy
import warnings
from collections.abc import Sequence

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import PreTrainedModel


def lost_by_peft(model: PreTrainedModel, linears: Sequence[str]) -> set[str]:
    """Return the paths of the Linears whose LoRA is not loaded from what PEFT itself has saved; none if it refuses any.

    PEFT applies the renamings by which transformers reads old checkpoints to the names in an adapter, though these are
    the model's own already. A pattern that matches such a name leads to a module that is not there.

    Args:
        model: the model; it is copied.
    """
    with warnings.catch_warnings(action="ignore"):
        try:
            tuned = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=list(linears), r=1))
        except ValueError:  # as with those of Mamba that a kernel takes
            return set()
        saved = get_peft_model_state_dict(tuned, save_embedding_layers=False)
        ones = {name: torch.ones_like(tensor) for name, tensor in saved.items()}
        set_peft_model_state_dict(tuned, ones)
        loaded = get_peft_model_state_dict(tuned, save_embedding_layers=False)
    lost = {name.partition(".lora_")[0] for name, tensor in loaded.items() if not bool((tensor == 1).all())}
    return {name.removeprefix("base_model.model.") for name in lost}
