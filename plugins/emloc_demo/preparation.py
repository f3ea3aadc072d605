"""Writes what a demo needs: the base model, rows, tasks and the recipe, each unless it is there."""

import filecmp
import os
import shutil
from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import rich_click as click

from emloc_core.cli.console import resumes


def output_option(default: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return the option ``-o`` of a demo, which resumes there, with its default directory."""
    option = click.option(
        "-o",
        "--output",
        type=click.Path(path_type=Path),
        default=Path(default),
        show_default=True,
        help="Directory of everything that the demo makes.",
    )
    return lambda command: option(resumes(command))


def prepare(directory: Path, package: str = "emloc_demo", *, short: bool = True) -> Path:
    """Write base model, rows, tasks and recipe to ``directory``, each unless it is there; return the recipe's path.

    Args:
        directory: directory of everything that the demo makes.
        package: package with the tasks and the recipe.
        short: whether rows are short.

    Raises:
        EmlocError: a package of the demo is missing.
    """
    from emloc_demo.data import write_data
    from emloc_demo.model import write_base

    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / "base").exists():
        click.echo("writing the base model, SmolLM2-135M-Instruct (dequantised from Q4_1)", err=True)
        write_base(directory / "base", "bfloat16")  # as models are published
    if not all((directory / "data" / name).exists() for name in ("train.jsonl", "test.jsonl")):
        click.echo("writing the messages", err=True)
        write_data(directory / "data", short=short)
    return copy_recipe(package, directory)


def copy_recipe(package: str, directory: Path) -> Path:
    """Copy the recipe and the tasks of ``package``, each file unless it is there, and return the recipe's path."""
    copy_tasks(package, directory)
    with as_file(files(package)) as source:
        _copy(source / "recipe.toml", directory / "recipe.toml")
    return directory / "recipe.toml"


def copy_tasks(package: str, directory: Path) -> None:
    """Copy the tasks of ``package``, which read ``data/test.jsonl`` in ``directory``, each file unless it is there."""
    with as_file(files(package)) as source:
        for file in sorted((source / "tasks").iterdir()):
            if file.suffix in (".yaml", ".py"):
                _copy(file, directory / "tasks" / file.name)


def _copy(source: Path, target: Path) -> None:
    """Copy a file unless it is there, since it may have been edited; say so if it differs."""
    if target.exists():
        if not filecmp.cmp(source, target, shallow=False):
            click.echo(f"kept {target}, which differs from that of this version", err=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    shutil.copyfile(source, partial)
    os.rename(partial, target)
