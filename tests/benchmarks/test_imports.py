"""What benchmarks, examples, and tests that few machines run import from the toolkit, mostly inside functions."""

import ast
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.paths import ROOT

DIRECTORIES = ("benchmarks", "examples", "tests/gpu", "tests/survey")
FILES = sorted(path for directory in DIRECTORIES for path in (ROOT / directory).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """Yield module and name of everything that a file imports from the toolkit and its plugins by name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("emloc"):
            yield from ((str(node.module), alias.name) for alias in node.names)


def exists(module: str, name: str) -> bool:
    """Return whether a module has something of that name, or is a package with such a module."""
    imported = import_module(module)
    return hasattr(imported, name) or (hasattr(imported, "__path__") and find_spec(f"{module}.{name}") is not None)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_imported_exists(path: Path) -> None:
    assert [f"{module}.{name}" for module, name in imports(path) if not exists(module, name)] == []
