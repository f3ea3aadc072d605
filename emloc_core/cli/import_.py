"""``emloc import``."""

from pathlib import Path

import rich_click as click

from emloc_core.cli.console import announce, as_json, describe, dry_run, progress
from emloc_core.units import human_bytes


@click.command("import")
@click.argument("source")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Directory of the checkpoint.")
@dry_run
@as_json
def command(source: str, output: Path, dry_run: bool, as_json: bool) -> None:
    """Rewrite SOURCE, a directory or hub id, as transformers' own classes have it, for the other commands.

    For checkpoints that came with code of their own, in a layout that an installed plugin reads. That code is never
    run. Written shard by shard; an interrupted import goes on where it stopped.
    """
    from emloc_core.files.checkpoint import open_checkpoint
    from emloc_core.model.importing import Import

    job = Import(open_checkpoint(source), output)
    if dry_run:
        content = {
            "output": str(output),
            "layout": job.layout.name,
            "model_type": job.config["model_type"],
            "tensors": len(job.source.tensors),
            "split": job.splits,
            "bytes": job.source.nbytes,
            "shards": len(job.source.shards),
            "finished": job.output.is_finished(),
        }
        describe(content, as_json)
        return
    with progress("Importing") as advance:
        directory = job.run(advance)
    line = f"{job.layout.name} to {job.config['model_type']}: {human_bytes(job.source.nbytes)}, {job.splits} split"
    announce("import", directory, [line], to_json=as_json)
