"""The commands that usually follow a finished stage."""

import shlex
from pathlib import Path

from emloc_core.files.output import learned_preferences, read_manifest
from emloc_core.requests import (
    CompressRequest,
    CorrectRequest,
    CutRequest,
    EvaluateRequest,
    ImportRequest,
    MergeRequest,
    PolishRequest,
    Request,
    TrainRequest,
)
from emloc_core.result import Result


def following(request: Request, result: Result) -> list[str]:
    """Return the commands that usually follow a stage, the most usual one first.

    Args:
        request: what the stage was asked for.
        result: its finished output.
    """
    output = result.path
    chat = _command("chat", output)
    merge = _command("merge", output, "-o", _beside(output, "merged"))
    found: list[str] = []
    match request:
        case ImportRequest():
            found = [_command("plan", output, "--memory", "24GiB")]
        case CompressRequest() | CutRequest():
            data = getattr(request, "data", None)
            rows = data if isinstance(data, str) else "train.jsonl"
            found = [_command("train", output, "--data", rows, "-o", _beside(output, "adapter"))]
        case TrainRequest(model=model) if _is_emulator(model):
            found = [_command("correct", output, "-o", _beside(output, "corrected"))]
        case TrainRequest() | PolishRequest():
            found = [chat, merge]
        case CorrectRequest(adapter=adapter):
            polish = _command("polish", output, "--data", "train.jsonl", "-o", _beside(output, "polished"))
            found = [chat, *([] if learned_preferences(adapter) else [polish]), merge]
        case MergeRequest():
            found = [chat]
        case EvaluateRequest(systems=systems):
            last = systems[-1]
            found = [_command("chat", last.model, *([last.adapter] if last.adapter else []))]
    return found


def _command(*words: str | Path) -> str:
    return shlex.join(["emloc", *map(str, words)])


def _beside(output: Path, name: str) -> Path:
    """Return a path for the next output, beside this one; not one that is there already."""
    place = output.with_name(name)
    return place if not place.exists() else output.with_name(f"{output.name}-{name}")


def _is_emulator(model: str) -> bool:
    return Path(model).is_dir() and (read_manifest(Path(model)) or {}).get("kind") == "emulator"
