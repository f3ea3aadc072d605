"""Processes that are killed for real, without the seconds that each would take to import torch."""

import multiprocessing
import os
import signal
from collections.abc import Callable

#: Each process is a fork of one that has imported the libraries and run nothing: a fork of a process in which torch has
#: computed would wait forever for threads that it does not have.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["emloc_core.emulator.compress", "emloc_core.adapters.correct", "emloc_core.adapters.merge",
     "emloc_core.tuning.exact", "emloc_core.zoo.convert", "emloc_core.cli", "peft",
     "trl.trainer.sft_trainer", "transformers.models.llama.modeling_llama", "pytest"]
)  # fmt: skip


def kill() -> None:
    """End this process as the kernel does when memory runs out: nothing is caught, closed or written any more."""
    os.kill(os.getpid(), signal.SIGKILL)


def run_until_killed(run: Callable[..., object], *args: object) -> None:
    """Run a function of a test module in a process of its own, which has to be killed."""
    process = SERVER.Process(target=run, args=args)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
