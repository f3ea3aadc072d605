"""The architecture: imports run one way, without circles, and no command imports another."""

import pytest
from support.imports import arrows, circles, modules, room
from support.paths import ROOT

#: Import layers, from what everything may import to what nothing may. Those in one layer do not import each other.
FLOORS = [
    ["errors", "family", "hookspecs", "keywords", "objective"],
    ["devices"],
    ["compat", "observed.record", "processes", "units", "settings", "layout", "algorithms"],
    ["standins", "requests", "report"],
    ["plugins"],
    ["standins.registry", "standins.quantizer"],
    ["files"],
    ["data", "recipe.recipe", "stages.progress"],
    ["model", "stages.rows"],
    ["exact", "adapters", "stages.precheck"],
    ["emulator"],
    ["tuning", "serving", "evaluation"],
    ["memory"],
    ["stages", "registry", "recipe", "conformance", "doctor"],
    ["api", "testing", "scaffold", "zoo", "tokens"],
    ["cli", "observed"],
]


@pytest.fixture(scope="module")
def imported() -> dict[str, set[str]]:
    """What every module imports."""
    return arrows(ROOT)


def floor(module: str) -> int:
    """The layer of a module: that of the longest prefix of its name that has one."""
    layers = {room: index for index, rooms in enumerate(FLOORS) for room in rooms}
    parts = module.split(".")
    return next(layers[name] for end in range(len(parts), 0, -1) if (name := ".".join(parts[:end])) in layers)


def test_imports_run_down(imported: dict[str, set[str]]) -> None:
    up = [
        (module, other)
        for module in imported.keys() - {"__init__", "__main__"}  # which nothing imports
        for other in imported[module]
        if floor(other) > floor(module) or (floor(other) == floor(module) and room(other) != room(module))
    ]
    assert not up


def test_there_are_no_circles(imported: dict[str, set[str]]) -> None:
    assert not circles(imported)


def test_no_command_imports_another(imported: dict[str, set[str]]) -> None:
    commands = {
        name for name, path in modules(ROOT).items() if name.startswith("cli.") and "\ndef command(" in path.read_text()
    }
    for command in commands:
        inner = {name for name in commands if name.startswith(f"{command}.")}  # a group imports its own commands
        assert not imported[command] & (commands - inner), command
