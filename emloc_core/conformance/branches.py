"""Branches of an architecture: switches of its config that change which Linears run, in what order, on what input.

Attention and MLP read one input if they run in parallel, and two if one follows the other. Input groups that were
observed in one branch are wrong in the other, so every branch needs a tiny config.
"""

import ast
import copy
import inspect
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch import nn

from emloc_core.conformance.tiny import random_model, tiny_config
from emloc_core.emulator.forwards import alike
from emloc_core.errors import EmlocError
from emloc_core.family import Family
from emloc_core.model.hooks import forward_hooks
from emloc_core.objective import Sample

#: The path of each distinct block's list, and its Linears by the input that they read, in order of execution.
Wiring = frozenset[tuple[str, tuple[frozenset[str], ...]]]

_BLOCK = re.compile(r"(.*?)\.(\d+)\.(.+)")
#: Switches that change no module and no order.
_IGNORED = re.compile(r"_.*|use_cache|output_\w+|return_\w+|tie_\w+|is_\w+|add_cross_attention|\w*deprecated\w*")


def wiring(model: nn.Module, samples: Sequence[Sample]) -> Wiring:
    """Return how the blocks of a model are wired, as observed in forward passes of the samples.

    Args:
        model: in eval mode, with weights.

    Raises:
        Exception: whatever the model's own code raises.
    """
    inputs_of: dict[str, list[torch.Tensor]] = defaultdict(list)

    def watching(path: str) -> Callable[..., None]:
        return lambda _module, args, _output: inputs_of[path].extend(tensor.clone() for tensor in args[:1])

    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    with forward_hooks((module, watching(path)) for path, module in linears.items()), torch.no_grad():
        for sample in samples:
            sample.run(model, "cpu")
    blocks: dict[tuple[str, str], list[list[str]]] = defaultdict(list)
    for path, inputs in inputs_of.items():
        match = _BLOCK.fullmatch(path)
        if match is None or re.search(r"\.\d+\.", match[3]):  # experts in a list run as tokens are routed
            continue
        groups = blocks[match[1], match[2]]
        block = path.removesuffix(match[3])
        group = next((group for group in groups if alike(inputs, inputs_of[block + group[0]])), None)
        if group is None:
            groups.append([match[3]])
        else:
            group.append(match[3])
    return frozenset((name, tuple(map(frozenset, groups))) for (name, _), groups in blocks.items())


def other_branches(
    family: Family, settings: Mapping[str, Any], make_samples: Callable[[Any], Sequence[Sample]], wirings: Wiring
) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """Flip every switch of a tiny config that the model's code reads, and yield those that change the wiring.

    Args:
        settings: the tiny config, as keyword arguments of ``AutoConfig.for_model``.
        wirings: wirings that already have a tiny config; branches with a known wiring are left out.

    Yields:
        The switch as ``section.name=value``, the tiny config with it, and its model. A switch is left out if
        transformers refuses the config or the model does not run.
    """
    tiny = tiny_config(settings, family)
    for path, value in _switches(tiny.to_dict(), random_model(family, tiny)):
        with suppress(Exception):  # an unknown model's code, on an untested value
            flipped = _with(settings, path, value)
            config = tiny_config(flipped, family)
            changed = random_model(family, config)
            flipped_wiring = wiring(changed, make_samples(config))
            if not flipped_wiring <= wirings:
                wirings |= flipped_wiring
                yield f"{'.'.join(path)}={value!r}", flipped, changed


def _switches(content: Mapping[str, Any], model: nn.Module) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the path and the other values of every boolean and every name that the model's code branches on."""
    modules = {type(module).__module__ for module in model.modules()} - {"torch"}
    reads: dict[str, set[str]] = defaultdict(set)
    for module in sorted(modules):
        if module.startswith("transformers.models."):
            for name, values in _reads(module).items():
                reads[name] |= values
    for path, value in _leaves(content):
        if path[-1] not in reads or _IGNORED.fullmatch(path[-1]):
            continue
        if isinstance(value, bool):
            yield path, not value
        elif isinstance(value, str):
            yield from ((path, other) for other in sorted(reads[path[-1]] - {value}))


def _leaves(content: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in content.items():
        if isinstance(value, Mapping) and "model_type" in value:
            yield from _leaves(value, (*prefix, str(name)))
        else:
            yield (*prefix, str(name)), value


@cache
def _reads(module: str) -> dict[str, set[str]]:
    """Return the fields of a config that a module's code reads, each with the names that it compares the field with."""
    fields: dict[str, set[str]] = defaultdict(set)
    for node in ast.walk(ast.parse(inspect.getsource(sys.modules[module]))):
        if isinstance(node, ast.Attribute) and _is_config(node.value):
            fields[node.attr] |= set()
        elif isinstance(node, ast.Compare) and isinstance(node.left, ast.Attribute) and _is_config(node.left.value):
            operands = (inner for operand in node.comparators for inner in ast.walk(operand))
            literals = (inner for inner in operands if isinstance(inner, ast.Constant))
            fields[node.left.attr] |= {literal.value for literal in literals if isinstance(literal.value, str)}
    return dict(fields)


def _is_config(node: ast.expr) -> bool:
    """Say whether an expression is ``config``, or an attribute of that name."""
    return getattr(node, "id", getattr(node, "attr", "")) == "config"


def _with(settings: Mapping[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(dict(settings))
    section = changed
    for name in path[:-1]:
        section = section.setdefault(name, {})
    section[path[-1]] = value
    return changed


def wiring_of(family: Family, settings: Mapping[str, Any], make_samples: Callable[[Any], Sequence[Sample]]) -> Wiring:
    """Return the wiring of a tiny config's model; empty if it does not run, which other checks report."""
    with suppress(EmlocError, ValueError, TypeError, IndexError, KeyError, RuntimeError):
        config = tiny_config(settings, family)
        return wiring(random_model(family, config), make_samples(config))
    return frozenset()
