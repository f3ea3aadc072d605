"""The page of a run: what was done, memory planned and measured, losses, errors, corrections compared, scores.

One file that asks for no other, in the look of a zoo's report: styles and plots are in it, it has no script, and its
content security policy forbids everything else. All that comes from files is escaped. While a run lasts, its page is
served to this machine alone.
"""

import time
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from emloc_core import __version__
from emloc_core.errors import EmlocError, printable
from emloc_core.files.documents import write_text
from emloc_core.recipe.live import Doing, doing
from emloc_core.recipe.view import RunView
from emloc_core.report.chart import Line, chart
from emloc_core.report.error_plot import sparkline
from emloc_core.report.pages import environment

#: Seconds after which the page of a run that lasts asks for itself again.
REFRESH = 3
#: Nothing else on the network reaches it.
HOST = "127.0.0.1"
_HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def write_page(run: Path, output: Path) -> Path:
    """Write the page of a run, whole or not at all.

    Raises:
        EmlocError: no stage is finished there, or the page cannot be written.
    """
    write_text(output, _render(RunView.read(run)))
    return output


def live_page(run: Path) -> str:
    """Return the page of a run as it is now, with the stage that runs; it asks for itself again."""
    return _render(RunView.read(run, whole=False), doing(run), REFRESH)


def _render(view: RunView, now: Doing | None = None, refresh: int | None = None) -> str:
    templates = environment("emloc_core.recipe", number=_number, plain=lambda text: printable(str(text)))
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    template = templates.get_template("run.html.j2")
    drawing = {"sparkline": sparkline, "chart": chart, "line": Line}
    text = template.render(run=view, now=now, refresh=refresh, written=written, version=__version__, **drawing)
    return f"{text.strip()}\n"


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return printable(str(value))
    return f"{value:.4g}"


def server(run: Path, port: int = 0) -> ThreadingHTTPServer:
    """Return a server of the page of a run, which begins with ``serve_forever``.

    Args:
        run: output directory of ``emloc run``.
        port: 0 for any free one.

    Raises:
        EmlocError: there is no such directory, or the port is taken.
    """
    if not run.is_dir():
        raise EmlocError(f"{run} is no directory.", "Give the output directory of `emloc run`.", code="missing")
    try:
        return ThreadingHTTPServer((HOST, port), partial(_Page, partial(live_page, run)))
    except OSError as error:
        raise EmlocError(
            f"The port {port} cannot be used ({error.strerror}).", "Choose another --port.", code="unavailable"
        ) from None


class _Page(BaseHTTPRequestHandler):
    """Answers for the one page, and only to browsers that ask for this machine by name: not to a page elsewhere."""

    protocol_version = "HTTP/1.1"

    def __init__(self, page: Callable[[], str], *args: object) -> None:
        self._page = page
        super().__init__(*args)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        """Answer."""
        host = (self.headers.get("Host") or "").rpartition(":")[0]
        if host not in (HOST, "localhost"):
            self._send(HTTPStatus.FORBIDDEN, "This page is for this machine.")
        elif self.path.partition("?")[0] != "/":
            self._send(HTTPStatus.NOT_FOUND, "There is only one page here: /.")
        else:
            self._send(HTTPStatus.OK, self._page())

    def _send(self, status: HTTPStatus, text: str) -> None:
        content = text.encode()
        self.send_response(status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing of requests."""
