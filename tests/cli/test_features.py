"""The table of what people expect names commands and options that exist."""

import re
import shlex

import click
import pytest
from support.paths import DOCS

from emloc_core.cli import cli

TABLE = (DOCS / "compare.md").read_text(encoding="utf-8").partition("## What people expect")[2]
COMMANDS = re.findall(r"`(emloc [^`]+)`", TABLE)


def test_it_has_twenty_five_features():
    rows = re.findall(r"^\| .* \|$", TABLE, re.MULTILINE)[2:]
    assert len(rows) == 25
    assert sum("`emloc" not in row for row in rows) <= 3  # resuming, and what is not there


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_exists_with_its_options(line: str) -> None:
    _, name, *arguments = shlex.split(line)
    with click.Context(cli) as context:
        command = cli.get_command(context, name)
    assert command is not None
    with click.Context(command) as context:
        command.make_parser(context).parse_args(arguments)
