"""Checks that a directory's files are its own: regular files inside it, or in its snapshot's hub cache.

An untrusted model may contain a link to any file on this machine, which would be read and copied into outputs, or a
pipe, on which a read never returns.
"""

import stat
from collections.abc import Iterable
from pathlib import Path

from emloc_core.errors import EmlocError


def require_regular(path: Path) -> None:
    """Refuse anything but a regular file before it is opened: opening a pipe may block forever, a device never ends.

    Raises:
        EmlocError: it is a directory, a pipe, a device or a socket.
        OSError: it does not exist, or its status cannot be read.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
        raise EmlocError(f"{path} is {kind}.", "Give a file.", code="refused")


def require_own_files(directory: Path, patterns: Iterable[str]) -> None:
    """Refuse a directory that contains special files, or links to other places.

    A link may point within the directory, or to the blobs of the hub's cache if the directory is one of its snapshots
    (``models--NAME/snapshots/COMMIT``), or a folder in one. Broken links are ignored.

    Args:
        patterns: glob patterns of the file names that matter.
    """
    root = directory.resolve()
    snapshot = next((folder for folder in (root, root.parent) if folder.parent.name == "snapshots"), None)
    roots = [root, snapshot.parents[1] / "blobs"] if snapshot else [root]
    for path in sorted(directory.iterdir()):
        if not any(path.match(pattern) for pattern in patterns) or not path.exists() or path.is_dir():
            continue
        require_regular(path)
        if not any(path.resolve().is_relative_to(allowed) for allowed in roots):
            raise EmlocError(
                f"{path} is a link to a file outside of {directory}, which would be read and copied.",
                "Replace the link with the file if you trust it; otherwise do not use the directory.",
                code="refused",
            )
