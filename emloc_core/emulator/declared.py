"""Resolves a family's declaration on a model: the Linears and experts in its blocks."""

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from emloc_core.algorithms.statistics import cheaper_side
from emloc_core.emulator.ranks import ExpertsPlan, Kept, LinearPlan, RankPlan
from emloc_core.emulator.vocabulary import find_vocabulary
from emloc_core.errors import EmlocError
from emloc_core.family import Family
from emloc_core.model.blocks import block_paths
from emloc_core.standins import Format
from emloc_core.standins.experts import matrices, stacks


def find_linears(model: nn.Module, family: Family, format: Format | None = None) -> RankPlan:
    """Resolve a family's declaration on a model: every Linear that it names, without ranks.

    Args:
        model: the model; meta tensors suffice.
        format: of the emulator: experts that it cannot pack stay dense, and activations are captured as it needs them.

    Raises:
        EmlocError: the declaration does not fit the model.
    """
    linears: list[LinearPlan] = []
    experts: list[ExpertsPlan] = []
    blocks = block_paths(model, family)
    if not blocks:
        raise EmlocError("The model has no blocks.", "Check the number of layers in its config.json.")
    for tower in family.towers:
        for block in (path for path in blocks if path.startswith(f"{tower.blocks}.")):
            for group in tower.input_groups:
                linears += _plan_group(model, family, block, group)
            for path in tower.experts:
                experts += _plan_experts(model, family, block, path)
    _require_one_group(linears)
    named = {linear.path for linear in linears} | {stack.owner for stack in experts}
    plan = RankPlan(tuple(linears), tuple(_kept(model, family, named)), tuple(experts))
    if not plan.candidates:
        raise EmlocError(
            f"The family {family.name!r} names no Linear of this model.", "Update the plugin.", code="plugin"
        )
    if format is None:
        return plan
    if not format.experts:
        plan = plan.without_experts(f"the kind {format.name!r} only supports Linears")
    if format.packs_vocabulary and plan.ranks:
        plan = replace(plan, vocabulary=find_vocabulary(model, lambda path: kept_by(path, family)))
    return plan.tapped(format.tap)


def all_linears(model: Any) -> list[str]:
    """Return the last parts of the paths of all Linears but the output layer, as PEFT's ``all-linear`` means them."""
    output = model.get_output_embeddings()
    linears = (path for path, module in model.named_modules() if isinstance(module, nn.Linear) and module is not output)
    return sorted({path.rpartition(".")[2] for path in linears})


def kept_by(path: str, family: Family) -> str | None:
    """Return the pattern of ``keep_dense`` that matches a module, or one that it is part of; None if none does."""
    around = [path, *(path[:end] for end, letter in enumerate(path) if letter == ".")]
    return next((pattern for pattern in family.keep_dense if any(fnmatchcase(name, pattern) for name in around)), None)


def _reason(path: str, family: Family) -> str | None:
    pattern = kept_by(path, family)
    return None if pattern is None else family.keep_dense[pattern]


def _plan_group(model: nn.Module, family: Family, block: str, group: Sequence[str]) -> list[LinearPlan]:
    modules = dict(model.get_submodule(block).named_modules())
    present = tuple(f"{block}.{path}" for path in group if path in modules)
    planned = []
    for path in present:
        module = model.get_submodule(path)
        if not isinstance(module, nn.Linear):
            raise EmlocError(
                f"{path} is a {type(module).__name__}, not a Linear, though the family {family.name!r} names it.",
                "The declaration does not fit this model: update the plugin.",
                code="plugin",
            )
        m, n = int(module.out_features), int(module.in_features)  # some models compute them as tensors
        planned.append(LinearPlan(path, block, present, m, n, None, cheaper_side(m, n), _reason(path, family)))
    return planned


def _plan_experts(model: nn.Module, family: Family, block: str, path: str) -> list[ExpertsPlan]:
    owner = f"{block}.{path}"
    if path not in dict(model.get_submodule(block).named_modules()):
        return []
    experts, reason = model.get_submodule(owner), _reason(owner, family)
    planned = []
    for name in stacks(experts):
        count, m, n = matrices(experts, name).shape
        planned.append(
            ExpertsPlan(f"{owner}.{name}", block, (owner,), m, n, None, cheaper_side(m, n), reason, experts=count)
        )
    return planned


def _require_one_group(linears: Sequence[LinearPlan]) -> None:
    counts = Counter(linear.path for linear in linears)
    if several := [path for path, count in counts.items() if count > 1]:
        more = f" ({len(several) - 1} more like it)" if len(several) > 1 else ""
        raise EmlocError(
            f"{several[0]} is in several input groups{more}.",
            "The plugin has to name every Linear once.",
            code="plugin",
        )


def _kept(model: nn.Module, family: Family, planned: Collection[str]) -> list[Kept]:
    """Count the parameters, except planned Linears, of modules at or below paths that a pattern matches."""
    sizes: dict[str, int] = defaultdict(int)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        path = name.rpartition(".")[0]
        pattern = kept_by(path, family)
        if pattern is not None and path not in planned:
            sizes[pattern] += parameter.numel()
    return [Kept(pattern, size, family.keep_dense[pattern]) for pattern, size in sizes.items()]
