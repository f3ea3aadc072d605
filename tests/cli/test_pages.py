"""The pages name commands and options that exist."""

import re
import shlex

import click
import pytest
from support.paths import DOCS, ROOT

from emloc_core.cli import cli

#: A command on a line of its own, or in a sentence.
WRITTEN = re.compile(r"^(?:\$ )?(emloc .+?)(?:\s+#.*)?$|`(emloc [^`]+)`", re.MULTILINE)
PAGES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *DOCS.glob("*.md"))}
COMMANDS = {
    line or span
    for text in PAGES.values()
    for line, span in WRITTEN.findall(text.replace("\\\n", " "))
    if "..." not in line + span and "COMMAND" not in line + span
}


def test_what_people_expect_is_twenty_five_features():
    rows = re.findall(r"^\| .* \|$", PAGES["compare.md"].partition("## What people expect")[2], re.MULTILINE)[2:]
    assert len(rows) == 25
    assert sum("`emloc" not in row for row in rows) <= 3  # resuming, and what is not there


@pytest.mark.parametrize("line", sorted(COMMANDS))
def test_every_command_exists_with_its_options(line: str) -> None:
    command: click.Command | None = cli
    rest = shlex.split(line)
    while rest and isinstance(command, click.Group):
        with click.Context(command) as context:
            _, rest, _ = command.make_parser(context).parse_args(rest[1:])
            command = command.get_command(context, rest[0]) if rest else command
    assert command is not None
    if rest[1:]:
        with click.Context(command) as context:
            command.make_parser(context).parse_args(rest[1:])
