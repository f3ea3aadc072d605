"""What a checkpoint stores together with other weights, and cannot be compressed by itself."""

from collections.abc import Collection, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn
from transformers import PreTrainedModel

from emloc_core.family import Family
from emloc_core.files.checkpoint import Checkpoint
from emloc_core.model.skeleton import Skeleton
from emloc_core.scaffold.merge import Stack

TOGETHER = "the checkpoint stores it together with other weights"


def stored_together(model: PreTrainedModel, family: Family, stacks: Sequence[Stack]) -> list[str]:
    """Return the paths of the Linears in groups whose weight is no tensor of a checkpoint as transformers saves it."""
    with TemporaryDirectory(prefix="emloc-scaffold-") as directory:
        model.save_pretrained(directory)
        skeleton = Skeleton(Checkpoint(Path(directory)), family)
        linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        grouped = {(stack.path, path) for stack in stacks for group in stack.groups for path in group}
        return [name for name in linears if _place(name, stacks) in grouped and not _is_alone(skeleton, name)]


def _place(linear: str, stacks: Sequence[Stack]) -> tuple[str, str] | None:
    """Return the list of blocks that a Linear is in, and its path within a block; None if it is in none."""
    for stack in stacks:
        if linear.startswith(f"{stack.path}."):
            return stack.path, linear.removeprefix(f"{stack.path}.").partition(".")[2]
    return None


def _is_alone(skeleton: Skeleton, path: str) -> bool:
    weight = f"{path}.weight"
    keys = skeleton.sources(weight)
    shape = tuple(skeleton.model.get_parameter(weight).shape)
    return len(keys) == 1 and tuple(skeleton.checkpoint.tensors[keys[0]].shape) == shape


def keep_dense(stacks: Sequence[Stack], linears: Collection[str], reason: str) -> None:
    """Take Linears out of the groups of stacks, in all blocks, with a reason."""
    places = {place for linear in linears if (place := _place(linear, stacks))}
    for stack in stacks:
        found = {path: reason for blocks, path in sorted(places) if blocks == stack.path}
        groups = ([path for path in group if path not in found] for group in stack.groups)
        stack.groups = [group for group in groups if group]
        stack.dense |= found
