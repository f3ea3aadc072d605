"""The trainer's own checkpoints, and which of them are complete.

Transformers writes a checkpoint's files in place: adapter, optimizer, scheduler and random states first,
``trainer_state.json`` last, while other processes may still be writing their random states. A killed run can leave
any part of that.
"""

import json
import re
import shutil
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

STATE = "trainer_state.json"


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the ``checkpoint-STEP`` directory with the most steps, or None if there is none."""
    checkpoints = _checkpoints(folder)
    return checkpoints[max(checkpoints)] if checkpoints else None


def remove_incomplete(folder: Path, processes: int) -> None:
    """Remove the checkpoints that a killed run left half written or half deleted.

    Args:
        folder: directory of the checkpoints; need not exist.
        processes: number of processes that train, each of which writes its random states.
    """
    for step, checkpoint in _checkpoints(folder).items():
        if not _is_complete(checkpoint, step, processes):
            shutil.rmtree(checkpoint)


def _checkpoints(folder: Path) -> dict[int, Path]:
    """Return the checkpoints in ``folder`` by step."""
    names = ((path, re.fullmatch(r"checkpoint-(\d+)", path.name)) for path in folder.glob("checkpoint-*"))
    return {int(match[1]): path for path, match in names if match}


def _is_complete(checkpoint: Path, step: int, processes: int) -> bool:
    random_states = [f"rng_state_{rank}.pth" for rank in range(processes)] if processes > 1 else ["rng_state.pth"]
    if not all((checkpoint / name).is_file() for name in random_states):
        return False
    # torch.save writes zip archives, whose directory comes last: a truncated file has none.
    if not all(zipfile.is_zipfile(path) for path in [*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]):
        return False
    try:
        with safe_open(str(checkpoint / "adapter_model.safetensors"), framework="pt"):
            pass  # opening compares the header with the file's size
        return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))["global_step"] == step
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        return False
