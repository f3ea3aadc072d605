"""Shows no default where an option has none: mkdocs-click 0.9 shows the sentinel that click 8.3 has there."""

from typing import Any


def on_page_content(html: str, **_: Any) -> str:
    """Return a page without that sentinel."""
    return html.replace("<code>Sentinel.UNSET</code>", "")
