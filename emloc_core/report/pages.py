"""The templates of all pages, in one style."""

from collections.abc import Callable
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from emloc_core.units import human_bytes, human_seconds


def environment(package: str, **filters: Callable[[Any], Any]) -> Environment:
    """Return an environment for a package's templates, which can include the ones here; HTML is escaped.

    Filters for all: ``size`` for bytes, and ``duration`` for seconds; None is ``-``.
    """
    templates = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("emloc_core.report")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters.update(
        size=lambda count: "-" if count is None else human_bytes(count),
        duration=lambda seconds: "-" if seconds is None else human_seconds(seconds),
        **filters,
    )
    return templates
