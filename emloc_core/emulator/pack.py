"""Emulators without calibration: made from the weights alone, one Linear or stack of experts in memory at a time."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from emloc_core.emulator.experts import Stack, Stacked
from emloc_core.emulator.files import EmulatorFiles
from emloc_core.errors import EmlocError
from emloc_core.files.job import Progress
from emloc_core.plugins.manager import plugin_manager
from emloc_core.standins.standin import Fitted


def pack_blocks(files: EmulatorFiles, progress: Progress) -> None:
    """Write what stands in for the weights of every block; blocks that are there are left.

    Raises:
        EmlocError: a weight is NaN or Inf; the message names the Linear.
    """
    total = len(files.blocks)
    for index, block in enumerate(files.blocks):
        if not files.is_written(block):
            paths = [linear.path for linear in files.plan.in_block(block)]
            found: dict[str, Fitted | Stacked] = {path: _stand_in(files, path) for path in paths}
            for owner, planned in files.plan.experts_in_block(block).items():
                found |= {each.path: _stack(files, owner, each.path) for each in planned}
            files.write(block, found)
        progress(block, index + 1, total)
        plugin_manager().notify("emloc_block_done", stage="compress", path=block, index=index, total=total)


def _stand_in(files: EmulatorFiles, path: str) -> Fitted:
    with _loaded(files, f"{path}.weight") as weight:
        return files.format.round(weight)


def _stack(files: EmulatorFiles, owner: str, path: str) -> Stacked:
    experts = files.skeleton.model.get_submodule(owner)
    with _loaded(files, path) as stack:
        found = Stack(len(stack))
        for each in stack:
            rounded = files.format.round(each.T if experts.is_transposed else each)
            found.add(files.format.pack(rounded, stack.dtype), rounded.relative_error())
        return found.whole()


@contextmanager
def _loaded(files: EmulatorFiles, name: str) -> Iterator[torch.Tensor]:
    with files.skeleton.parameters([name]) as loaded:
        weight = loaded[name].detach()
        if not bool(torch.isfinite(torch.stack(torch.aminmax(weight))).all()):
            raise EmlocError(f"{name} in {files.base.directory} holds NaN or Inf.", "Download or copy the model again.")
        yield weight
