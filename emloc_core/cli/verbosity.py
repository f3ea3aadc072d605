"""The amount of output of a command: ``--quiet``, ``--verbose``, or neither."""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

import rich_click as click

#: Passes it on to the stages of a recipe, which are separate processes.
VARIABLE = "EMLOC_VERBOSITY"


class Verbosity(Enum):
    """What is shown besides errors."""

    QUIET = "quiet"
    NORMAL = "normal"
    VERBOSE = "verbose"


def verbosity() -> Verbosity:
    """Return the verbosity of the running command, or of the process that started this one."""
    value = os.environ.get(VARIABLE, "")
    return Verbosity(value) if value in {level.value for level in Verbosity} else Verbosity.NORMAL


def verbosity_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--quiet`` and ``--verbose``."""
    quiet = click.option("-q", "--quiet", is_flag=True, expose_value=False, callback=_chooses(Verbosity.QUIET),
                         help="Show no progress, and print only the output's path.")  # fmt: skip
    verbose = click.option("-v", "--verbose", is_flag=True, expose_value=False, callback=_chooses(Verbosity.VERBOSE),
                           help="Show every step as a line, and what the libraries log.")  # fmt: skip
    return quiet(verbose(function))


def _chooses(level: Verbosity) -> Callable[[click.Context, click.Parameter, bool], None]:
    def choose(context: click.Context, _: click.Parameter, enabled: bool) -> None:
        if enabled:
            context.with_resource(set_for_now(VARIABLE, level.value))

    return choose


@contextmanager
def set_for_now(variable: str, value: str) -> Iterator[None]:
    """Set an environment variable while a command runs, for this process and those that it starts."""
    before = os.environ.get(variable)
    os.environ[variable] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


@contextmanager
def showing_families() -> Iterator[None]:
    """While a command runs, print on stderr what is observed of models that no plugin declares."""
    logger, handler = logging.getLogger("emloc.families"), _EchoHandler()
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _EchoHandler(logging.Handler):
    """Prints each message as a line on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        if verbosity() is not Verbosity.QUIET:
            click.echo(record.getMessage(), err=True)


def set_up_libraries(*, on_terminal: bool) -> None:
    """Make transformers, datasets and the hub's library follow: bars only on terminals, logs when verbose."""
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    level = verbosity()
    has_bars = level is Verbosity.NORMAL and on_terminal
    (enable_progress_bars if has_bars else disable_progress_bars)()  # transformers follows it, if imported later
    for name in ("transformers", "datasets"):  # not imported here, which takes seconds
        if loaded := sys.modules.get(f"{name}.utils.logging"):
            (loaded.enable_progress_bar if has_bars else loaded.disable_progress_bar)()
    if not has_bars:
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if level is not Verbosity.NORMAL:
        log_level = logging.INFO if level is Verbosity.VERBOSE else logging.ERROR
        for name in ("transformers", "datasets", "huggingface_hub", "trl", "peft", "accelerate"):
            logging.getLogger(name).setLevel(log_level)
