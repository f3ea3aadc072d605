"""``emloc merge``."""

from pathlib import Path

import rich_click as click

from emloc_core.cli.console import announce, as_json, describe, dry_run, progress
from emloc_core.cli.options import adapter_on_base
from emloc_core.units import human_bytes


@click.command("merge")
@adapter_on_base("The model that the adapter is for", "Directory of the checkpoint.")
@click.option("--allow-uncorrected", is_flag=True, help="Merge an adapter as it was trained on an emulator.")
@dry_run
@as_json
def command(
    adapter: Path,
    base: str,
    output: Path,
    allow_uncorrected: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Fold ADAPTER into the base: an ordinary checkpoint of the original architecture.

    Written shard by shard; tensors without a LoRA keep their bytes, and every tensor keeps its name.
    """
    from emloc_core.adapters.adapter import Adapter
    from emloc_core.adapters.merge import Merge
    from emloc_core.files.checkpoint import open_checkpoint

    job = Merge(
        Adapter(adapter),
        open_checkpoint(base),
        output,
        allow_uncorrected=allow_uncorrected,
    )
    if dry_run:
        content = {
            "output": str(output),
            "linears": len(job.loras) + len(job.untied),
            "bytes": job.base.nbytes,
            "shards": len(job.base.shards),
            "finished": job.output.is_finished(),
        }
        describe(content, as_json)
        return
    with progress("Merging") as advance:
        directory = job.run(advance)
    lines = [f"{len(job.loras) + len(job.untied)} Linears merged into {human_bytes(job.base.nbytes)}"]
    announce("merge", directory, lines, to_json=as_json)
