"""The plugin that declares a model where no other does; asked last of all."""

from collections.abc import Mapping, Sequence
from typing import Any

from emloc_core.compat.model_types import has_model_type
from emloc_core.family import Family
from emloc_core.hookspecs import hookimpl
from emloc_core.observed.record import KNOWN, digest


@hookimpl(trylast=True)
def emloc_families(config: Mapping[str, Any] | None) -> Sequence[Family]:
    """Declare nothing by name, and any decoder of transformers by looking at it.

    Raises:
        EmlocError: it is no decoder, or a person has to look at it.
    """
    if config is None:
        return []
    key = digest(config)
    if key not in KNOWN:
        if not has_model_type(config["model_type"]):
            return []
        from emloc_core.observed.look import declaration

        KNOWN[key] = declaration(config)
    return [KNOWN[key]]
