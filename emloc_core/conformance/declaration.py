"""Checks of a declaration, on models without weights."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from functools import cached_property, partial

from torch import nn

from emloc_core.conformance.branches import other_branches, wiring_of
from emloc_core.conformance.check import Subject, check, require
from emloc_core.conformance.tiny import TinyModel, on_meta, tiny_config, trial_of
from emloc_core.emulator.coverage import undeclared
from emloc_core.emulator.ranks import LinearPlan, RankPlan
from emloc_core.errors import EmlocError
from emloc_core.family import Family, Tower
from emloc_core.model.blocks import block_paths
from emloc_core.model.weight_reads import read_without_call
from emloc_core.plugins.manager import TOKENS


class Declaration(Subject):
    """A family's declaration as a whole."""

    def __init__(self, declared: Family) -> None:
        super().__init__(declared, "all")

    @cached_property
    def models(self) -> list[nn.Module]:
        """All tiny models, without weights."""
        return [on_meta(self.declared, tiny_config(settings, self.declared)) for settings in self.declared.tiny_configs]


@check()
def model_types(subject: Declaration) -> None:
    """Every model type has a tiny config, and transformers has the class that builds it."""
    family = subject.declared
    library = "transformers" if family.objective == TOKENS else "The family's library"
    if not trial_of(family).has_class(family.auto_class):
        raise EmlocError(
            f"{library} has no class {family.auto_class!r} that builds models from configs.",
            "Set auto_class to one such as AutoModelForCausalLM or AutoModelForImageTextToText.",
        )
    odd = [settings for settings in family.tiny_configs if not isinstance(settings, Mapping)]
    require([f"a tiny config is {settings!r}, not a mapping" for settings in odd], "Declare tiny_configs as dicts.")
    configured = {str(settings.get("model_type")) for settings in family.tiny_configs}
    problems = [f"no tiny config is of the model type {name!r}" for name in sorted(family.model_types - configured)]
    problems += [
        f"a tiny config is of {name!r}, which is not among model_types"
        for name in sorted(configured - family.model_types)
    ]
    require(problems, "Declare tiny_configs: for each of model_types, at least one.")


@check(model_types)
def names(subject: Declaration) -> None:
    """Every declared path, pattern and target is found in at least one of the tiny models."""
    family = subject.declared
    everything = {name for model in subject.models for name, _ in model.named_modules() if name}
    problems = [
        f"keep_dense names {pattern!r}, which no module of any tiny model matches"
        for pattern in family.keep_dense
        if not any(fnmatchcase(name, pattern) for name in everything)
    ]
    for tower in family.towers:
        within = {name for model in subject.models for name in _within_blocks(model, tower)}
        if not within:
            problems.append(f"the blocks {tower.blocks!r} of the tower {tower.name!r} are in none of the tiny models")
            continue
        paths = [path for group in tower.input_groups for path in group]
        problems += [f"the path {path!r} is in no block of {tower.blocks!r}" for path in paths if path not in within]
        problems += [
            f"the LoRA target {target!r} ends no path in {tower.blocks!r}"
            for target in tower.lora_targets or ()
            if not any(f".{name}".endswith(f".{target}") for name in within)
        ]
    require(problems, "Correct the name, or add a tiny config of a model that has it.")


@check(names)
def branches(subject: Declaration) -> None:
    """Every switch of a config that changes which Linears share an input has a tiny config for each of its values."""
    family = subject.declared
    for model_type in sorted(family.model_types):
        configs = [settings for settings in family.tiny_configs if settings["model_type"] == model_type]
        make_samples = partial(trial_of(family).samples, family)
        wirings = frozenset().union(*(wiring_of(family, settings, make_samples) for settings in configs))
        for settings in configs if wirings else ():
            require(
                [
                    f"with {switch}, the Linears of a {model_type!r} run in another order, or read other inputs, than "
                    "in every tiny config"
                    for switch, _, _ in other_branches(family, settings, make_samples, wirings)
                ],
                "Add a tiny config with that value for every one, and group only Linears that read one input in all of "
                "them: `emloc families scaffold` drafts both.",
            )


def _within_blocks(model: nn.Module, tower: Tower) -> set[str]:
    prefix = f"{tower.blocks}."
    inside = (name.removeprefix(prefix) for name, _ in model.named_modules() if name.startswith(prefix))
    return {name.partition(".")[2] for name in inside} - {""}


@check()
def builds(subject: TinyModel) -> None:
    """The tiny model is built, without weights, and its nested families are there."""
    _ = subject.meta


@check(builds)
def linears(subject: TinyModel) -> None:
    """Every path is a Linear, and every Linear of the model is in one group or kept dense."""
    family = subject.family
    try:
        blocks = block_paths(subject.meta, family)
        uncovered = undeclared(subject.meta, family, subject.plan.planned)
    except EmlocError as error:
        raise EmlocError(
            str(error.args[0]),
            "Correct blocks and input_groups of the tower: print(model) shows the paths. Linears alone belong there.",
        ) from error
    inside = [path for path in uncovered if path.startswith(tuple(f"{block}." for block in blocks))]
    problems = [f"{_describe(subject.meta, path)} that is neither in an input group nor kept dense" for path in inside]
    require(problems, "Add it to an input group of its tower, or to keep_dense with the reason; each Linear once.")
    outside = {path: _list_around(subject.meta, path) for path in uncovered if path not in inside}
    problems = [
        f"{blocks} is a list of blocks that no tower declares" for blocks in dict.fromkeys(outside.values()) if blocks
    ]
    problems += [
        f"{_describe(subject.meta, path)} outside the blocks that is not kept dense"
        for path, blocks in outside.items()
        if not blocks
    ]
    require(
        problems,
        "Declare repeated blocks as a tower; list what stays dense in keep_dense with the reason, which users see.",
    )
    require(
        [f"{path} of {blocks} is to be compressed, and kept dense" for blocks, path in _never_compressed(subject.plan)],
        "Take it out of one of them.",
    )
    readers = read_without_call(subject.meta)
    require(
        [
            f"{readers[linear.path]} reads the weight of {linear.path} without calling it, and would get a factor "
            "instead"
            for linear in subject.plan.candidates
            if linear.path in readers
        ],
        "List it in keep_dense: a kernel that takes the weight may run on a GPU alone, or in training alone.",
    )


def _describe(model: nn.Module, path: str) -> str:
    """Return a module's path and kind as text."""
    module = model.get_submodule(path)
    return f"{path} is a {'Linear' if isinstance(module, nn.Linear) else type(module).__name__}"


def _list_around(model: nn.Module, path: str) -> str | None:
    """Return the path of the outermost list of modules around a module."""
    ends = [end for end, letter in enumerate(path) if letter == "."]
    return next((path[:end] for end in ends if isinstance(model.get_submodule(path[:end]), nn.ModuleList)), None)


def _never_compressed(plan: RankPlan) -> list[tuple[str, str]]:
    """Return the declared Linears that are kept dense in every block: their list of blocks, and path in a block."""

    def positions(planned: Iterable[LinearPlan]) -> set[tuple[str, str]]:
        return {(linear.block.rpartition(".")[0], linear.path.removeprefix(f"{linear.block}.")) for linear in planned}

    return sorted(positions(plan.planned) - positions(linear for linear in plan.planned if linear.is_replaced))
