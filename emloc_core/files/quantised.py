"""How a base is quantised, by its config; :mod:`emloc_core.model.packed_checkpoints` reads its weights."""

from collections.abc import Mapping
from typing import Any

#: The method of experts in a base; they are unpacked as they are read.
MXFP4 = "mxfp4"
#: The method of a base in four bits.
BITSANDBYTES = "bitsandbytes"


def is_in_mxfp4(config: Mapping[str, Any]) -> bool:
    """Return whether a config describes a checkpoint with experts in MXFP4."""
    return _quantisation(config).get("quant_method") == MXFP4


def is_in_four_bits(config: Mapping[str, Any]) -> bool:
    """Return whether a config describes a checkpoint that bitsandbytes packed in four bits."""
    settings = _quantisation(config)
    return settings.get("quant_method") == BITSANDBYTES and bool(settings.get("load_in_4bit"))


def _quantisation(config: Mapping[str, Any]) -> Mapping[str, Any]:
    settings = config.get("quantization_config")
    return settings if isinstance(settings, Mapping) else {}
