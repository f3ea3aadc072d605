"""A griffe extension that turns Sphinx's roles in docstrings into Markdown."""

import re
from typing import Any

import griffe


class Roles(griffe.Extension):
    """Makes code of every role: ``:func:`train``` becomes ``train``."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite an object's docstring when it has been read."""
        if obj.docstring:
            obj.docstring.value = re.sub(r":\w+:`~?(?:[\w.]+\.)?([^`]+)`", r"`\1`", obj.docstring.value)
