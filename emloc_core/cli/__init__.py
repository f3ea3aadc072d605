"""The ``emloc`` command. One file per command; a command does its heavy imports when it runs."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from keyword import iskeyword
from types import FrameType
from typing import Any

import rich_click as click

from emloc_core import __version__
from emloc_core.cli.verbosity import set_for_now, showing_families
from emloc_core.errors import DISK_FULL, DiskFullError, EmlocError, did_you_mean, printable, typed_line
from emloc_core.plugins.builtin import COMMANDS
from emloc_core.processes.environment import hush_libraries, settle
from emloc_core.processes.lifetime import end_with_parent

#: The commands by what they are for, in the order of the help.
_PANELS = {
    "Start here": ["tune", "plan", "run", "doctor"],
    "Stage by stage": ["compress", "train", "correct", "polish", "merge"],
    "Use the result": ["eval", "chat", "export", "report", "push"],
    "Many models, and other layouts": ["zoo", "import"],
    "Add a family": ["families"],
}


class PluggableGroup(click.RichGroup):
    """The built-in commands, one module each, and those that plugins add."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands."""
        return sorted({*COMMANDS, *super().list_commands(ctx), *_plugin_commands()})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command ``cmd_name``, or None if there is no such command."""
        if cmd_name in COMMANDS:
            module = f"{cmd_name}_" if iskeyword(cmd_name) else cmd_name
            return import_module(f"emloc_core.cli.{module}").command
        return _plugin_commands().get(cmd_name) or super().get_command(ctx, cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that is named first; if there is none, say which one is probably meant."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            near = did_you_mean(args[0], self.list_commands(ctx))
            raise click.UsageError(f"{error.message}{near}", ctx) from None


def _panels(command: Any) -> Any:
    """Show the commands of the core in panels; those of plugins, demos among them, come after."""
    for name, commands in reversed(_PANELS.items()):
        command = click.command_panel(name, commands=commands)(command)
    return command


def _plugin_commands() -> dict[str, click.Command]:
    from emloc_core.plugins.manager import plugin_manager

    return plugin_manager().commands()


@click.group(cls=PluggableGroup, context_settings={"help_option_names": ["-h", "--help"]})
@_panels
@click.version_option(__version__, prog_name="emloc")
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
@click.option("--strict-families", is_flag=True, help="Refuse models that no plugin declares.")
@click.pass_context
def cli(context: click.Context, *, strict_families: bool) -> None:
    """Fine-tune a large model in the memory that inference needs.

    tune does it all in the memory available. Stage by stage: plan shows what fits; compress makes an emulator, a
    smaller stand-in for the model; train tunes a LoRA on it; correct carries the LoRA over to the model; polish
    (optional) trains it there for a few exact steps; merge adds it to the weights; eval compares them all. run does
    everything from one recipe.
    """
    from emloc_core.plugins.manager import STRICT
    from emloc_core.plugins.report import is_on

    hush_libraries()
    if strict_families:
        context.with_resource(set_for_now(STRICT, "1"))
    context.with_resource(showing_families())
    if is_on("EMLOC_STRICT_PLUGINS"):  # a broken plugin ends every command, even one that needs no plugin
        _plugin_commands()


def main() -> None:
    """Run the command line: errors that users can fix are one line on stderr and exit code 1."""
    settle()
    end_with_parent()
    received: list[tuple[int, bool]] = []
    try:
        with _interrupting(received):
            cli.main(standalone_mode=False)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | click.Abort) or received:
            number, resumes = received[0] if received else (signal.SIGINT, False)
            click.echo(f"emloc: interrupted{'; the same command resumes where it stopped' * resumes}.", err=True)
            sys.exit(128 + number)
        _fail(error)


@contextmanager
def _interrupting(received: list[tuple[int, bool]]) -> Iterator[None]:
    """Raise ``KeyboardInterrupt`` on SIGINT and SIGTERM; add to ``received`` which, and whether the command resumes.

    An interrupted library may raise something else instead.
    """
    before: dict[signal.Signals, Any] = {}

    def interrupt(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signature of a handler
        context = click.get_current_context(silent=True)
        received.append((number, getattr(context and context.command.callback, "resumes", False)))
        raise KeyboardInterrupt

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            if (handler := signal.getsignal(number)) is not signal.SIG_IGN:
                before[number] = handler
                signal.signal(number, interrupt)
        yield
    finally:
        for changed, handler in before.items():
            signal.signal(changed, handler)


def _fail(error: BaseException) -> None:
    """Print an error in one line and exit; with ``--debug``, or if it is not an ``Exception``, raise it."""
    if isinstance(error, click.ClickException):
        error.show()
        sys.exit(error.exit_code)
    if "--debug" in sys.argv or not isinstance(error, Exception):
        raise error
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        subject = f": {os.fsdecode(error.filename)} cannot be written" if error.filename is not None else ""
        error = DiskFullError(f"The disk is full{subject}.", "Free some space, and run the same command again.")
    if isinstance(error, EmlocError):
        click.echo(f"emloc: error: {printable(error)}", err=True)
        sys.exit(1)
    if isinstance(error, OSError) and error.filename is not None:  # a fault of the machine or its files
        fault = printable(f"{os.fsdecode(error.filename)} cannot be used ({error.strerror}).")
        click.echo(f"emloc: error: {fault} Check it, and run the same command again.", err=True)
        sys.exit(1)
    click.echo(f"emloc: unexpected {printable(typed_line(error))} (emloc --debug ... shows where)", err=True)
    sys.exit(70)
