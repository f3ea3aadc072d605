"""Inputs that change while a stage runs."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from chaos.cases import Case, on_call, spread
from chaos.judge import finish, require_same, succeeded
from chaos.kernel import Call
from chaos.results import Verdict
from chaos.stages import Bench, Reference, Stage
from chaos.supervise import Run

_SHARDS = {
    "base": "base/model-00002-of-00003.safetensors",
    "emulator": "emulator/model-00002-of-00004.safetensors",
    "adapter": "adapter/adapter_model.safetensors",
    "corrected adapter": "corrected/adapter_model.safetensors",
    "foreign model": "foreign/model-00001-of-00002.safetensors",
}


@dataclass(frozen=True)
class Change:
    """A change of an input.

    Attributes:
        name: what is changed.
        stages: those that read the input.
        apply: makes it, below the directory of the good inputs.
    """

    name: str
    stages: tuple[str, ...]
    apply: Callable[[Path], None]


def _other_weights(path: Path) -> bytes:
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    for at_byte in range(start + 2, len(content), 4):
        content[at_byte] ^= 0x20  # of the mantissa: the numbers stay finite
    return bytes(content)


def _replace(name: str, good: Path) -> None:
    new = (good / name).with_suffix(".new")
    new.write_bytes(_other_weights(good / name))
    new.replace(good / name)


def _overwrite(name: str, good: Path) -> None:
    path = good / name
    status = path.stat()
    path.write_bytes(_other_weights(path))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _remove(name: str, good: Path) -> None:
    (good / name).unlink()


def _configure(good: Path) -> None:
    path = good / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 1e-4}), encoding="utf-8")


def _scale(name: str, good: Path) -> None:
    path = good / name / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 64}), encoding="utf-8")


_USES = {
    "base": ("compress", "correct", "merge"),
    "emulator": ("train", "correct"),
    "adapter": ("correct",),
    "corrected adapter": ("merge",),
    "foreign model": ("import",),
}
_DONE = {"replaced": _replace, "overwritten, its time set back": _overwrite, "removed": _remove}
CHANGES = [
    *(
        Change(f"a shard of the {name} {done}", _USES[name], partial(apply, shard))
        for done, apply in _DONE.items()
        for name, shard in _SHARDS.items()
    ),
    Change("the base's config changed", _USES["base"], _configure),
    Change("the adapter's scale changed", ("correct",), partial(_scale, "adapter")),
    Change("the corrected adapter's scale changed", ("merge",), partial(_scale, "corrected")),
]


def changing_inputs(bench: Bench, stage: Stage, most: int | None) -> Iterator[Case]:
    """Change each input of a stage before calls; it has to notice, or to have read all of it already."""
    calls = bench.reference(stage.command).run.calls
    for change in CHANGES:
        if stage.name not in change.stages:
            continue
        for number in spread(len(calls), most):
            name = f"{stage.name}, {change.name} before call {number} ({calls[number - 1]})"
            yield Case("an input changes", name, partial(_change, stage, change, number))
        yield Case("an input changed since", f"{stage.name}, {change.name}", partial(_changed_since, stage, change))


def _change(stage: Stage, change: Change, number: int, bench: Bench) -> Verdict:
    before = bench.reference(stage.command)
    after = _with(bench, stage, change)
    directory = bench.new_directory()

    def apply(_run: Run, _call: Call) -> None:
        change.apply(bench.good)

    try:
        if succeeded(bench.run(stage.command, directory, on_call(number, apply))):
            require_same(directory, before, after)
            return Verdict.WHOLE
    finally:
        bench.restore()
    finish(bench, stage.command, directory, before)
    return Verdict.REFUSED


def _changed_since(stage: Stage, change: Change, bench: Bench) -> Verdict:
    """The output exists, and is not what the command would make now."""
    directory = bench.new_directory()
    bench.run(stage.command, directory)
    change.apply(bench.good)
    try:
        if succeeded(bench.run(stage.command, directory)):
            require_same(directory, _with(bench, stage, change))
            return Verdict.WHOLE
    finally:
        bench.restore()
    finish(bench, stage.command, directory, bench.reference(stage.command))
    return Verdict.REFUSED


def _with(bench: Bench, stage: Stage, change: Change) -> Reference:
    """Return what the stage makes of the changed inputs, if it takes them."""
    key = f"{stage.command} # {change.name}"
    if key not in bench.references:
        change.apply(bench.good)
        bench.references[key] = bench.reference_now(stage.command)
        bench.restore()
    return bench.references[key]
