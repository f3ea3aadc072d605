"""Processes that work together, as a launcher starts them: on CPUs, connected by gloo."""

import os
import socket
import traceback
from collections.abc import Callable
from contextlib import closing

from support.forkserver import warm_process


def run_together(count: int, run: Callable[..., object], *args: object) -> list[int | None]:
    """Call a function of a test module in so many processes that find each other; return their exit codes."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [warm_process(_run, rank, count, port, run, *args) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def _run(rank: int, count: int, port: int, run: Callable[..., object], *args: object) -> None:
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    launched |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
    os.environ.update({name: str(value) for name, value in launched.items()})
    try:
        run(*args)
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # without waiting for a group that others may have left
