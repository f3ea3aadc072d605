"""Trains with the batch that an emulator was planned for, unless the user gives another."""

import click

from emloc_core.files.checkpoint import Checkpoint
from emloc_core.files.manifest import read_manifest
from emloc_core.settings import StepSettings, TrainSettings

#: What a plan decides about a step. An emulator that was made for a memory has it in its manifest.
SHAPE = ("batch_size", "accumulation", "max_length")


def as_planned(settings: TrainSettings, model: Checkpoint) -> TrainSettings:
    """Return settings with the batch and the length that an emulator was planned for, unless they set one of these."""
    found = ((read_manifest(model.directory) or {}).get("result") or {}).get("tuning")
    if not isinstance(found, dict) or settings.model_fields_set & set(SHAPE):
        return settings
    planned = StepSettings(learning_rate=None, **{name: found[name] for name in SHAPE if name in found})
    length = "" if planned.max_length is None else f" of at most {planned.max_length} tokens"
    click.echo(
        f"{planned.batch_size} x {planned.accumulation} rows{length} per step, as the emulator was planned for",
        err=True,
    )
    return settings.model_copy(update=planned.model_dump(include=set(SHAPE), exclude_unset=True))
