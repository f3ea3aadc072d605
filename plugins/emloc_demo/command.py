"""``emloc demo``."""

import os
import shutil
from importlib.resources import as_file, files
from pathlib import Path

import rich_click as click


@click.command("demo")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("build/demo"),
    show_default=True,
    help="Directory of everything that the demo makes.",
)
@click.option("--prepare-only", is_flag=True, help="Write the model, the data, the tasks and the recipe, and stop.")
def command(output: Path, prepare_only: bool) -> None:
    """Tune SmolLM2-135M to read customers' messages, the whole way from the base model to the table.

    Needs no network, no GPU and 2 GB of disk, and about twenty minutes on two cores. What is there already is not made
    again, so an interrupted demo goes on where it stopped.
    """
    recipe = prepare(output)
    if prepare_only:
        click.echo(f"{recipe}  (run it: emloc run {recipe})")
        return
    from emloc_core.cli.run import announce_stage, show
    from emloc_core.pipeline import run_recipe
    from emloc_core.recipe import load_recipe

    show(run_recipe(recipe, announce=announce_stage), Path(load_recipe(recipe).output))


def prepare(directory: Path) -> Path:
    """Write base model, data, tasks and recipe to ``directory``, each unless it is there; return the recipe's path.

    Raises:
        EmlocError: a package of the demo is missing.
    """
    from emloc_demo.data import write_data
    from emloc_demo.model import write_base

    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / "base").exists():
        click.echo("writing the base model, SmolLM2-135M-Instruct (dequantised from Q4_1)", err=True)
        write_base(directory / "base")
    if not all((directory / "data" / name).exists() for name in ("train.jsonl", "test.jsonl")):
        click.echo("writing the messages", err=True)
        write_data(directory / "data")
    with as_file(files("emloc_demo")) as package:
        for source in sorted((package / "tasks").iterdir()):
            if source.suffix in (".yaml", ".py"):
                _copy(source, directory / "tasks" / source.name)
        _copy(package / "recipe.toml", directory / "recipe.toml")
    return directory / "recipe.toml"


def _copy(source: Path, target: Path) -> None:
    """Copy a file unless it is there: it may have been edited since."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    shutil.copyfile(source, partial)
    os.rename(partial, target)
