"""How far a reader goes after a request, and other figures of a checkout, as JSON.

``PYTHONPATH=tests python -m support.walks [CHECKOUT]``. A *walk* begins where a stage's job is made and follows, as a
reader would, every call that is handed the request, a field of it, the model or the adapter. A *stop* is a function
of the core that is read on the way, once. A *climb* is a stop in a module on a higher floor (see
:mod:`support.imports`) than the one before it: the reader was down there already, and has to come up again.
"""

import ast
import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from support.imports import CORE, arrows, between_rooms, floors, modules, room
from support.paths import ROOT

#: Classes that stand for the model or the adapter.
MODELS = {"Adapter", "Checkpoint", "Family", "GivenLora", "NewLora", "OpenModel", "Skeleton"}
#: What opens a model: its family, its config, and what loads its weights.
OPENERS = ("family_for", "load_config", "Skeleton")
#: How code names each format of emulator.
FORMATS = {"low-rank": "LowRank|low-rank", "nf4": "(?i)nf4", "levels": r"(?i)\blevels\b", "experts": r"(?i)experts"}
Function = ast.FunctionDef


@dataclass(frozen=True)
class Stop:
    """A function of the core: its module, the class that it is written in, if any, and its name."""

    module: str
    owner: str
    name: str


#: Where each walk begins.
STARTS = (
    Stop("emulator.compress", "Compress", "__init__"),
    Stop("tuning.exact", "", "prepare"),
    Stop("adapters.correct", "", "prepare"),
)


@dataclass
class Scope:
    """What a function's names stand for while it is read: classes of their values, and what holds the request."""

    module: str
    types: dict[str, tuple[str, str]] = field(default_factory=dict)
    followed: set[str] = field(default_factory=set)
    attributes: set[str] = field(default_factory=set)


class Code:
    """The core's source: its functions and classes, and what calls in it mean, as far as names and annotations tell."""

    def __init__(self, checkout: Path) -> None:
        self.paths = modules(checkout)
        self.trees = {name: ast.parse(path.read_text("utf-8")) for name, path in self.paths.items()}
        self.names = {name: self._names(name, tree) for name, tree in self.trees.items()}

    def _names(self, module: str, tree: ast.Module) -> dict[str, tuple[str, str]]:
        """Return what the names of a module stand for: (module, name), or (module, "") for modules themselves."""
        meanings = {node.name: (module, node.name) for node in tree.body if isinstance(node, Function | ast.ClassDef)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == CORE:
                base = (node.module or "").removeprefix(CORE).lstrip(".")
                for alias in node.names:
                    inner = f"{base}.{alias.name}".lstrip(".")
                    meanings[alias.asname or alias.name] = (inner, "") if inner in self.paths else (base, alias.name)
        return meanings

    @cached_property
    def defined(self) -> dict[tuple[str, str], ast.AST]:
        """Every function and class at the top of a module, by module and name."""
        return {
            (module, node.name): node
            for module, tree in self.trees.items()
            for node in tree.body
            if isinstance(node, Function | ast.ClassDef)
        }

    def calls(self, name: str) -> int:
        """Return in how many places a function of this name is called."""
        functions = (node.func for tree in self.trees.values() for node in ast.walk(tree) if isinstance(node, ast.Call))
        return sum(getattr(func, "attr", getattr(func, "id", None)) == name for func in functions)

    def classes(self, key: tuple[str, str]) -> Iterator[tuple[str, ast.ClassDef]]:
        """Yield a class and those that it inherits from, each with its module."""
        node = self.defined.get(key)
        if isinstance(node, ast.ClassDef):
            yield key[0], node
            for base in node.bases:
                yield from self.classes(self.names[key[0]].get(ast.unparse(base), ("", "")))

    def method(self, key: tuple[str, str], name: str) -> tuple[Stop, Function] | None:
        """Return a method or property of a class, wherever it is inherited from."""
        for module, node in self.classes(key):
            for item in node.body:
                if isinstance(item, Function) and item.name == name:
                    return Stop(module, node.name, name), item
        return None

    def annotated(self, module: str, annotation: ast.expr | None) -> tuple[str, str] | None:
        """Return the first class of the core that an annotation names."""
        nodes = [] if annotation is None else list(ast.walk(annotation))
        for node in [*nodes]:
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                nodes += ast.walk(ast.parse(node.value, mode="eval"))
        for node in nodes:
            class_key = self.names[module].get(node.id) if isinstance(node, ast.Name) else None
            if class_key and isinstance(self.defined.get(class_key), ast.ClassDef):
                return class_key
        return None

    def attribute(self, key: tuple[str, str], name: str) -> tuple[str, str] | None:
        """Return the class of an attribute, by what the class annotates, computes, or assigns to ``self``."""
        if (resolved := self.method(key, name)) is not None:
            return self.annotated(resolved[0].module, resolved[1].returns)
        for module, node in self.classes(key):
            for item in ast.walk(node):
                if isinstance(item, ast.AnnAssign) and ast.unparse(item.target) in {name, f"self.{name}"}:
                    return self.annotated(module, item.annotation)
            for method in (item for item in node.body if isinstance(item, Function)):
                scope = self.scope(Stop(module, node.name, method.name), method)
                for item in ast.walk(method):
                    if isinstance(item, ast.Assign):
                        for target, value in pairs(item):
                            if ast.unparse(target) == f"self.{name}" and (class_key := self.type(value, scope)):
                                return class_key
        return None

    def scope(self, stop: Stop, node: Function) -> Scope:
        """Return the scope of a function as its parameters are annotated."""
        scope = Scope(stop.module)
        for argument in arguments(node):
            if class_key := self.annotated(stop.module, argument.annotation):
                scope.types[argument.arg] = class_key
        if stop.owner:
            scope.types["self"] = (stop.module, stop.owner)
        return scope

    def type(self, value: ast.expr, scope: Scope) -> tuple[str, str] | None:
        """Return the class of the core that an expression is an instance of."""
        if isinstance(value, ast.Name):
            return scope.types.get(value.id)
        if isinstance(value, ast.Attribute):
            owner = self.type(value.value, scope)
            return owner and self.attribute(owner, value.attr)
        if isinstance(value, ast.IfExp):
            return self.type(value.body, scope) or self.type(value.orelse, scope)
        if not isinstance(value, ast.Call):
            return None
        key = self.target(value.func, scope)
        if key and isinstance(self.defined.get(key), ast.ClassDef):
            return key
        function = self.called(value, scope)
        return self.annotated(function[0].module, function[1].returns) if function else None

    def target(self, expression: ast.expr, scope: Scope) -> tuple[str, str] | None:
        """Return the function or class at the top of a module that an expression names."""
        if isinstance(expression, ast.Name):
            return self.names[scope.module].get(expression.id)
        if isinstance(expression, ast.Attribute) and isinstance(expression.value, ast.Name):
            module, name = self.names[scope.module].get(expression.value.id, ("", "-"))
            if not name:
                return module, expression.attr
        return None

    def called(self, node: ast.expr, scope: Scope) -> tuple[Stop, Function] | None:
        """Return the function of the core that is called, or the property that is computed."""
        callee = node.func if isinstance(node, ast.Call) else node
        if isinstance(node, ast.Call) and (key := self.target(callee, scope)):
            if isinstance(definition := self.defined.get(key), Function):
                return Stop(key[0], "", key[1]), definition
            return self.method(key, "__init__")
        if not isinstance(callee, ast.Attribute):
            return None
        if ast.unparse(callee.value) == "super()" and isinstance(node, ast.Call):
            bases = list(self.classes(scope.types["self"]))[1:]
            return self.method((bases[0][0], bases[0][1].name), callee.attr) if bases else None
        owner = self.type(callee.value, scope)
        definition = owner and self.method(owner, callee.attr)
        is_property = definition and any("property" in ast.unparse(item) for item in definition[1].decorator_list)
        return definition if definition and isinstance(node, ast.Call) != bool(is_property) else None

    def holds(self, value: ast.expr, scope: Scope) -> bool:
        """Return whether an expression is the request, a part of it, or the model."""
        if isinstance(value, ast.Name) and value.id in scope.followed:
            return True
        if isinstance(value, ast.Attribute):
            of_self = isinstance(value.value, ast.Name) and value.value.id == "self"
            if value.attr in scope.attributes if of_self else self.holds(value.value, scope):
                return True
        if isinstance(value, ast.IfExp | ast.BoolOp | ast.Starred | ast.Tuple | ast.Dict):
            parts = [part for part in ast.iter_child_nodes(value) if isinstance(part, ast.expr)]
            return any(self.holds(part, scope) for part in parts)
        class_key = self.type(value, scope)
        return class_key is not None and class_key[1] in MODELS

    def handed(self, node: ast.expr, callee: Function, scope: Scope) -> set[str]:
        """Return the parameters of a function, ``self`` included, that hold the request in this call."""
        names = [argument.arg for argument in arguments(callee)]
        followed = set()
        expression = node.func if isinstance(node, ast.Call) else node
        if isinstance(expression, ast.Attribute) and (on_self(node) or self.holds(expression.value, scope)):
            followed.add("self")
        if isinstance(node, ast.Call):
            names = [name for name in names if name not in {"self", "cls"}]
            followed |= {name for name, value in zip(names, node.args, strict=False) if self.holds(value, scope)}
            followed |= {keyword.arg for keyword in node.keywords if keyword.arg and self.holds(keyword.value, scope)}
            unpacked = [*node.args, *(keyword.value for keyword in node.keywords if not keyword.arg)]
            if any(isinstance(argument, ast.Starred) or argument not in node.args for argument in unpacked):
                followed |= set(names)
        return followed


def arguments(node: Function) -> list[ast.arg]:
    """Return the parameters of a function."""
    return [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]


def pairs(node: ast.Assign) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Yield each target of an assignment with its value; of a value that is taken apart, with the whole."""
    for target in node.targets:
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            yield from zip(target.elts, node.value.elts, strict=False)
        elif isinstance(target, ast.Tuple):
            yield from ((element, node.value) for element in target.elts)
        else:
            yield target, node.value


def walk(code: Code, start: Stop) -> list[Stop]:
    """Return the functions that are read, in the order of reading."""
    visited: dict[Stop, None] = {}
    attributes: dict[str, set[str]] = defaultdict(set)  # class -> attributes that hold the request

    def follow(stop: Stop, node: Function, followed: set[str]) -> None:
        visited[stop] = None
        scope = code.scope(stop, node)
        scope.followed, scope.attributes = followed, attributes[stop.owner]
        for item in in_order(node):
            if isinstance(item, ast.Assign):
                for target, value in pairs(item):
                    class_key, name = code.type(value, scope), ast.unparse(target)
                    if isinstance(target, ast.Name) and class_key:
                        scope.types[name] = class_key
                    if code.holds(value, scope):
                        (scope.attributes if name.startswith("self.") else scope.followed).add(
                            name.removeprefix("self.")
                        )
            elif isinstance(item, ast.Call | ast.Attribute) and (resolved := code.called(item, scope)):
                handed = code.handed(item, resolved[1], scope)
                if resolved[0] not in visited and handed:
                    attributes[resolved[0].owner] |= scope.attributes if on_self(item) else set()
                    follow(*resolved, handed)

    method = code.method((start.module, start.owner), start.name)
    follow(start, method[1] if method else code.defined[start.module, start.name], {"request"})  # type: ignore[arg-type]
    return list(visited)


def on_self(node: ast.expr) -> bool:
    """Return whether a method or property is the object's own."""
    callee = node.func if isinstance(node, ast.Call) else node
    return isinstance(callee, ast.Attribute) and ast.unparse(callee.value) in {"self", "super()"}


def in_order(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what is in a function in the order in which it is computed: arguments before calls, values before names."""
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.arguments) or (isinstance(node, Function) and child in node.decorator_list)):
            yield from in_order(child)
            yield child


def figures_of(stops: list[Stop], floor_of: dict[str, int]) -> dict[str, int]:
    """Return how long a walk is, through how many modules and rooms, and how often it climbs."""
    heights = [floor_of[stop.module] for stop in stops]
    return {
        "stops": len(stops),
        "modules": len({stop.module for stop in stops}),
        "rooms": len({room(stop.module) for stop in stops}),
        "climbs": sum(after > before for before, after in pairwise(heights)),
    }


def options(checkout: Path) -> dict[str, int]:
    """Return how many options each command has; in a process of its own, which imports that checkout."""
    program = (
        "import click, json; from emloc_core.cli import cli as main; context = click.Context(main); "
        "commands = {name: main.get_command(context, name) for name in main.list_commands(context)}; "
        "print(json.dumps({name: sum(isinstance(each, click.Option) for each in command.params) "
        "for name, command in commands.items() if not isinstance(command, click.Group)}))"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=checkout, capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def _declared_layers(checkout: Path) -> int:
    """Return how many layers ``tests/test_directions.py`` lists."""
    tree = ast.parse((checkout / "tests" / "test_directions.py").read_text("utf-8"))
    assigned = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
    return len(ast.literal_eval(assigned["FLOORS"]))


def count(checkout: Path) -> dict[str, object]:
    """Return all figures of a checkout."""
    code, graph = Code(checkout), arrows(checkout)
    rooms, floor_of = between_rooms(graph), floors(graph)
    pages = [*(checkout / "docs").rglob("*.md"), checkout / "README.md"]
    source = {name: path.read_text("utf-8") for name, path in code.paths.items()}
    return {
        "lines": sum(text.count("\n") for text in source.values()),
        "modules": len(source),
        "root modules": sum(path.parent.name == CORE and path.stem[0] != "_" for path in code.paths.values()),
        "rooms": len(rooms),
        "arrows between rooms": sum(map(len, rooms.values())),
        "layers": _declared_layers(checkout),
        "floors of modules": 1 + max(floor_of.values()),
        "walks": {start.module: figures_of(walk(code, start), floor_of) for start in STARTS},
        "calls that open a model": {name: code.calls(name) for name in OPENERS},
        "modules that know a format": {
            name: sum(bool(re.search(pattern, text)) for text in source.values()) for name, pattern in FORMATS.items()
        },
        "words of documentation": sum(len(page.read_text("utf-8").split()) for page in pages),
        "options": options(checkout),
    }


if __name__ == "__main__":
    print(json.dumps(count(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT), indent=1))
