"""Drivers of real jobs that can be killed, and start without the seconds that each process takes to import torch."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from support.forkserver import warm_process
from support.processes import planning_here

from emloc_core.cli import main
from emloc_core.zoo.engines import worker


class ForkingDriver:
    """A function that converts a zoo, in a fork of a process that has imported everything, as are its workers.

    It is offline: these libraries read only at their import whether they are.

    Args:
        log: file to which its stdout is added; its stderr goes beside it, with the suffix ``.err``.
        function: of a module, with its arguments.
    """

    def __init__(self, log: Path, function: Callable[..., object], *args: object) -> None:
        self._process = warm_process(_drive, log, function, *args)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int | None:
        self._process.join()
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


def emloc(*argv: object) -> None:
    """Run a command, for a :class:`ForkingDriver`."""
    sys.argv[:] = ["emloc", *map(str, argv)]
    main()


class _Fork:
    """A worker, with those arguments and methods of ``Popen`` that an engine uses."""

    def __init__(self, command, *, stdout, cwd, env, **_others) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.setsid()
                os.chdir(cwd)
                os.environ.update(env)
                for stream in (1, 2):
                    os.dup2(stdout.fileno(), stream)
                code = worker.main(command[-1])
            finally:
                sys.stdout.flush()
                os._exit(code)

    def poll(self) -> int | None:
        return self.wait(os.WNOHANG)

    def wait(self, options: int = 0) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def kill(self) -> None:
        if self.returncode is None:
            os.kill(self.pid, 9)


def _drive(log: Path, function: Callable[..., object], *args: object) -> None:
    for path, stream in ((log, 1), (log.with_suffix(".err"), 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), stream)
    with (
        mock.patch("emloc_core.zoo.engines.engine.Popen", _Fork),
        mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True),
        planning_here(),
    ):
        function(*args)
