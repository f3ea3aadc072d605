"""The page of a running run, for this machine only: what is done, and the stage, loss, memory and time left."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from html import escape
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from emloc_core.errors import EmlocError
from emloc_core.recipe.page import live_page
from emloc_core.recipe.view import require_run

#: Nothing else on the network reaches it.
HOST = "127.0.0.1"
_HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def server(run: Path, port: int = 0) -> ThreadingHTTPServer:
    """Return a server for the page of a run; ``serve_forever`` starts it.

    Args:
        port: 0 for any free port.

    Raises:
        EmlocError: there is no such directory, or the port is taken.
    """
    require_run(run)
    try:
        return ThreadingHTTPServer((HOST, port), partial(_Page, partial(live_page, run)))
    except OSError as error:
        raise EmlocError(
            f"The port {port} cannot be used ({error.strerror}).", "Choose another --port.", code="unavailable"
        ) from None


class _Page(BaseHTTPRequestHandler):
    """Serves the one page, and only if ``Host`` names this machine, so that no foreign page can read it."""

    protocol_version = "HTTP/1.1"

    def __init__(self, page: Callable[[], str], *args: object) -> None:
        self._page = page
        super().__init__(*args)  # type: ignore[arg-type]

    def handle(self) -> None:
        """Answer, unless the browser has gone away."""
        with suppress(ConnectionError):
            super().handle()

    def do_GET(self) -> None:
        """Answer."""
        host = (self.headers.get("Host") or "").partition(":")[0]
        if host not in (HOST, "localhost"):
            self._send(HTTPStatus.FORBIDDEN, "This page is for this machine.")
        elif self.path.partition("?")[0] != "/":
            self._send(HTTPStatus.NOT_FOUND, "There is only one page here: /.")
        else:
            try:
                self._send(HTTPStatus.OK, self._page())
            except EmlocError as error:
                self._send(HTTPStatus.INTERNAL_SERVER_ERROR, escape(str(error)))

    def _send(self, status: HTTPStatus, text: str) -> None:
        content = text.encode()
        self.send_response(status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Log no requests."""
