"""Runs a command in a fork of this process, which has imported everything and computed nothing, under supervision."""

import os
import select
import signal
import socket
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from chaos.forks import become
from chaos.kernel import ASKS_FOR_ROOM, Call, Listener, watch_this_process

SECONDS = 120  # the most that a command may take
#: Called when a call is about to be made; returns None to let it continue, or the errno that it fails with.
Act = Callable[["Run", Call], int | None]


@dataclass
class Run:
    """A command that runs, or has run.

    Attributes:
        process: its id, and that of its group.
        calls: what it did to files below ``root``, as far as it got.
        code: what it exited with; a signal's number, negative, where that ended it; None while it runs.
        output: its stdout and stderr.
        hung: it was ended because it took too long.
    """

    process: int
    calls: list[Call] = field(default_factory=list)
    code: int | None = None
    output: str = ""
    hung: bool = False

    @property
    def last_line(self) -> str:
        """The last line of its output."""
        return (self.output.strip().splitlines() or [""])[-1]

    def signal(self, number: int, *, group: bool = False) -> None:
        """Send a signal to the command, or to all of its processes as well."""
        with suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.process, number)

    def kill(self) -> None:
        """End all of its processes as a power cut does: nothing is caught, closed or written any more."""
        self.signal(signal.SIGKILL, group=True)


def supervise(
    command: Callable[[], int],
    root: Path,
    act: Act = lambda _run, _call: None,
    after: tuple[float, Callable[[Run], None]] | None = None,
) -> Run:
    """Run a command, and act on each of its calls that change a file below ``root``.

    Args:
        command: what the fork runs; returns the exit code.
        root: calls elsewhere are let through.
        act: is called with every call before it is made.
        after: seconds from the start, and what to do then.
    """
    ours, theirs = socket.socketpair()
    log = os.memfd_create("output")
    process = os.fork()
    if process == 0:
        ours.close()
        _become(command, theirs, log)
    theirs.close()
    run = Run(process)
    _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
    ours.close()
    try:
        _watch(run, Listener(descriptors[0]), root, act, after)
    finally:
        run.kill()  # what is left of its group
        _, status = os.waitpid(process, 0)
        os.close(descriptors[0])
    run.code = os.waitstatus_to_exitcode(status)
    run.output = os.pread(log, os.fstat(log).st_size, 0).decode(errors="replace")
    os.close(log)
    return run


def _become(command: Callable[[], int], theirs: socket.socket, log: int) -> NoReturn:
    """Become the command: in a group of its own, with its output in a file, followed by the kernel."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (1, 2):
        os.dup2(log, stream)
    try:
        listener = watch_this_process()
        socket.send_fds(theirs, [b"."], [listener])
        os.close(listener)
        theirs.close()
    except OSError:
        traceback.print_exc()
        os._exit(70)
    become(command)


def _watch(
    run: Run, listener: Listener, root: Path, act: Act, after: tuple[float, Callable[[Run], None]] | None
) -> None:
    """Answer calls until all processes of the command have ended."""
    poll = select.poll()
    poll.register(listener.descriptor, select.POLLIN)
    end = os.pidfd_open(run.process)
    poll.register(end, select.POLLIN)
    start = time.monotonic()
    due, deadline = start + after[0] if after else None, start + SECONDS
    try:
        while True:
            now = time.monotonic()
            if due and after and now >= due:
                due = None
                after[1](run)
            if now >= deadline:
                run.hung = True
                return
            events = dict(poll.poll(1000 * max(0.0, min(due or deadline, deadline) - now)))
            if listener.descriptor in events:
                if not events[listener.descriptor] & select.POLLIN:
                    return  # nobody is left
                _answer(run, listener, root, act)
            elif end in events:
                return
    finally:
        os.close(end)


def _answer(run: Run, listener: Listener, root: Path, act: Act) -> None:
    call = listener.receive()
    if call is None:
        return
    if not call.path.is_relative_to(root):
        listener.answer(call)
        return
    if call.name != ASKS_FOR_ROOM:
        run.calls.append(call)
    listener.answer(call, act(run, call))
