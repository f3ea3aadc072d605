"""Simulates a power cut: data must be on the disk before it gets the name under which it looks whole."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from chaos.cases import Case
from chaos.judge import wrong
from chaos.kernel import Call
from chaos.results import Verdict
from chaos.stages import Bench, Stage

_FILLS = {"write", "pwrite64", "writev", "sendfile", "copy_file_range", "ftruncate", "truncate", "fallocate"}
_NAMES = {"mkdir", "mkdirat", "unlink", "unlinkat", "rmdir", "link", "linkat", "symlink", "symlinkat"}
_OPENS = {"open": 1, "openat": 2}
_NAME = "its name"
_NAMELESS = " (deleted)"  # how the kernel ends the path of a file that no name refers to: nothing looks for it later


def syncs(bench: Bench, stage: Stage, most: int | None) -> Iterator[Case]:  # noqa: ARG001 - one is enough
    """Check the order in which an undisturbed stage writes, syncs and renames."""
    del bench
    yield Case("synced before it is published", stage.name, partial(_look, stage))


def _look(stage: Stage, bench: Bench) -> Verdict:
    run = bench.reference(stage.command).run
    directory = bench.root / "case"
    published = [call.path for call in run.calls if call.name.startswith("rename")]
    for output in stage.outputs:
        if directory / output not in published:
            raise wrong(f"{output} is not renamed to its place")
        late = unsynced(run.calls, directory / output)
        if late:
            raise wrong(f"{output} is published before these are on the disk: {', '.join(sorted(late)[:5])}")
    return Verdict.WHOLE


def unsynced(calls: list[Call], output: Path) -> set[str]:
    """Return what of a directory was not on the disk when it got its name, and that name if it never was."""
    dirty: set[Path] = set()
    late: set[str] = set()
    for call in calls:
        if call.name in _FILLS:
            if not call.path.name.endswith(_NAMELESS):
                dirty.add(call.path)
        elif call.name in _NAMES:
            dirty = {path for path in dirty if path != call.path} | {call.path.parent}
        elif call.name in _OPENS and call.arguments[_OPENS[call.name]] & os.O_CREAT:
            dirty |= {call.path, call.path.parent}
        elif call.name in ("fsync", "fdatasync"):
            dirty.discard(call.path)
            if call.path == output.parent:
                late.discard(_NAME)
        elif call.name.startswith("rename") and call.source:
            moved = {path for path in dirty if path.is_relative_to(call.source)}
            dirty = (dirty - moved) | {call.path / path.relative_to(call.source) for path in moved}
            dirty |= {call.source.parent, call.path.parent}
            if call.path == output:
                late = {_NAME, *(path.name for path in moved)}
    return late
