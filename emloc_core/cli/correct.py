"""``emloc correct``."""

from pathlib import Path
from typing import Any

import rich_click as click

from emloc_core.cli.console import announce, as_json, describe, dry_run, progress
from emloc_core.cli.options import adapter_on_base, options, validated
from emloc_core.cli.options import device as device_option
from emloc_core.settings import CorrectSettings


@click.command("correct")
@adapter_on_base("The model that the emulator was made from", "Directory of the result.")
@options(CorrectSettings)
@click.option("--emulator", type=click.Path(path_type=Path), help="Where the emulator is, if it was moved.")
@click.option("--selection", type=click.Path(path_type=Path), help="Other rows for --clamp auto to compare on.")
@device_option
@dry_run
@as_json
def command(
    adapter: Path,
    base: str,
    output: Path,
    emulator: Path | None,
    selection: Path | None,
    device: str,
    dry_run: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Carry the LoRA in ADAPTER, trained on an emulator, over to the base model.

    ADAPTER is left as it was; the result is a plain PEFT LoRA for the base.
    """
    from emloc_core.adapters.adapter import Adapter
    from emloc_core.adapters.correct import Transfer
    from emloc_core.files.checkpoint import open_checkpoint
    from emloc_core.files.output import read_manifest
    from emloc_core.model.device import choose_device

    chosen = validated(CorrectSettings, settings)
    job = Transfer(
        Adapter(adapter),
        open_checkpoint(base),
        output,
        chosen,
        emulator,
        selection,
        choose_device(device),
    )
    if dry_run:
        content = {
            "output": str(output),
            "linears": len(job.adapter.loras),
            "clamp": chosen.clamp,
            "selection_rows": len(job.samples),
            "base_bytes_read": job.bytes_to_read,
            "finished": job.output.is_finished(),
        }
        describe(content, as_json)
        return
    with progress("Correcting") as advance:
        directory = job.run(advance)
    result = (read_manifest(directory) or {})["result"]
    lines = [f"{result['linears']} Linears corrected with clamp {result['clamp']}"]
    lines += [
        f"  clamp {row['clamp']!s:<5} nll {row['nll']:.4f} on {row['rows']} held-out rows"
        + (" (uncorrected)" if row["clamp"] == 0 else "")
        for row in result.get("candidates", [])
    ]
    announce("correct", directory, lines, to_json=as_json)
