"""What the demo does in processes of its own, so that each one's memory is freed and its peak measured."""

from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue
from sys import stderr
from threading import Thread
from typing import Any


def prepared(argument: str) -> str:
    """Write what the demo needs to the directory ``argument``; return the recipe's path."""
    from emloc_demo.preparation import prepare

    return str(prepare(Path(argument)))


def planned(argument: str) -> dict[str, Any]:
    """Return what ``emloc plan --json`` says of the model, memory, rows and tuning of the recipe ``argument``."""
    from emloc_core.api import plan
    from emloc_core.recipe.recipe import load_recipe
    from emloc_core.settings import MEMORY_SETTINGS

    found = load_recipe(Path(argument))
    tuning = found.train.model_dump(include=set(MEMORY_SETTINGS), exclude_unset=True)
    return plan(found.model.base, memory=found.model.memory, data=found.data.train, **tuning).describe()


def performed(argument: str) -> Iterator[dict[str, Any]]:
    """Run the stage whose request is ``argument``, JSON, and yield the fields of its progress events.

    Raises:
        EmlocError: the stage failed.
    """
    from emloc_core.cli.verbosity import set_up_libraries
    from emloc_core.progress import Reporter
    from emloc_core.requests import request_from_json
    from emloc_core.stages import perform

    request = request_from_json(argument)
    told: SimpleQueue[dict[str, Any] | BaseException | None] = SimpleQueue()

    def work() -> None:
        try:
            report = Reporter(request.stage, request.output, lambda event: told.put(asdict(event)))
            with redirect_stdout(stderr):
                perform(request, report)
            told.put(None)
        except BaseException as error:
            told.put(error)

    set_up_libraries(on_terminal=False)
    Thread(target=work).start()
    while (item := told.get()) is not None:
        if isinstance(item, BaseException):
            raise item
        yield item
