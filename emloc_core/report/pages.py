"""Templates with one look, for all pages."""

from collections.abc import Callable
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined


def environment(package: str, **filters: Callable[[Any], Any]) -> Environment:
    """Return an environment for the templates of a package, which can use those of this one; HTML is escaped."""
    found = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("emloc_core.report")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters.update(filters)
    return found
