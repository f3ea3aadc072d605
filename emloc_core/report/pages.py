"""Shared by all pages: templates with one look, and files that are written whole."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, select_autoescape


def environment(package: str, **filters: Callable[[Any], Any]) -> Environment:
    """Return an environment for the templates of a package, which can use those of this one; HTML is escaped."""
    found = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("emloc_core.report")]),
        autoescape=select_autoescape(disabled_extensions=("md.j2",), default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters.update(filters)
    return found


def publish_page(path: Path, text: str) -> None:
    """Write a file, whole or not at all, in a directory that is made if there is none.

    Raises:
        OSError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(text, encoding="utf-8", errors="replace")
    partial.replace(path)
