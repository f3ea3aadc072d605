"""``emloc run``."""

from pathlib import Path

import rich_click as click

from emloc_core.cli.console import stage_options
from emloc_core.cli.recipes import planning, reporting, show, show_plan
from emloc_core.processes.environment import without_collections


@click.command("run")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE",
              help="Override a value of the recipe; repeatable. Quote a part of the key that has a dot.")  # fmt: skip
@stage_options
def command(recipe: Path, overrides: tuple[str, ...], dry_run: bool, as_json: bool) -> None:
    """Run all stages of RECIPE, a TOML file: compress, train, correct, polish, merge, eval.

    A stage is skipped if its output exists and was made from the same inputs; an interrupted one resumes.
    """
    with without_collections():
        from emloc_core.recipe.decided import decided
        from emloc_core.recipe.recipe import load_recipe
        from emloc_core.recipe.run import require_named, require_tuning, run_recipe

    if dry_run:
        with planning():
            loaded = load_recipe(recipe, overrides)
            require_named(loaded)
            require_tuning(loaded)
            show_plan(decided(loaded), as_json)
        return
    output = Path(load_recipe(recipe, overrides).output)  # before the run: the file may be edited meanwhile
    show(run_recipe(recipe, overrides, **reporting()), output, as_json)
