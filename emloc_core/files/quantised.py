"""How a base is quantised, by its config; what is made of it is in :mod:`emloc_core.model.packed_checkpoints`."""

from collections.abc import Mapping
from typing import Any

#: How experts may be quantised in a base: they are unpacked as they are read.
MXFP4 = "mxfp4"
#: What packs a base in four bits.
BITSANDBYTES = "bitsandbytes"


def is_in_mxfp4(config: Mapping[str, Any]) -> bool:
    """Return whether a model's config is of a checkpoint with experts in MXFP4."""
    return _quantisation(config).get("quant_method") == MXFP4


def is_in_four_bits(config: Mapping[str, Any]) -> bool:
    """Return whether a model's config is of a checkpoint that bitsandbytes packed in four bits."""
    found = _quantisation(config)
    return found.get("quant_method") == BITSANDBYTES and bool(found.get("load_in_4bit"))


def _quantisation(config: Mapping[str, Any]) -> Mapping[str, Any]:
    found = config.get("quantization_config")
    return found if isinstance(found, Mapping) else {}
