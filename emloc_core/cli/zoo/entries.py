"""Shared by the registry's commands: the option for more entries, and tables."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import rich_click as click

from emloc_core.cli.console import print_table

more_entries = click.option(
    "--registry", type=click.Path(path_type=Path), multiple=True, metavar="PATH",
    help="An entry of your own, or a directory of entries, in addition to the registry; repeatable.",
)  # fmt: skip


def print_rows(columns: Mapping[str, Literal["left", "right"]], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: headings with the alignment of their column, and cells as they are."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, side in columns.items():
        shown.add_column(name, justify=side, overflow="fold")
    for row in rows:
        shown.add_row(*map(Text, row))  # an id in brackets is not markup
    print_table(shown)
