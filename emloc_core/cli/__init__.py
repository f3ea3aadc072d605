"""The ``emloc`` command. One file a command; a command's heavy imports happen when it runs."""

import os
import sys
from importlib import import_module

import rich_click as click

from emloc_core import __version__
from emloc_core.errors import EmlocError

COMMANDS = {
    "compress": "Make the emulator: a low-rank copy of a model for training on.",
    "correct": "Carry a LoRA from the emulator over to the base model.",
    "eval": "Compare base, emulator and adapters in one table.",
    "families": "List model families and the plugins that bring them.",
    "merge": "Fold an adapter into the base: an ordinary checkpoint.",
    "run": "Run all stages from one recipe.",
    "train": "Train a LoRA on the emulator.",
}


class LazyGroup(click.RichGroup):
    """Imports a command's module when that command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return built-in commands and those of plugins."""
        return sorted({*COMMANDS, *super().list_commands(ctx), *_plugin_commands()})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command ``cmd_name``; None where there is none of that name."""
        if cmd_name in COMMANDS:
            return import_module(f"emloc_core.cli.{cmd_name}").command
        return _plugin_commands().get(cmd_name) or super().get_command(ctx, cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands from their one-line descriptions alone, importing none of the built-in ones."""
        plugin_rows = {name: command.get_short_help_str() for name, command in _plugin_commands().items()}
        with formatter.section("Commands"):
            formatter.write_dl(sorted({**plugin_rows, **COMMANDS}.items()))


def _plugin_commands() -> dict[str, click.Command]:
    from emloc_core.plugins import plugin_manager

    return {command.name or "": command for found in plugin_manager().hook.emloc_commands() for command in found}


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="emloc")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Fine-tune a large model in the memory that inference needs.

    compress makes a low-rank emulator, train tunes a LoRA on it, correct carries the LoRA over to the base model,
    merge folds it in, eval compares them all. run does everything from one recipe.
    """


def main() -> None:
    """Run the command line: a user's error is one line on stderr and exit code 1."""
    # OpenMP threads that spin while they wait for work starve the second core (design: 20 s against 5 s under load).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    debug = "--debug" in sys.argv
    try:
        cli.main(standalone_mode=False)
    except EmlocError as error:
        if debug:
            raise
        click.echo(f"emloc: error: {error}", err=True)
        sys.exit(1)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("emloc: interrupted; the same command goes on where it stopped.", err=True)
        sys.exit(130)
