"""Emulators without calibration: made from the weights alone, one Linear in memory at a time."""

import torch

from emloc_core.emulator.decompose import Progress
from emloc_core.emulator.files import EmulatorFiles
from emloc_core.errors import EmlocError
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
            files.write(block, {path: _stand_in(files, path) for path in paths}, {})
        progress(block, index + 1, total)
        plugin_manager().notify("emloc_block_done", stage="compress", path=block, index=index, total=total)


def _stand_in(files: EmulatorFiles, path: str) -> Fitted:
    name = f"{path}.weight"
    with files.skeleton.parameters([name]) as loaded:
        weight = loaded[name].detach().clone()
    if not bool(torch.isfinite(weight).all()):
        raise EmlocError(f"{name} in {files.base.directory} holds NaN or Inf.", "Download or copy the model again.")
    return files.format.round(weight)
