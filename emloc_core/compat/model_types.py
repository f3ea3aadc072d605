"""The model types of transformers, from its source unless it is loaded: that takes seconds."""

import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def has_model_type(model_type: str) -> bool:
    """Say whether transformers has a model type."""
    loaded: Any = sys.modules.get("transformers.models.auto.configuration_auto")
    return model_type in loaded.CONFIG_MAPPING if loaded else f'("{model_type}", "' in _source()


@cache
def _source() -> str:
    spec = find_spec("transformers")
    folders = [Path(location) / "models" / "auto" for location in (spec and spec.submodule_search_locations) or ()]
    return "".join(file.read_text(encoding="utf-8") for location in folders for file in sorted(location.glob("*.py")))
