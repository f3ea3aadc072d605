"""The answers to a few rows before tuning and after it, side by side."""

from pathlib import Path
from typing import Any

from emloc_core.data.rows import load_rows
from emloc_core.files.checkpoint import open_checkpoint
from emloc_core.files.documents import read_json, write_json
from emloc_core.files.manifest import MANIFEST
from emloc_core.plugins.manager import plugin_manager
from emloc_core.processes.call import call

#: The file of the answers, beside the stages' directories.
FILE = "answers.json"


def answers_of(base: str, adapter: Path, rows: str, log: Path | None = None, **how: Any) -> list[dict[str, str]]:
    """Return the answers of the base and of the base with an adapter; those that are there are not made again.

    They are kept beside the adapter's directory, in a process of their own.

    Args:
        log: file for what that process writes; by default it goes to stderr.
        how: see :meth:`emloc_core.objective.Objective.answers`.

    Raises:
        EmlocError: the model, the adapter or the rows cannot be used.
    """
    file = adapter.parent / FILE
    asked = {"adapter": read_json(adapter / MANIFEST)["request"], "rows": rows, **how}
    known = read_json(file) if file.is_file() else {}
    if known.get("asked") != asked:
        given = {"base": base, "adapter": str(adapter), "rows": rows, **how}
        (found,) = call(f"{__name__}:answers", given, log=log)
        known = {"asked": asked, "answers": found}
        write_json(file, known)
    return known["answers"]


def answers(base: str, adapter: str, rows: str, **how: Any) -> list[dict[str, str]]:
    """Return the answers as the objective of the base has them; imports torch."""
    objective = plugin_manager().objective_for(open_checkpoint(base).config)
    return objective.answers(base, Path(adapter), load_rows(rows), **how)
