"""``emloc cut``."""

from pathlib import Path
from typing import Any

import rich_click as click

from emloc_core.cli.console import announce, as_json, dry_run, print_json, progress
from emloc_core.cli.emulators import size_lines, sizes, summary
from emloc_core.cli.options import options, validated
from emloc_core.settings import CutSettings


@click.command("cut")
@click.argument("spectra", type=click.Path(path_type=Path))
@click.option("--base", required=True, help="The model that the spectra were made from: directory or hub id.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Directory of the emulator.")
@options(CutSettings)
@dry_run
@as_json
def command(spectra: Path, base: str, output: Path, dry_run: bool, as_json: bool, **settings: Any) -> None:
    """Cut an emulator of any ratio from SPECTRA, which compress --keep-spectra made, without calibrating again.

    Up to rounding it is the emulator that compress makes at that ratio. An interrupted cut goes on where it stopped.
    """
    from emloc_core.emulator.cut import Cut
    from emloc_core.emulator.spectra import Spectra
    from emloc_core.files.checkpoint import open_checkpoint

    job = Cut(Spectra(spectra), open_checkpoint(base), output, validated(CutSettings, settings))
    if dry_run:
        if as_json:
            print_json({**sizes(job), "finished": job.output.is_finished()})
            return
        for line in size_lines(job):
            click.echo(line)
        return
    with progress("Cutting") as advance:
        directory = job.run(advance)
    announce("cut", directory, summary(directory), to_json=as_json)
