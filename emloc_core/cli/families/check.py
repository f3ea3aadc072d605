"""``emloc families check``: the conformance kit, on the command line."""

from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING

import rich_click as click

from emloc_core.cli.console import as_json, print_json, progress
from emloc_core.errors import EmlocError, did_you_mean

if TYPE_CHECKING:
    from emloc_core.conformance import CheckResult
    from emloc_core.family import Family


@click.command("check")
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--all", "every", is_flag=True, help="Check every installed family.")
@as_json
def command(names: tuple[str, ...], every: bool, as_json: bool) -> None:
    """Check the declarations of families on tiny models.

    It checks paths, input groups, streamed statistics, emulator, LoRA, correction, merge, memory plan and tied weights,
    with a tiny model for every entry of the family's tiny_configs. Each failure says what is wrong and how to fix it;
    the exit code is then 1.
    """
    if bool(names) == every:
        raise click.UsageError("Give the NAME of a family, or --all.")
    families = _families(names)

    from emloc_core.conformance import check_family

    results: list[CheckResult] = []
    for family in families:
        with progress(f"checking {family.name}") as advance:
            results += check_family(family, advance)
    failed = [result for result in results if not result.passed]
    if as_json:
        print_json({"passed": not failed, "checks": [asdict(result) for result in results]})
    else:
        _show(results)
    if failed:
        raise EmlocError(f"{len(failed)} of {len(results)} checks failed.", "Each says how to fix it.")


def _families(names: tuple[str, ...]) -> "list[Family]":
    from emloc_core.plugins.manager import plugin_manager

    installed = {family.name: family for family in plugin_manager().families()}
    for name in names:
        if name not in installed:
            raise EmlocError(
                f"No installed plugin declares a family {name!r}: {', '.join(installed)}."
                f"{did_you_mean(name, list(installed))}",
                "`emloc families` lists all plugins, and the errors of broken ones.",
            )
    return [installed[name] for name in names or installed]


def _show(results: "list[CheckResult]") -> None:
    for (family, config), group in groupby(results, key=lambda result: (result.family, result.config)):
        checks = list(group)
        passed = sum(result.passed for result in checks)
        click.echo(f"{family}, {config}: {passed} of {len(checks)} checks passed")
        for result in checks:
            if not (result.passed or result.blocked):
                click.echo(f"  FAILED {result.check}: {result}")
            elif result.passed and result.message:
                click.echo(f"  {result.check}: {result.message}")
        if blocked := [result.check for result in checks if result.blocked]:
            click.echo(f"  Not run because checks that they depend on failed: {', '.join(blocked)}.")
