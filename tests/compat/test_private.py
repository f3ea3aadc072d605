"""Private parts of libraries are used in ``compat`` alone, and one that is gone gives a sentence."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module

import pytest
from support.imports import CORE, modules
from support.paths import ROOT

from emloc_core.compat.private import patched, private
from emloc_core.errors import EmlocError

#: Underscored names that are documented all the same.
_PUBLIC = {"_asdict", "_exit", "_replace"}


@cache
def trees() -> dict[str, ast.Module]:
    """Return the core's modules as trees, by name."""
    return {name: ast.parse(path.read_text()) for name, path in modules(ROOT).items()}


def trees_outside() -> list[tuple[str, ast.Module]]:
    """Return the trees outside ``compat``."""
    return [(name, tree) for name, tree in trees().items() if not name.startswith("compat")]


def is_private(name: str) -> bool:
    return re.match(r"_[A-Za-z0-9]", name) is not None and name not in _PUBLIC


def own_names() -> Iterator[str]:
    """Yield the underscored names that the core itself defines."""
    for node in (node for tree in trees().values() for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and ast.unparse(node.value) in ("self", "cls")
        ):
            yield node.attr


def used(node: ast.AST) -> list[str]:
    """Return the names that a piece of code takes from a module or an object."""
    if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith(CORE):
        return [*(node.module or "").split("."), *(alias.name for alias in node.names)]
    if isinstance(node, ast.Attribute):
        return [node.attr]
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr", "delattr"):
        return [node.args[1].value] if isinstance(node.args[1], ast.Constant) else []
    return []


def test_what_the_rest_uses_is_its_own_or_public():
    own = set(own_names())
    uses = [
        f"{module}:{node.lineno} uses {name}"
        for module, tree in trees_outside()
        for node in ast.walk(tree)
        for name in used(node)
        if is_private(name) and name not in own | {"__future__"}
    ]
    assert not uses


def test_the_rest_patches_nothing():
    imported = [
        module
        for module, tree in trees_outside()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom | ast.Import) and "mock" in ast.unparse(node)
    ]
    assert not imported


def test_the_rest_overrides_no_private_method():
    """Of classes that have methods of their own with an underscore, and bases in other packages."""
    overrides = []
    for module, tree in trees_outside():
        classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.bases]
        methods = [method for node in classes for method in node.body if isinstance(method, ast.FunctionDef)]
        if module == "__main__" or not any(is_private(method.name) for method in methods):
            continue
        imported = import_module(f"{CORE}.{module}")
        for node in classes:
            own = {
                method.name for method in node.body if isinstance(method, ast.FunctionDef) and is_private(method.name)
            }
            defined = getattr(imported, node.name, None)
            for base in defined.__mro__[1:] if isinstance(defined, type) else ():
                if not base.__module__.startswith(CORE):
                    overrides += [f"{module}.{node.name}.{name}" for name in own & vars(base).keys()]
    assert not overrides


def test_a_part_that_is_gone_is_named():
    message = (
        r"trl [\d.]+ is not as EMLoC needs it for the loss .* \(cannot import name '_gone' .*\). Install trl 1\.\d+\."
    )
    with pytest.raises(EmlocError, match=message), private("trl"):
        from trl.trainer.utils import _gone  # noqa: F401
    with pytest.raises(EmlocError, match="does not have the attribute '_gone'"), patched("trl", "trl.trainer", _gone=1):
        pass


def test_what_fails_inside_of_a_patch_is_not_taken_for_a_change():
    with pytest.raises(AttributeError, match="other"), patched("trl", "trl.trainer.utils", pad=None):
        raise AttributeError("other")
