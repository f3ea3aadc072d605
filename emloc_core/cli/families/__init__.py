"""``emloc families``: what is installed; its subcommands, one file each, are for plugin authors."""

import rich_click as click

from emloc_core.cli.console import as_json, print_json
from emloc_core.cli.families import check, new, scaffold


@click.group("families", invoke_without_command=True)
@as_json
@click.pass_context
def command(context: click.Context, as_json: bool) -> None:
    """List the model families and the plugins that provide them, and the errors of broken plugins."""
    if context.invoked_subcommand is not None:
        return

    from emloc_core.plugins.manager import plugin_manager
    from emloc_core.registry.registry import load_entries

    manager = plugin_manager()
    load_entries()  # finds plugins with a broken entry
    families = [
        {
            "name": family.name,
            "modality": family.modality,
            "model_types": sorted(family.model_types),
            "towers": [tower.name for tower in family.towers],
            "kept_dense": dict(family.keep_dense),
        }
        for family in manager.families()
    ]
    if as_json:
        print_json({"families": families, "plugins": [vars(report) for report in manager.reports]})
        return
    for family in manager.families():
        click.echo(f"{family.name:<12} {family.modality:<11} {', '.join(sorted(family.model_types))}")
        for pattern, reason in family.keep_dense.items():
            click.echo(f"  {pattern} stays dense: {reason}")
    click.echo()
    for report in manager.reports:
        state = f"BROKEN: {report.error}" if report.error else ", ".join(report.families) or "no families"
        click.echo(f"plugin {report.name} ({report.distribution}): {state}")


command.add_command(check.command)
command.add_command(new.command)
command.add_command(scaffold.command)
