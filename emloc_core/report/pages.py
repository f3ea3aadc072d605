"""Templates with one look, for all pages."""

from collections.abc import Callable
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from emloc_core.units import human_bytes, human_seconds


def environment(package: str, **filters: Callable[[Any], Any]) -> Environment:
    """Return an environment for the templates of a package, which can use those of this one; HTML is escaped.

    Filters for all are ``size``, of bytes, and ``duration``, of seconds; None is ``-``.
    """
    found = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("emloc_core.report")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters.update(
        size=lambda count: "-" if count is None else human_bytes(count),
        duration=lambda seconds: "-" if seconds is None else human_seconds(seconds),
        **filters,
    )
    return found
