"""The architecture: imports run one way, without circles, and no command imports another."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from support.paths import ROOT

#: From what everything may import to what nothing may. Rooms on one floor do not import each other.
FLOORS = [
    ["errors", "family"],
    ["units", "settings", "layout", "lowrank", "algorithms", "process"],
    ["requests", "files", "hookspecs"],
    ["data", "report"],
    ["plugins", "recipe.recipe"],
    ["model"],
    ["exact", "emulator", "adapters"],
    ["tuning"],
    ["memory"],
    ["evaluation"],
    ["result"],
    ["stages"],
    ["registry"],
    ["recipe"],
    ["api"],
    ["conformance"],
    ["testing", "scaffold", "zoo"],
    ["cli"],
    ["__init__"],
    ["__main__"],
]


def modules() -> dict[str, Path]:
    """Every module of the core by its dotted name, without ``emloc_core.``."""
    paths = sorted((ROOT / "emloc_core").rglob("*.py"))
    names = (".".join(path.relative_to(ROOT / "emloc_core").with_suffix("").parts) for path in paths)
    return {name.removesuffix(".__init__"): path for name, path in zip(names, paths, strict=True)}


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the core that a module imports, at any time; those for type checking alone do not count."""
    tree = ast.parse(path.read_text())
    typing = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("emloc_core"):
            base = node.module.removeprefix("emloc_core").lstrip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".lstrip(".")
                found.add(inner if inner in known else base)
        elif isinstance(node, ast.Import):
            found.update(alias.name.removeprefix("emloc_core.") for alias in node.names)
    return found & set(known) - {"__init__"}


ARROWS = {name: imports(path, modules()) for name, path in modules().items()}


def floor(module: str) -> int:
    """The floor of a module: of the longest prefix of its name that has one."""
    places = {room: index for index, rooms in enumerate(FLOORS) for room in rooms}
    parts = module.split(".")
    return next(places[name] for end in range(len(parts), 0, -1) if (name := ".".join(parts[:end])) in places)


@pytest.mark.parametrize("module", [name for name in ARROWS if name != "__init__"])
def test_imports_run_down(module: str) -> None:
    room = module.partition(".")[0]
    up = [
        other
        for other in ARROWS[module]
        if floor(other) > floor(module) or (floor(other) == floor(module) and other.partition(".")[0] != room)
    ]
    assert not up


def test_there_are_no_circles() -> None:
    TopologicalSorter(ARROWS).prepare()  # raises CycleError, which names the circle


def test_no_command_imports_another() -> None:
    commands = {
        name for name, path in modules().items() if name.startswith("cli.") and "\ndef command(" in path.read_text()
    }
    for command in commands:
        inner = {name for name in commands if name.startswith(f"{command}.")}  # a group imports its own commands
        assert not ARROWS[command] & (commands - inner), command
