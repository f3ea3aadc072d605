"""The imports of the core, read from its source; ``python tests/support/imports.py [CHECKOUT]`` counts them.

Here a *room* is a package or a module directly in ``emloc_core/``. An *arrow* leads from an importer to what it
imports, and counts once. The *floor* of a room, its import layer, is the length of the longest chain of arrows below
it; rooms in a circle, an import cycle, share one.
"""

import ast
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

CORE = "emloc_core"
Graph = dict[str, set[str]]


def modules(checkout: Path) -> dict[str, Path]:
    """Return every module of the core by its dotted name, without ``emloc_core.``."""
    paths = sorted((checkout / CORE).rglob("*.py"))
    names = (".".join(path.relative_to(checkout / CORE).with_suffix("").parts) for path in paths)
    return {name.removesuffix(".__init__"): path for name, path in zip(names, paths, strict=True)}


def imports(path: Path, available: Iterable[str]) -> set[str]:
    """Return the modules of the core that a module imports, at any time; those for type checking do not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    imported = set()
    for node in ast.walk(tree):
        if id(node) in typing:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == CORE:
            base = node.module.removeprefix(CORE).lstrip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".lstrip(".")
                imported.add(inner if inner in available else base)
        elif isinstance(node, ast.Import):
            imported.update(alias.name.removeprefix(f"{CORE}.") for alias in node.names)
    return imported & set(available) - {"__init__"}


def arrows(checkout: Path) -> Graph:
    """Return what every module of the core imports."""
    paths = modules(checkout)
    return {name: imports(path, paths) for name, path in paths.items()}


def room(module: str) -> str:
    """Return the room that a module is in."""
    return module.partition(".")[0]


def between_rooms(graph: Mapping[str, set[str]]) -> Graph:
    """Return the arrows between rooms."""
    rooms: Graph = {room(module): set() for module in graph}
    for module, others in graph.items():
        rooms[room(module)] |= {room(other) for other in others} - {room(module)}
    return rooms


def circles(graph: Graph) -> list[set[str]]:
    """Return the largest sets of nodes that all reach each other, of two or more."""
    below = {node: _reached(graph, node) for node in graph}
    together = {frozenset(other for other in below[node] if node in below[other]) for node in graph}
    return [set(circle) for circle in together if len(circle) > 1]


def _reached(graph: Graph, node: str) -> set[str]:
    reached: set[str] = set()
    waiting = list(graph[node])
    while waiting:
        if (other := waiting.pop()) not in reached:
            reached.add(other)
            waiting += graph[other]
    return reached


def floors(graph: Graph) -> dict[str, int]:
    """Return the floor of every node, 0 for what imports nothing."""
    circle_of = {node: frozenset(circle) for circle in circles(graph) for node in circle}
    heights: dict[str, int] = {}

    def floor(node: str) -> int:
        if node not in heights:
            together = circle_of.get(node, frozenset({node}))
            below = {other for member in together for other in graph[member]} - together
            height = 1 + max(map(floor, below), default=-1)
            heights.update(dict.fromkeys(together, height))
        return heights[node]

    for node in graph:
        floor(node)
    return heights


def count(graph: Graph) -> dict[str, int]:
    """Return how many nodes, arrows, floors and circles a graph has, and how many nodes are in a circle."""
    return {
        "count": len(graph),
        "arrows": sum(map(len, graph.values())),
        "floors": 1 + max(floors(graph).values()),
        "circles": len(circles(graph)),
        "in circles": sum(map(len, circles(graph))),
    }


def main(checkout: Path) -> None:
    """Print the counts of a checkout as a table."""
    graph = arrows(checkout)
    rows = {"modules": count(graph), "rooms": count(between_rooms(graph))}
    print(" ".join(["", *(f"{heading:>10}" for heading in rows["rooms"])]).rjust(63))
    for name, figures in rows.items():
        print(f"{name:8}" + " ".join(f"{figure:>10}" for figure in figures.values()))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[2])
