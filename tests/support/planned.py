"""Configs and workloads that plans are tested on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emloc_internvl import INTERNVL
from emloc_llama import LLAMA
from emloc_qwen import QWEN, QWEN_MOE, QWEN_VL
from support.marks import most_thorough
from support.paths import FIXTURES
from transformers import AutoConfig

from emloc_core.family import Family
from emloc_core.memory.workload import Workload
from emloc_core.settings import TrainSettings

HEADLINE = FIXTURES / "internvl2_5_38b" / "config.json"
TINY = [(family, config) for family in (LLAMA, QWEN, QWEN_MOE, QWEN_VL, INTERNVL) for config in family.tiny_configs]
#: The same as cases, of which one of text, one of experts and one of images are enough for `make test`.
CASES = most_thorough(TINY, *((family, family.tiny_configs[0]) for family in (LLAMA, QWEN_MOE, QWEN_VL)))
PICTURED = [(INTERNVL, INTERNVL.tiny_configs[0]), *((QWEN_VL, settings) for settings in QWEN_VL.tiny_configs[1:])]


def label(value: Any) -> str | None:
    """Name a tiny config by its model types; leave other values to pytest."""
    if not isinstance(value, Mapping):
        return getattr(value, "name", None)
    inner = value.get("text_config", {}).get("model_type")
    return f"{value['model_type']}+{inner}" if inner else value["model_type"]


def write_config(directory: Path, family: Family, dtype: str = "float32", **changes: object) -> Path:
    """Write a config: the family's first tiny one with changes, or, where the changes say a model type, these alone."""
    settings = dict(changes) if "model_type" in changes else {**family.tiny_configs[0], **changes}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    config.dtype = dtype
    directory.mkdir(exist_ok=True)
    config.save_pretrained(directory)
    return directory / "config.json"


def workload(batch: int = 4, length: int = 32, images: int = 0, device: str = "cpu", **train: object) -> Workload:
    return Workload(batch, length, images, TrainSettings(**train), device)
