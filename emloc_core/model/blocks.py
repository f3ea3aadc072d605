"""The blocks of a model, as its family declares them."""

from torch import nn

from emloc_core.errors import EmlocError
from emloc_core.family import Family


def block_paths(model: nn.Module, family: Family) -> list[str]:
    """Return the module paths of all blocks of all towers, in execution order.

    Raises:
        EmlocError: the model has no such list of blocks.
    """
    paths = []
    for tower in family.towers:
        try:
            blocks = model.get_submodule(tower.blocks)
        except AttributeError:
            raise EmlocError(
                f"The model has no {tower.blocks!r}, which the family {family.name!r} declares as its "
                f"{tower.name} tower.",
                "The declaration does not fit this model: update the plugin, or declare another family.",
                code="plugin",
            ) from None
        names = [name for name, _ in blocks.named_children()]
        if names != [str(index) for index in range(len(names))]:
            raise EmlocError(
                f"{tower.blocks} is a {type(blocks).__name__}, not a list of blocks, though the family "
                f"{family.name!r} declares it as its {tower.name} tower.",
                "Name the ModuleList whose children are the blocks: print(model) shows the paths.",
                code="plugin",
            )
        paths += [f"{tower.blocks}.{name}" for name in names]
    return paths
