"""The end of a log as text that is safe to show, whatever the process wrote."""

import os
import re
import unicodedata
from pathlib import Path

_READ = 32 << 10
_WIDTH = 500
#: Escape sequences for a terminal's colours, titles and cursor (ECMA-48).
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_].*?(?:\x07|\x1b\\|$)|[ -/]*[0-~])")


def log_end(directory: Path, log: str, lines: int = 40) -> str | None:
    """Return the last lines of a log.

    Args:
        log: path within ``directory``.
        lines: maximum number.

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
    shown = plain(text).split("\n")
    while shown and not shown[-1].strip():
        shown.pop()
    return "\n".join(shown[-lines:])


def plain(text: object) -> str:
    """Return text as a terminal finally shows it: without escape sequences and control characters."""
    return "\n".join(map(_plain, _ESCAPES.sub("", str(text)).split("\n")))


def _plain(line: str) -> str:
    last = line.rstrip("\r").rpartition("\r")[2].expandtabs(4)
    # Cc: controls. Cf: formats, which can turn the direction of what follows. Cs, Co, Cn: nothing that can be shown.
    shown = "".join(
        "\ufffd" if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn") else character
        for character in last
    )
    return shown if len(shown) <= _WIDTH else f"{shown[:_WIDTH]} ..."
