"""The paths of LoRAs on experts in PEFT's files.

PEFT wraps a module of experts once for each stack, in the order in which the module has them: the first stack's LoRA
is at ``experts.base_layer``, the second's at ``experts``. Here both have the paths of their parameters.
"""

from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")
_INNER, _SECOND = ".base_layer", "down_proj"
_FIRST = ("gate_up_proj", "up_proj")


def by_stack(values: Mapping[str, T], targets: Iterable[str]) -> dict[str, T]:
    """Return the values of stacks by the paths of their parameters.

    Args:
        values: by the paths of PEFT's file; those of Linears are left out.
        targets: ``target_parameters`` of PEFT's config.
    """
    names = sorted(targets)
    stacks = {}
    for path in values:
        owner = path.removesuffix(_INNER)
        first = next((name for name in _FIRST if _is_named(f"{owner}.{name}", names)), None)
        if first and {owner, f"{owner}{_INNER}"} <= values.keys() and _is_named(f"{owner}.{_SECOND}", names):
            stacks[f"{owner}.{_SECOND if path == owner else first}"] = values[path]
    return stacks


def is_single(path: str, targets: Iterable[str]) -> bool:
    """Return whether PEFT keeps a LoRA on one stack of experts alone at this path, which is on no Linear."""
    return any(_is_named(f"{path}.{name}", targets) for name in (*_FIRST, _SECOND))


def in_file(path: str) -> str:
    """Return the path in PEFT's file of the LoRA on a stack."""
    owner, _, name = path.rpartition(".")
    return owner if name == _SECOND else f"{owner}{_INNER}"


def _is_named(path: str, targets: Iterable[str]) -> bool:
    return any(f".{path}".endswith(f".{target}") for target in targets)
