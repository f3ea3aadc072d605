"""``emloc demo``."""

import filecmp
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import rich_click as click

from emloc_core.files.meter import peak_memory


def output_option(default: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return the option ``-o`` of a demo that goes into the directory ``default`` where nothing else is said."""
    return click.option(
        "-o",
        "--output",
        type=click.Path(path_type=Path),
        default=Path(default),
        show_default=True,
        help="Directory of everything that the demo makes.",
    )


@click.command("demo")
@output_option("build/demo")
@click.option("--prepare-only", is_flag=True, help="Write the model, the data, the tasks and the recipe, and stop.")
def command(output: Path, prepare_only: bool) -> None:
    """Tune SmolLM2-135M to turn customers' messages into JSON: all stages, from the base model to the table.

    Needs 2 GB of disk, no network and no GPU, and takes about half an hour on two cores. What is there already is not
    made again, so an interrupted demo resumes where it stopped.
    """
    run(prepare(output), explain, prepare_only=prepare_only)


def run(recipe: Path, explain: Callable[[dict[str, Any]], str], *, prepare_only: bool) -> None:
    """Run a demo's recipe, and print its table and what ``explain`` says of the results; or just name the recipe."""
    if prepare_only:
        click.echo(f"{recipe}  (run it: emloc run {recipe})")
        return
    from emloc_core.cli.recipes import announce_stage, show
    from emloc_core.recipe.recipe import load_recipe
    from emloc_core.recipe.run import run_recipe

    results = run_recipe(recipe, announce=announce_stage)
    show(results, Path(load_recipe(recipe).output))
    with suppress(KeyError):  # a recipe that was edited may not have all that is explained
        click.echo(explain(results))


def explain(results: dict[str, Any]) -> str:
    """Return one paragraph that says what the table shows."""
    systems, stages = results["systems"], results["stages"]
    base, tuned, full = systems["base"], systems["base+corrected"], systems["full_lora"]
    polished, alone, longer = (systems[name] for name in ("base+polished", "exact_alone", "full_lora_60"))
    rows = results["tasks"]["fields_json"]["rows"]
    share = results["compression"]["bytes"]["emulator"] / results["compression"]["bytes"]["base"]

    def gain(system: dict[str, Any], whole: dict[str, Any]) -> str:
        return f"{(base['nll'] - system['nll']) / (base['nll'] - whole['nll']):.0%}"

    def whole(system: dict[str, Any]) -> str:
        return f"{round(rows * system['exact_match'])} of {rows} messages entirely right"

    def peak(stage: str) -> str:
        return f"{(peak_memory(stages[stage]) or 0) / 1e9:.2f} GB"

    return (
        f"\nWhat you see: SmolLM2-135M itself has a loss of {base['nll']:.2f} per token on the right answers, with "
        f"{whole(base)}. A LoRA was tuned on an emulator of {share:.0%} of its bytes, never touching the model itself, "
        f"and then corrected: {tuned['nll']:.3f}, {whole(tuned)}. That is {gain(tuned, full)} of what the same LoRA "
        f"gains in loss when it is tuned on the model itself ({full['nll']:.3f}, {whole(full)}). "
        f"{chosen_clamp(results)} Then came 20 exact steps on the model, read block by block: "
        f"{polished['nll']:.3f}, {whole(polished)}; {gain(polished, longer)} of the gain of 60 steps of ordinary "
        f"LoRA ({longer['nll']:.3f}, {whole(longer)}). The exact steps alone give {alone['nll']:.3f}, {whole(alone)}. "
        f"Tuning took {peak('adapter')} on the emulator, {peak('polished')} by exact steps and {peak('full_lora')} on "
        "the model: in a model this small, "
        "activations and logits outweigh the weights, and it is the weights that the emulator saves."
    )


def chosen_clamp(results: dict[str, Any]) -> str:
    """Return one sentence that says how the LoRA was corrected."""
    clamp, scale = results["correction"]["clamp"], results["correction"].get("scale", 1)
    if scale != 1:
        return f"On held-out rows, the LoRA as it was trained, scaled by {scale:g}, was the best."
    if clamp == 0:
        return "On held-out rows no correction helped, so the LoRA was kept as it was trained."
    return f"Of the corrections compared on held-out rows, clamp {clamp} was the best."


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
    return copy_recipe("emloc_demo", directory)


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
    """Copy a file unless it is there: it may have been edited since, or be of another version; say so if it differs."""
    if target.exists():
        if not filecmp.cmp(source, target, shallow=False):
            click.echo(f"kept {target}, which differs from that of this version", err=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    shutil.copyfile(source, partial)
    os.rename(partial, target)
