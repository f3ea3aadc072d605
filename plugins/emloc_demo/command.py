"""``emloc demo``."""

import tomllib
from collections.abc import Callable
from contextlib import ExitStack
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from emloc_core.cli.console import as_json, print_json
from emloc_core.cli.verbosity import Verbosity, verbosity, verbosity_options
from emloc_core.errors import EmlocError
from emloc_core.files.meter import peak_memory
from emloc_core.processes.call import ProcessDiedError, call
from emloc_core.stages.result import Result
from emloc_demo.narration import BEGINNING, decision, happening, outcome
from emloc_demo.preparation import output_option

if TYPE_CHECKING:
    from emloc_core.recipe.stages import Stage
    from emloc_demo.screen import Screen


@click.command("demo")
@output_option("build/demo")
@verbosity_options
@as_json
def command(output: Path, as_json: bool) -> None:
    """Tune SmolLM2-135M to turn customers' messages into JSON, in less memory than an ordinary LoRA needs.

    Plans, makes the emulator, trains a LoRA on it, carries the LoRA over to the model, and shows answers before and
    after. Needs 1 GB of disk, no network and no GPU, and takes about five minutes on two cores. Finished parts
    are kept, so an interrupted demo resumes where it stopped.
    """
    from emloc_demo.screen import Screen, show

    quiet = verbosity() is Verbosity.QUIET
    memory = tomllib.loads(files("emloc_demo").joinpath("recipe.toml").read_text("utf-8"))["model"]["memory"]
    results = run(output, Screen(memory, quiet=quiet))
    if as_json:
        print_json(results)
    elif quiet:
        click.echo(str(output))
    else:
        show(results, output)


def run(output: Path, screen: "Screen") -> dict[str, Any]:
    """Make what is not there yet, each part in its own process; return what ``emloc run --json`` would, and the plan.

    Args:
        output: directory of everything.
        screen: shows the progress.

    Returns:
        The results of the recipe, and ``plan``, what ``emloc plan --json`` says.

    Raises:
        EmlocError: a package is missing, or a stage failed. What is done is kept.
    """
    from emloc_core.recipe.run import run_recipe

    recipe = output / "recipe.toml"
    plan: dict[str, Any] = {}
    with screen.step("prepare", "writing the model as an ordinary checkpoint, and the messages",
                     lambda: f"SmolLM2-135M and messages in {output}", before=recipe.exists()):  # fmt: skip
        _in_a_process("prepared", output, output)
    with screen.step("plan", "computing the memory that each way to tune needs", lambda: decision(plan)):
        plan |= _in_a_process("planned", recipe, output)
    with ExitStack() as current:
        reporters: list[Callable[[str], None]] = []  # one per stage; the last one's stage is running

        def announce(_index: int, _total: int, stage: "Stage") -> None:
            current.close()  # the stage before
            name, result = stage.request.stage, Result(stage.output)
            callbacks = (lambda: outcome(name, result)), (lambda: _peak(result.timing))
            before = stage.state == "there"
            reporters.append(current.enter_context(screen.step(name, BEGINNING[name], *callbacks, before=before)))

        results = run_recipe(recipe, announce=announce, progress=lambda event: reporters[-1](happening(event)))
    with screen.step("report", "writing the page of the run", lambda: f"{output / 'report.html'}"):
        _in_a_process("reported", output, output)
    return {**results, "plan": plan}


def _in_a_process(function: str, argument: Path, output: Path) -> Any:
    """Return the result of a function of :mod:`emloc_demo.processes`; its log is kept if the process dies."""
    output.mkdir(parents=True, exist_ok=True)
    log = output / f".{function}.log"
    try:
        (answer,) = call(f"emloc_demo.processes:{function}", {"argument": str(argument)}, log=log)
    except ProcessDiedError as error:
        raise EmlocError(f"{error.args[0]} (log: {log})", error.fix, code=error.code, resumable=True) from None
    log.unlink(missing_ok=True)
    return answer


def _peak(timing: dict[str, Any]) -> int:
    """Return the peak memory of a stage; for an evaluation, its largest system's."""
    systems = timing.get("systems", {}).values()
    return max([peak_memory(timing) or 0, *(system["peak_bytes"] for system in systems)])
