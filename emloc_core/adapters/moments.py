"""The second moments of a LoRA's gradients, kept beside it for the exact steps that start from it.

Adam divides the step of every number by the root of the mean square of its gradients (arXiv 1412.6980). An optimiser
without a history knows only the first gradient: whatever its size, every number moves by the whole learning rate,
which undoes a good start. With the second moments of tuning, steps are small where little is left to gain.
"""

import shutil
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.optim import Adam, Optimizer

from emloc_core.errors import EmlocError
from emloc_core.files.header import read_header
from emloc_core.files.inputs import Inputs
from emloc_core.files.own import require_own_files
from emloc_core.files.shards import is_intact, write_shard

#: A safetensors file, whose name keeps it from servers that load all of a LoRA's ``*.safetensors``.
FILE = "second_moments.adam"
#: The moments of tuning count as so many steps, however many there were: the base has other gradients than the
#: emulator. With 10, no number moves by much more than the learning rate, even if its gradients were zero so far.
_COUNTED = 10
#: In the file's header: the learning rate of the tuning.
_RATE = "learning_rate"
_REMEDY = f"Remove {FILE} to start without it, at a lower learning rate, or train again."


def write_moments(directory: Path, lora: PeftModel, optimizer: Optimizer | None, learning_rate: float) -> None:
    """Write the mean squares of a LoRA's gradients, in bf16 under the names of its weights, if the optimiser has them.

    Args:
        optimizer: Adam or AdamW, maybe wrapped by accelerate; any other writes nothing.
        learning_rate: of the tuning; see :func:`tuned_at`.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(optimizer, Adam):
        return
    names, tensors = _names(lora), {}
    for parameter, beta in _parameters(optimizer):
        state = optimizer.state.get(parameter)  # a LoRA that no row passes through has none
        if state and ".lora_" in names[parameter]:
            correction = 1 - beta ** float(state["step"])
            tensors[names[parameter]] = (state["exp_avg_sq"] / correction).to(torch.bfloat16).cpu()
    if tensors:
        write_shard(directory / FILE, dict(sorted(tensors.items())), {_RATE: str(learning_rate)})


def copy_moments(source: Path, target: Path) -> None:
    """Copy an adapter's moments, if it has any."""
    if (source / FILE).exists():
        require_own_files(source, [FILE])
        shutil.copyfile(source / FILE, target / FILE)


def hash_moments(directory: Path, files: Inputs) -> dict[str, str]:
    """Return a request's entry for an adapter's moments; empty if it has none."""
    return {"second_moments": files.hash([directory / FILE])} if (directory / FILE).exists() else {}


def tuned_at(directory: Path) -> float | None:
    """Return the learning rate of the tuning that an adapter's moments are from; None if it has none.

    Raises:
        EmlocError: the file is damaged.
    """
    path = _checked(directory)
    rate = read_header(path)[1].get(_RATE) if path else None
    return float(rate) if rate else None


def load_moments(directory: Path, lora: PeftModel, optimizer: Optimizer) -> None:
    """Start from an adapter's moments, if it has any and the optimiser uses them.

    Args:
        optimizer: of the LoRA's parameters; without a state.

    Raises:
        EmlocError: the file is damaged, or belongs to another LoRA.
    """
    path = _checked(directory)
    if path is None or not isinstance(optimizer, Adam):
        return
    tensors, names = load_file(path), _names(lora)
    for key, tensor in tensors.items():
        if not bool((tensor >= 0).all() and tensor.isfinite().all()):
            raise EmlocError(f"{key} in {path} is not a mean of squares.", _REMEDY, code="not-finite")
    parameters = _parameters(optimizer)
    shapes = {names[parameter]: parameter.shape for parameter, _ in parameters}
    if wrong := [key for key, tensor in tensors.items() if shapes.get(key) != tensor.shape]:
        raise EmlocError(
            f"{path} belongs to a different LoRA than the one beside it: {wrong[0]}.", _REMEDY, code="mismatch"
        )
    state = {
        index: {
            "step": torch.tensor(float(_COUNTED)),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": (1 - beta**_COUNTED) * tensors[names[parameter]].float(),
        }
        for index, (parameter, beta) in enumerate(parameters)
        if names[parameter] in tensors
    }
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})  # which moves everything to its device


def _checked(directory: Path) -> Path | None:
    """Return the path of an adapter's moments, after checking the file; None if there is none."""
    path = directory / FILE
    if not path.exists():
        return None
    require_own_files(directory, [FILE])
    if not is_intact(path):
        raise EmlocError(f"{path} is not what was written there.", _REMEDY, code="damaged")
    return path


def _parameters(optimizer: Adam) -> list[tuple[torch.nn.Parameter, float]]:
    """Return the parameters of an optimiser in the order of its state, each with the decay of its second moments."""
    return [(parameter, group["betas"][1]) for group in optimizer.param_groups for parameter in group["params"]]


def _names(lora: PeftModel) -> dict[torch.nn.Parameter, str]:
    """Return the names of a LoRA's parameters in PEFT's file."""
    return {parameter: name.replace(".default.weight", ".weight") for name, parameter in lora.named_parameters()}
