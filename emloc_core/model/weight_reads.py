"""Finds Linears whose weight some module's code reads without calling them, to pass it to a fused kernel, say.

On an emulator such code would read a factor in place of the weight, and activations cast to the dtype of a packed
weight would become whole numbers. A forward on a CPU need not show it: the kernel may be for a GPU, or for training
alone. So the source is read, not run.
"""

import ast
import inspect
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache

from torch import nn

#: Attributes of a weight that do not depend on what it holds.
_HARMLESS = {"dtype", "device", "shape", "size", "ndim", "requires_grad", "is_meta"}
#: Methods that no forward calls: they run before the weights are there, or when a user asks for another layout of them.
_APART = re.compile(
    r"__init__|_?init_weights|_?initialize_weights|reset_parameters|tie_weights|from_config|(un)?fuse_\w+"
)


def read_without_call(model: nn.Module) -> dict[str, str]:
    """Return the paths of Linears whose weight a module around them reads, each with the name of that module's class.

    Args:
        model: meta tensors suffice.
    """
    readers: dict[str, str] = {}
    linears = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    for path, module in model.named_modules():
        for kind in type(module).__mro__:
            for inner in _reads(kind) if kind not in (nn.Module, nn.Linear, object) else ():
                name = f"{path}.{inner}" if path else inner
                if name in linears:
                    readers[name] = type(module).__name__
    return readers


def _reads(kind: type) -> frozenset[str]:
    """Return the paths of the modules within one of this class whose ``weight`` the class reads."""
    return _module_reads(kind.__module__).get(kind.__qualname__, frozenset())


@cache
def _module_reads(module: str) -> dict[str, frozenset[str]]:
    """Return the reads of every class of a module, see :func:`_reads`; empty if there is no source."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError, KeyError):
        return {}
    reads: dict[str, set[str]] = defaultdict(set)
    for kind in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for method in kind.body:
            if isinstance(method, ast.FunctionDef) and not _APART.fullmatch(method.name):
                reads[kind.name].update(_weights(method))
    return {name: frozenset(paths) for name, paths in reads.items()}


def _weights(method: ast.FunctionDef) -> Iterator[str]:
    """Yield ``a.b`` for every ``self.a.b.weight`` of a method, except where only its shape or the like is read.

    Its dtype may be read, except to cast something to it.
    """
    harmless: set[ast.AST] = set()
    casts: set[ast.AST] = set()
    for node in ast.walk(method):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("to", "type"):
            casts.update([*node.args, *(keyword.value for keyword in node.keywords)])
        if isinstance(node, ast.Attribute) and node.attr in _HARMLESS and node not in casts:
            harmless.add(node.value)
        elif (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "hasattr")
        ):
            harmless.update(node.args)
        elif isinstance(node, ast.Attribute) and node.attr == "weight" and node not in harmless:
            first, _, path = ast.unparse(node.value).partition(".")
            if first == "self" and re.fullmatch(r"[\w.]+", path):
                yield path
