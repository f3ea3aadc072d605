"""The report of a zoo: an HTML page, and JSON.

The page is one file that loads no other: styles and plots are in it, it has no script, and its content security policy
forbids everything else, so that nothing in a name or a log can run or call home.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic_core import to_json

from emloc_core import __version__
from emloc_core.files.documents import write_text
from emloc_core.report.error_plot import band, sparkline
from emloc_core.report.pages import environment
from emloc_core.zoo.report import view
from emloc_core.zoo.report.log_end import plain
from emloc_core.zoo.report.view import STATES, JobView, Summary
from emloc_core.zoo.state.store import Store

PAGE, DATA = "report.html", "report.json"


def write_report(zoo: Path, directory: Path) -> dict[str, Any]:
    """Write ``report.html`` and ``report.json`` on a zoo into ``directory``.

    Returns:
        The content of ``report.json``: ``zoo``, ``generated`` (UTC), ``emloc`` (version), ``summary``, ``jobs``.
        A number that is not finite is the text ``NaN``, ``Infinity`` or ``-Infinity`` there.

    Raises:
        EmlocError: there is no zoo, or the files cannot be written.
    """
    store = Store(zoo)
    try:
        views = [JobView(record, zoo, number) for number, record in enumerate(store.records(), start=1)]
    finally:
        store.close()
    summary = Summary.from_views(views)
    head = {
        "zoo": zoo.resolve().name,
        "generated": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "emloc": __version__,
    }
    figures = to_json({"summary": summary, "jobs": [job.to_dict() for job in views]}, inf_nan_mode="strings")
    content: dict[str, Any] = {**head, **json.loads(figures)}
    files = {
        PAGE: _render(head, summary, views),
        DATA: json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
    }
    for name, text in files.items():
        write_text(directory / name, text)
    return content


def _render(head: Mapping[str, str], summary: Summary, views: list[JobView]) -> str:
    templates = environment("emloc_core.zoo.report", number=view.number, score=view.score, plain=plain)
    templates.globals.update(sparkline=sparkline, band=band, share=view.share)
    shown = sorted(views, key=lambda job: (list(STATES).index(job.state), job.number))
    text = templates.get_template("report.html.j2").render(head=head, summary=summary, jobs=shown, states=STATES)
    return f"{text.strip()}\n"
