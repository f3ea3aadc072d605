"""Disks that fill up: from one call on nothing can be written any more, until the command has ended."""

import errno
import os
from collections.abc import Iterator
from functools import partial

from chaos.cases import Case, spread
from chaos.judge import finish, require_nothing_half, require_same, succeeded
from chaos.kernel import ASKS_FOR_ROOM, Call, say_full
from chaos.results import Verdict
from chaos.stages import Bench, Stage
from chaos.supervise import Run

#: What needs room.
_NEEDS = {"write", "pwrite64", "writev", "sendfile", "copy_file_range", "fallocate", "fsync", "fdatasync", "mkdir",
          "mkdirat", "link", "linkat", "symlink", "symlinkat", "rename", "renameat", "renameat2"}  # fmt: skip
_OPENS = {"open": 1, "openat": 2}


def full_disks(bench: Bench, stage: Stage, most: int | None) -> Iterator[Case]:
    """Fill the disk before each call that needs room, for good or for that call alone; then run the stage again."""
    calls = bench.reference(stage.command).run.calls
    numbers = [number for number, call in enumerate(calls, 1) if _needs_room(call)]
    for index in spread(len(numbers), most):
        number = numbers[index - 1]
        name = f"{stage.name}, from call {number} on ({calls[number - 1]})"
        yield Case("full disk", name, partial(_fill, stage, number))


def _fill(stage: Stage, number: int, bench: Bench) -> Verdict:
    directory, reference = bench.new_directory(), bench.reference(stage.command)

    def act(run: Run, call: Call) -> int | None:
        if len(run.calls) < number:
            return None
        if call.name == ASKS_FOR_ROOM:
            say_full(call)
            return 0
        return errno.ENOSPC if _needs_room(call) else None

    if succeeded(bench.run(stage.command, directory, act)):
        require_same(directory, reference)
        return Verdict.WHOLE
    require_nothing_half(directory, stage.outputs, reference)
    finish(bench, stage.command, directory, reference)
    return Verdict.RESUMED


def _needs_room(call: Call) -> bool:
    if call.name in _OPENS:
        return bool(call.arguments[_OPENS[call.name]] & os.O_CREAT)
    return call.name in _NEEDS
