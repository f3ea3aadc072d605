"""Translates errors of torch and of a model's own code into messages for a plugin's author."""

import re

from emloc_core.errors import EmlocError, typed_line

#: Pattern of a message -> what is wrong with the declaration, and how to fix it.
_MEANINGS = (
    (
        r"has no attribute [`'\"]\d+",
        "blocks names a module that is not a list of blocks",
        "Name the ModuleList whose children are the blocks: print(model) shows the paths.",
    ),
    (
        r"expected device meta|meta tensor|meta device|data of a meta",
        "the model computes with a weight that is not loaded at that moment: one that is read without calling its "
        "module, or one of blocks that no tower declares",
        "Declare every list of blocks as a tower. If a module reads another's weight, the model cannot be streamed: "
        "declare the module around both as the block.",
    ),
    (
        r"mat1 and mat2 shapes|must match the size of tensor|size mismatch",
        "sizes do not fit each other: those of the tiny config, or a factor is taken for the weight of its Linear",
        "Correct the sizes in tiny_configs. If only the emulator does not run, some code reads the weight of a Linear "
        "without calling it: list that Linear in keep_dense.",
    ),
)


def meaning(error: Exception) -> EmlocError | None:
    """Return what an error of torch says about a declaration; None if it is not a known one."""
    text = str(error)
    for pattern, problem, fix in _MEANINGS:
        if re.search(pattern, text):
            return EmlocError(f"Could not run: {problem} ({typed_line(error)})", fix)
    return None
