"""``emloc run``."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from emloc_core.cli.console import as_json, dry_run, print_json
from emloc_core.cli.verbosity import Verbosity, verbosity, verbosity_options
from emloc_core.files.meter import peak_memory
from emloc_core.units import human_bytes

if TYPE_CHECKING:
    from emloc_core.recipe.recipe import Recipe
    from emloc_core.recipe.stages import Stage


@click.command("run")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE",
              help="Override a value of the recipe; repeatable. Quote a part of the key that has a dot.")  # fmt: skip
@verbosity_options
@dry_run
@as_json
def command(recipe: Path, overrides: tuple[str, ...], dry_run: bool, as_json: bool) -> None:
    """Run all stages of RECIPE, a TOML file: compress, train, correct, polish, merge, eval.

    A stage is skipped if its output exists and was made from the same inputs; an interrupted one resumes.
    """
    from emloc_core.recipe.recipe import load_recipe
    from emloc_core.recipe.recommended import with_alternative
    from emloc_core.recipe.run import run_recipe

    if dry_run:
        _describe(with_alternative(load_recipe(recipe, overrides)), as_json)
        return
    quiet = verbosity() is Verbosity.QUIET
    results = run_recipe(recipe, overrides, **({"progress": lambda _: None} if quiet else {"announce": announce_stage}))
    output = Path(load_recipe(recipe, overrides).output)
    if as_json:
        print_json(results)
    elif verbosity() is Verbosity.QUIET:
        click.echo(output)
    else:
        show(results, output)


def announce_stage(index: int, total: int, stage: "Stage") -> None:
    """Print on stderr which stage starts."""
    click.secho(f"[{index + 1}/{total}] {stage.purpose}: {stage.request.stage}", bold=True, err=True)


def show(results: dict, directory: Path) -> None:
    """Print the table of results and its conclusion."""
    from emloc_core.report import table as report

    if "systems" in results:
        report.print_table(results["systems"], results["metrics"])
        click.echo(report.conclusion(results))
    peaks = [f"{name} {human_bytes(peak_memory(timing) or 0)}" for name, timing in results["stages"].items()]
    click.echo(f"peak memory of each stage: {', '.join(peaks)}")
    click.echo(f"{directory / 'results.json'}  {directory / 'figure.png'}")
    if "selection_losses" in results:
        kinds = results["kinds"]
        told = ", ".join(f"{name} ({kinds[name]}) {loss:.4f}" for name, loss in results["selection_losses"].items())
        click.echo(f"loss of the base on the selection rows: {told}; kept: {results['kept']}")
    click.echo(f"Next: {shlex.join(['emloc', 'chat', str(directory / results['final'])])}")


def _describe(recipe: "Recipe", as_json: bool) -> None:
    from emloc_core.recipe.run import describe
    from emloc_core.recipe.stages import attempts, stages

    planned = stages(recipe)
    first, *others = found = [describe(recipe, attempt) for attempt in attempts(recipe)]
    content = {
        "stages": [{"name": s.name, "state": s.state, "request": json.loads(s.request.to_json())} for s in planned],
        "base_bytes": first["base_bytes"],
        "emulator_bytes": first["emulator_bytes"],
        "merged_bytes": first["base_bytes"] if recipe.merge else 0,
        "rows": _rows(first),
    }
    if others:
        content["alternatives"] = {
            name: {"emulator_bytes": each["emulator_bytes"], "rows": _rows(each)}
            for name, each in zip(recipe.alternatives, others, strict=True)
        }
    if as_json:
        print_json(content)
        return
    width = max(len(stage.name) for stage in planned)
    for stage in planned:
        click.echo(f"{stage.name:<{width}} {stage.state:<12} {stage.request.stage}: {stage.purpose}")
    rows = ", ".join(f"{count} {purpose}" for purpose, count in content["rows"].items())
    sizes = ", ".join(human_bytes(each["emulator_bytes"]) for each in found)
    click.echo(f"base {human_bytes(content['base_bytes'])}, emulator{'s' if others else ''} {sizes}, "
               f"merged {human_bytes(content['merged_bytes'])}; rows: {rows}")  # fmt: skip


def _rows(described: dict[str, Any]) -> dict[str, int]:
    return {purpose: described[f"{purpose}_rows"] for purpose in ("calibration", "selection", "tuning")}
