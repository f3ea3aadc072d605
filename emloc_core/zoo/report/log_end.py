"""The end of a log as text that is safe to show, whatever the process wrote."""

import os
import re
import unicodedata
from pathlib import Path

_READ = 32 << 10
_WIDTH = 500
#: Sequences by which a terminal is told colours, titles and where the cursor goes (ECMA-48).
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_].*?(?:\x07|\x1b\\|$)|[ -/]*[0-~])")


def log_end(directory: Path, log: str, lines: int = 40) -> str | None:
    """Return the last lines of a log.

    Args:
        log: path within it.
        lines: at most.

    Returns:
        Text without control characters; where a line was overwritten (a progress bar), its last state. None if the
        file cannot be read or is not in the zoo.
    """
    path = (directory / log).resolve()
    if not path.is_relative_to(directory.resolve()) or not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _READ))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return None
    found = plain(text).split("\n")
    while found and not found[-1].strip():
        found.pop()
    return "\n".join(found[-lines:])


def plain(text: object) -> str:
    """Return text as it stands on a terminal in the end: without escape sequences and control characters."""
    return "\n".join(map(_plain, _ESCAPES.sub("", str(text)).split("\n")))


def _plain(line: str) -> str:
    last = line.rstrip("\r").rpartition("\r")[2].expandtabs(4)
    # Cc: controls. Cf: formats, which can turn the direction of what follows. Cs, Co, Cn: nothing that can be shown.
    shown = "".join("\ufffd" if unicodedata.category(each) in ("Cc", "Cf", "Cs", "Co", "Cn") else each for each in last)
    return shown if len(shown) <= _WIDTH else f"{shown[:_WIDTH]} ..."
