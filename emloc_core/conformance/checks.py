"""The list of checks, and their subjects."""

from pathlib import Path

from emloc_core.conformance import activations, declaration, written
from emloc_core.conformance.check import Check, Subject
from emloc_core.conformance.declaration import Declaration
from emloc_core.conformance.tiny import TinyModel, labels
from emloc_core.family import Family

#: Checks of the declaration.
WHOLE = (declaration.model_types, declaration.names, declaration.branches)
#: Checks of each tiny model, in the order in which problems are best fixed.
EACH = (
    declaration.builds,
    declaration.linears,
    activations.blocks,
    activations.causal,
    activations.input_groups,
    activations.products,
    activations.outputs,
    activations.statistics,
    activations.full_rank,
    written.packed,
    written.trains,
    written.adapter_keys,
    written.correction,
    written.merge,
    written.memory,
    written.ties,
)


def cases(family: Family) -> list[tuple[int, str, Check]]:
    """Return all cases: index of the tiny config (-1: the declaration), its label, and the check."""
    declaration_cases = [(-1, "all", check) for check in WHOLE]
    return declaration_cases + [(index, label, check) for index, label in enumerate(labels(family)) for check in EACH]


def make_subject(family: Family, index: int, directory: Path) -> Subject:
    """Return the subject of a case's checks; it works in a new directory within ``directory``."""
    if index < 0:
        return Declaration(family)
    label = labels(family)[index]
    return TinyModel(family, family.tiny_configs[index], label, directory / label)
