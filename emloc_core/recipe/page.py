"""The page of a run: what was done, memory planned and measured, losses, errors, corrections compared, scores.

One file that loads no other, in the style of a zoo's report: styles and plots are in it, it has no script, and its
content security policy forbids everything else. All that comes from files is escaped.
"""

import time
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from emloc_core import __version__
from emloc_core.errors import EmlocError, printable, typed_line
from emloc_core.files.documents import write_text
from emloc_core.recipe.view import RunView
from emloc_core.report.chart import chart
from emloc_core.report.error_plot import sparkline
from emloc_core.report.pages import environment


def write_page(run: Path, output: Path) -> Path:
    """Write the page of a run, completely or not at all.

    Raises:
        EmlocError: no stage is finished there, a file there is damaged, or the page cannot be written.
    """
    try:
        page = _render(RunView.read(run))
    # A file there has a value of another type than was written.
    except (ArithmeticError, AttributeError, LookupError, TemplateError, TypeError, ValueError) as error:
        raise EmlocError(
            f"{run} cannot be shown: a JSON file there is not as it was written ({typed_line(error)}).",
            "Restore it, or make its directory again.",
            code="damaged",
        ) from error
    write_text(output, page)
    return output


def _render(view: RunView) -> str:
    templates = environment("emloc_core.recipe", number=_number, plain=lambda text: printable(str(text)))
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    template = templates.get_template("run.html.j2")
    text = template.render(run=view, written=written, version=__version__, sparkline=sparkline, chart=chart)
    return f"{text.strip()}\n"


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return printable(str(value))
    return f"{value:.4g}"
