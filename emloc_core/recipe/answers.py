"""The answers to a few rows before and after tuning, side by side."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emloc_core.data.rows import load_rows
from emloc_core.files.checkpoint import open_checkpoint
from emloc_core.files.documents import read_json, read_object, write_json
from emloc_core.files.manifest import MANIFEST
from emloc_core.plugins.manager import plugin_manager
from emloc_core.processes.call import call

#: The file of the answers, beside the stages' directories.
FILE = "answers.json"


def answers_of(
    base: str, adapter: Path, rows: str, *, read: Mapping[str, Any], log: Path | None = None, **how: Any
) -> list[dict[str, str]]:
    """Return the answers of the base and of the base with an adapter; existing ones are not made again.

    A separate process makes them; they are kept beside the adapter's directory.

    Args:
        read: how the rows are read: ``split`` and ``columns`` of :func:`emloc_core.data.rows.load_rows`.
        log: file for the output of that process; by default it goes to stderr.
        how: see :meth:`emloc_core.objective.Objective.answers`.

    Raises:
        EmlocError: the model, the adapter or the rows cannot be used.
    """
    file = adapter.parent / FILE
    asked = {"rows": rows, "read": dict(read), **how}
    question = {"adapter": read_json(adapter / MANIFEST)["request"], **asked}
    content = read_object(file) if file.is_file() else {}
    if content.get("asked") != question:
        (texts,) = call(f"{__name__}:answers", {"base": base, "adapter": str(adapter), **asked}, log=log)
        content = {"asked": question, "answers": texts}
        write_json(file, content)
    return content["answers"]


def answers(base: str, adapter: str, rows: str, read: Mapping[str, Any], **how: Any) -> list[dict[str, str]]:
    """Return the answers that the base's objective gives; imports torch."""
    objective = plugin_manager().objective_for(open_checkpoint(base).config)
    return objective.answers(base, Path(adapter), load_rows(rows, **read), **how)
