"""The LoRA that an emulator was fitted with: a copy in its directory, which is trained further on it."""

import shutil
from pathlib import Path

from emloc_core.adapters.adapter import Adapter
from emloc_core.adapters.moments import copy_moments
from emloc_core.files.documents import write_json
from emloc_core.files.lora import CONFIG, WEIGHTS
from emloc_core.files.manifest import read_manifest

_DIRECTORY = "adapter"


def enclose(adapter: Adapter, emulator: Path) -> None:
    """Copy a LoRA, with the moments of its tuning, into the directory of an emulator.

    The copy names no model: emulators are published, and it may be a path.
    """
    directory = emulator / _DIRECTORY
    directory.mkdir(exist_ok=True)
    write_json(directory / CONFIG, {**adapter.config, "base_model_name_or_path": None})
    shutil.copyfile(adapter.directory / WEIGHTS, directory / WEIGHTS)
    copy_moments(adapter.directory, directory)


def enclosed_in(model: Path) -> Path | None:
    """Return the directory of the LoRA that an emulator was fitted with; None without, and for any other model."""
    manifest = read_manifest(model) or {}
    fitted = manifest.get("kind") == "emulator" and "adapter" in manifest.get("request", {})
    return model / _DIRECTORY if fitted else None
