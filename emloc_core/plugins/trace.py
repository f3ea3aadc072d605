"""Prints every hook call on stderr, for plugin authors: set ``EMLOC_TRACE_PLUGINS=1``."""

import time
from collections.abc import Callable, Mapping, Sequence
from reprlib import Repr
from typing import Any

import click
import pluggy

_SHORT = Repr()
_SHORT.maxother = _SHORT.maxstring = _SHORT.maxlong = 80  # characters of one value
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 4  # values of a collection


def trace_hooks(manager: pluggy.PluginManager) -> Callable[[], None]:
    """Print a line per hook call of a plugin of ``manager``: plugin, hook, arguments, result and time.

    For a hook that raises, the error is printed. Values are abbreviated.

    Returns:
        A function that ends the tracing.
    """
    started: list[float] = []  # a hook may call hooks

    def before(*_: object) -> None:
        started.append(time.perf_counter())

    def after(
        outcome: pluggy.Result[Any],
        hook: str,
        implementations: Sequence[pluggy.HookImpl],
        arguments: Mapping[str, Any],
    ) -> None:
        milliseconds = 1000 * (time.perf_counter() - started.pop())
        given = ", ".join(f"{name}={_SHORT.repr(value)}" for name, value in arguments.items())
        for implementation in implementations:  # the manager asks one plugin at a time: one, or none that answers
            click.echo(
                f"emloc: trace: {implementation.plugin_name}: {hook}({given}) {_outcome(outcome)} "
                f"[{milliseconds:.1f} ms]",
                err=True,
            )

    return manager.add_hookcall_monitoring(before, after)


def _outcome(outcome: pluggy.Result[Any]) -> str:
    if error := outcome.exception:
        return f"raised {type(error).__name__}: {error}"
    answers = outcome.get_result()
    return f"-> {_SHORT.repr(answers[0])}" if answers else "-> None"
