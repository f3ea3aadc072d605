"""Shared by the commands that run recipes: which stage starts, what there is to do, and the results."""

import json
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from emloc_core.cli.console import print_json, print_table
from emloc_core.cli.verbosity import Verbosity, verbosity
from emloc_core.errors import printable
from emloc_core.files.meter import peak_memory
from emloc_core.processes.call import call, called_here
from emloc_core.processes.environment import without_collections
from emloc_core.units import human_bytes

if TYPE_CHECKING:
    from emloc_core.recipe.recipe import Recipe
    from emloc_core.recipe.stages import Stage


def announce_stage(index: int, total: int, stage: "Stage") -> None:
    """Print on stderr which stage starts."""
    click.secho(f"[{index + 1}/{total}] {stage.purpose}: {stage.request.stage}", bold=True, err=True)


def reporting() -> dict[str, Any]:
    """Return how a run reports its stages, as keyword arguments: on stderr, or not at all with ``--quiet``."""
    if verbosity() is Verbosity.QUIET:
        return {"progress": lambda _: None}
    return {"announce": announce_stage}


def show(results: dict, directory: Path, as_json: bool = False) -> None:
    """Print the table of results and its conclusion; as JSON, all results; with ``--quiet``, the directory."""
    from emloc_core.report import table as report

    if as_json:
        print_json(results)
        return
    if verbosity() is Verbosity.QUIET:
        click.echo(directory)
        return

    if "systems" in results:
        print_table(report.table(results["systems"], results["metrics"]))
        for line in filter(None, (report.note(results), report.conclusion(results))):
            click.echo(line)
    peaks = [f"{name} {human_bytes(peak_memory(timing) or 0)}" for name, timing in results["stages"].items()]
    for number, answer in enumerate(results.get("answers", []), 1):
        click.echo(f"held-out row {number}: {_short(answer['prompt'])}")
        for name in ("before", "after", "expected"):
            click.echo(f"  {name:<8} {_short(answer[name])}")
    click.echo(f"peak memory of each stage: {', '.join(peaks)}")
    click.echo(f"{directory / 'results.json'}  (a page of it: {shlex.join(['emloc', 'report', str(directory)])})")
    click.echo(f"Next: {shlex.join(['emloc', 'chat', str(directory / results['final'])])}")


def _short(text: str, most: int = 100) -> str:
    line = printable(" ".join(text.split()))
    return line if len(line) <= most else f"{line[: most - 3]}..."


@contextmanager
def planning() -> Iterator[None]:
    """Plan in this process, and without garbage collection, since nothing is loaded."""
    with called_here(), without_collections():
        yield


def show_plan(recipe: "Recipe", as_json: bool, test: Sequence[str] = ()) -> None:
    """Print the stages of a recipe, their states, and sizes.

    Args:
        test: more files of rows that are never tuned on.
    """
    from emloc_core.recipe.run import DESCRIBE, describe
    from emloc_core.recipe.stages import stages

    planned = stages(recipe)
    data = recipe.data.model_copy(update={"test": [*recipe.data.test, *test]})
    holding_out = recipe.model_copy(update={"data": data})
    described = describe(holding_out) if recipe.makes_emulator else None
    for stage in planned:
        stage.require_same_settings()
    content: dict[str, Any] = {
        "way": recipe.way or "emulator",
        "stages": [{"name": s.name, "state": s.state, "request": json.loads(s.request.to_json())} for s in planned],
    }
    if described:
        content |= {name: described[name] for name in ("base_bytes", "emulator_bytes")}
        content["rows"] = _rows(described, holding_out)
    else:
        (tuned,) = call(DESCRIBE, {"request": stages(holding_out)[0].request.to_json()})
        content |= {"base_bytes": tuned["model_bytes"], "rows": {"tuning": tuned["rows"]}}
    content["merged_bytes"] = content["base_bytes"] if recipe.merge else 0
    if as_json:
        print_json(content)
        return
    width = max(len(stage.name) for stage in planned)
    for stage in planned:
        click.echo(f"{stage.name:<{width}} {stage.state:<12} {stage.request.stage}: {stage.purpose}")
    sizes = [f"base {human_bytes(content['base_bytes'])}"]
    if described:
        sizes.append(f"emulator {human_bytes(described['emulator_bytes'])}")
    if recipe.merge:
        sizes.append(f"merged {human_bytes(content['merged_bytes'])}")
    rows = ", ".join(f"{count} {purpose}" for purpose, count in content["rows"].items())
    click.echo(f"{', '.join(sizes)}; rows: {rows}")


def _rows(described: dict[str, Any], recipe: "Recipe") -> dict[str, int]:
    """Return how many rows there are for each purpose; those to tune on may have a file of their own."""
    from emloc_core.recipe.stages import stages
    from emloc_core.requests import TrainRequest
    from emloc_core.stages.rows import requested_rows

    rows = {purpose: described[f"{purpose}_rows"] for purpose in ("calibration", "selection", "tuning")}
    if recipe.data.calibration:
        train = next(stage.request for stage in stages(recipe) if isinstance(stage.request, TrainRequest))
        rows["tuning"] = len(requested_rows(train, recipe.train.loss).rows)
    return rows
