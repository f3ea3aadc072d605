"""``emloc demo``."""

import tomllib
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from emloc_core.cli.console import as_json, print_json
from emloc_core.cli.verbosity import Verbosity, verbosity, verbosity_options
from emloc_core.errors import EmlocError
from emloc_core.files.meter import peak_memory
from emloc_core.process import ProcessDiedError, call
from emloc_core.progress import ProgressEvent
from emloc_demo.narration import BEGINNING, decision, happening, outcome
from emloc_demo.preparation import output_option, prepare

if TYPE_CHECKING:
    from emloc_core.recipe.stages import Stage
    from emloc_demo.screen import Screen


@click.command("demo")
@output_option("build/demo")
@click.option("--prepare-only", is_flag=True, help="Write the model, the data, the tasks and the recipe, and stop.")
@verbosity_options
@as_json
def command(output: Path, prepare_only: bool, as_json: bool) -> None:
    """Tune SmolLM2-135M to turn customers' messages into JSON, in less memory than an ordinary LoRA needs.

    Plans, makes the emulator, trains a LoRA on it, carries the LoRA over to the model, and shows answers before and
    after. Needs 1 GB of disk, no network and no GPU, and takes five minutes on two cores. What is there already is not
    made again, so an interrupted demo resumes where it stopped.
    """
    if prepare_only:
        recipe = prepare(output)
        click.echo(f"{recipe}  (run it: emloc run {recipe})")
        return
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
    """Make what is not there yet, each part in a process of its own, and return what ``emloc run --json`` would.

    Args:
        output: directory of everything; what the processes print goes to ``logs`` in it.
        screen: shows what is done.

    Raises:
        EmlocError: a package is missing, or a stage failed. What is done is kept.
    """
    from emloc_core.recipe.page import write_page
    from emloc_core.recipe.run import run_recipe
    from emloc_core.result import Result

    def answers(function: str, name: str, argument: str) -> Iterator[Any]:
        log = output / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield from call(f"emloc_demo.processes:{function}", {"argument": argument}, log=log)
        except ProcessDiedError as error:
            raise EmlocError(f"{error} Its log is {log}.", code=error.code, resumable=True) from None

    def perform(stage: "Stage") -> None:
        name = stage.request.stage
        with screen.step(name, BEGINNING[name], before=stage.state == "there") as step:
            for event in answers("performed", stage.name, stage.request.to_json()):
                step.say(happening(ProgressEvent(**event)))
            result = Result(stage.output)
            step.end(outcome(name, result), _peak(result.timing))

    with screen.step("prepare", "writing the model as an ordinary checkpoint, and the messages",
                     before=(output / "recipe.toml").exists()) as step:  # fmt: skip
        (recipe,) = answers("prepared", "prepare", str(output))
        step.end(f"the model, messages, and {recipe}")
    with screen.step("plan", "computing the memory that each way to tune needs, from the model's config") as step:
        (plan,) = answers("planned", "plan", recipe)
        step.end(decision(plan))
    results = run_recipe(Path(recipe), run=perform)
    write_page(output, output / "report.html")
    return {**results, "plan": plan}


def _peak(timing: dict[str, Any]) -> int:
    """Return the peak memory of a stage; of an evaluation, that of its largest system."""
    systems = timing.get("systems", {}).values()
    return max([peak_memory(timing) or 0, *(system["peak_bytes"] for system in systems)])
