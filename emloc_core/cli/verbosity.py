"""The amount of output of a command: ``--quiet``, ``--verbose``, or neither."""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

import rich_click as click

#: Carries it to the stages of a recipe, which run in processes of their own.
VARIABLE = "EMLOC_VERBOSITY"


class Verbosity(Enum):
    """What is shown besides errors."""

    QUIET = "quiet"
    NORMAL = "normal"
    VERBOSE = "verbose"


def verbosity() -> Verbosity:
    """Return what the running command was asked for, or the process that started this one."""
    value = os.environ.get(VARIABLE, "")
    return Verbosity(value) if value in {each.value for each in Verbosity} else Verbosity.NORMAL


def verbosity_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--quiet`` and ``--verbose``."""
    quiet = click.option("-q", "--quiet", is_flag=True, expose_value=False, callback=_chooses(Verbosity.QUIET),
                         help="Show no progress, and print only the output's path.")  # fmt: skip
    verbose = click.option("-v", "--verbose", is_flag=True, expose_value=False, callback=_chooses(Verbosity.VERBOSE),
                           help="Show every step as a line, and what the libraries log.")  # fmt: skip
    return quiet(verbose(function))


def _chooses(level: Verbosity) -> Callable[[click.Context, click.Parameter, bool], None]:
    def choose(context: click.Context, _: click.Parameter, given: bool) -> None:
        if given:
            context.with_resource(set_for_now(VARIABLE, level.value))

    return choose


@contextmanager
def set_for_now(variable: str, value: str) -> Iterator[None]:
    """Set an environment variable, for this process and those that it starts, while a command runs."""
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
    """Say on stderr, while a command runs, what is observed of models that no plugin declares."""
    logger, handler = logging.getLogger("emloc.families"), _Said()
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _Said(logging.Handler):
    """Prints a message as a line."""

    def emit(self, record: logging.LogRecord) -> None:
        if verbosity() is not Verbosity.QUIET:
            click.echo(record.getMessage(), err=True)


def set_up_libraries(*, on_terminal: bool) -> None:
    """Let transformers, datasets and the hub's library say as much: bars on terminals alone, logs when verbose."""
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    level = verbosity()
    has_bars = level is Verbosity.NORMAL and on_terminal
    (enable_progress_bars if has_bars else disable_progress_bars)()  # transformers follows it, if imported later
    for name in ("transformers", "datasets"):  # which take seconds to import, and may not be needed
        if loaded := sys.modules.get(f"{name}.utils.logging"):
            (loaded.enable_progress_bar if has_bars else loaded.disable_progress_bar)()
    if not has_bars:
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if level is not Verbosity.NORMAL:
        chosen = logging.INFO if level is Verbosity.VERBOSE else logging.ERROR
        for name in ("transformers", "datasets", "huggingface_hub", "trl", "peft", "accelerate"):
            logging.getLogger(name).setLevel(chosen)
