"""Processes that start at once: forks of one that has imported what the commands import (:mod:`support.warm`)."""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from unittest import mock

from support.paths import ROOT


def warm_process(target: Callable[..., object], *args: object) -> ForkServerProcess:
    """Return a process, which is still to be started, that calls a function of a module with these arguments."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.warm"])
    # The server knows only the paths of modules that the environment says, and skips what it cannot import.
    paths = [str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(paths)):
        forkserver.ensure_running()
    return context.Process(target=target, args=args)
