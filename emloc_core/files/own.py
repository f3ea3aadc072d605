"""Which files are a directory's own: regular ones, in it, or in the hub cache that it is a snapshot of.

A model of somebody else may hold a link to any file of this machine, which would be read, and copied into what is made
of the model; or a pipe, whose reading never ends.
"""

import stat
from collections.abc import Iterable
from pathlib import Path

from emloc_core.errors import EmlocError


def require_regular(path: Path) -> None:
    """Refuse what is no regular file, before it is opened: opening a pipe may wait for ever, a device never ends.

    Raises:
        EmlocError: it is a directory, a pipe, a device or a socket.
        OSError: it does not exist, or cannot be looked at.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise EmlocError(f"{path} is not a regular file.", "Give a file.")


def require_own_files(directory: Path, patterns: Iterable[str]) -> None:
    """Refuse a directory of which files are no regular ones, or links to somewhere else.

    A link may lead within the directory, or to the blobs of the hub's cache where the directory is one of its
    snapshots (``models--NAME/snapshots/COMMIT``). One that leads nowhere is not looked at.

    Args:
        directory: of a model or an adapter.
        patterns: of the names of the files that matter.

    Raises:
        EmlocError: names the first of them.
    """
    root = directory.resolve()
    places = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    for path in sorted(directory.iterdir()):
        if not any(path.match(pattern) for pattern in patterns) or not path.exists() or path.is_dir():
            continue
        require_regular(path)
        if not any(path.resolve().is_relative_to(place) for place in places):
            raise EmlocError(
                f"{path} is a link to a file outside of {directory}, which would be read and copied.",
                "Put the file in the place of the link if it belongs there; do not use the directory otherwise.",
            )
