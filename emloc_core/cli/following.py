"""The commands that usually follow a finished stage."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emloc_core.data.mixture import weights
from emloc_core.files.documents import read_config, read_object
from emloc_core.files.lora import CONFIG
from emloc_core.files.manifest import learned_preferences, read_manifest
from emloc_core.files.quantised import is_in_four_bits
from emloc_core.requests import (
    CompressRequest,
    CorrectRequest,
    EvaluateRequest,
    ImportRequest,
    MergeRequest,
    PolishRequest,
    Request,
    TrainRequest,
)
from emloc_core.stages.result import Result


def join(*words: object) -> str:
    """Return an ``emloc`` command as a line for a shell."""
    return shlex.join(["emloc", *map(str, words)])


def read_as(split: str, columns: Mapping[str, str]) -> list[str]:
    """Return the options that say how rows are read."""
    renamed = ",".join(f"{name}={column}" for name, column in columns.items())
    return [*([] if split == "train" else ["--split", split]), *(["--columns", renamed] if renamed else [])]


def following(request: Request, result: Result) -> list[str]:
    """Return the commands that usually follow a stage, the most usual one first."""
    output = result.path
    chat = join("chat", output)
    merge = join("merge", output, *_original(output), "-o", _beside(output, "merged"))
    commands: list[str] = []
    match request:
        case ImportRequest():
            commands = [join("plan", output, "--memory", "24GiB")]
        case CompressRequest():
            how = read_as(request.split, request.columns)
            how += [word for file in request.exclude for word in ("--exclude", str(file))]
            how += ["--skip-bad-rows"] if request.skip_bad_rows else []
            same = request.settings.model_dump(include={"loss", "max_length"}, exclude_unset=True)
            shape = result.result.get("tuning", {})
            how += flags(request.tuning.model_dump(exclude_unset=True) | same | shape)
            commands = [join("train", output, *rows(request.data), *how, "-o", _beside(output, "adapter"))]
        case TrainRequest(model=model) if _is_emulator(model):
            commands = [join("correct", output, "-o", _beside(output, "corrected"))]
        case TrainRequest() | PolishRequest():
            commands = [chat, merge]
        case CorrectRequest(adapter=adapter):
            polish = join("polish", output, *rows(None), "-o", _beside(output, "polished"))
            commands = [chat, *([] if learned_preferences(adapter) else [polish]), merge]
        case MergeRequest():
            commands = [chat]
        case EvaluateRequest(systems=systems):
            last = systems[-1]
            commands = [join("chat", last.model, *([last.adapter] if last.adapter else []))]
    return commands


def rows(data: Any) -> list[str]:
    """Return the options for rows: their sources by name, or else a placeholder file."""
    sources = {data: 1.0} if isinstance(data, str) else weights(data) or {"train.jsonl": 1.0}
    texts = [name if weight == 1 else f"{name}:{weight:g}" for name, weight in sources.items()]
    return [word for source in texts for word in ("--data", source)]


def flags(settings: Mapping[str, Any]) -> list[str]:
    """Return the options for settings."""
    options: list[str] = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            options.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            text = [f"{key}={item}" for key, item in value.items()] if isinstance(value, dict) else value
            options += [f"--{flag}", ",".join(map(str, text)) if isinstance(text, list) else str(text)]
    return options


def _beside(output: Path, name: str) -> Path:
    """Return a path for the next output, beside this one; not an existing one."""
    path = output.with_name(name)
    return path if not path.exists() else output.with_name(f"{output.name}-{name}")


def _original(adapter: Path) -> list[str]:
    """Return the option for the model that a LoRA is merged into, if its base is in four bits."""
    if not (adapter / CONFIG).is_file():
        return []
    config = Path(str(read_object(adapter / CONFIG).get("base_model_name_or_path")), "config.json")
    return ["--base", "ORIGINAL"] if config.is_file() and is_in_four_bits(read_config(config)) else []


def _is_emulator(model: str) -> bool:
    return Path(model).is_dir() and (read_manifest(Path(model)) or {}).get("kind") == "emulator"
