"""The demo's texts: what a stage is doing and why, and its outcome."""

from collections.abc import Mapping
from typing import Any

from emloc_core.files.documents import read_json
from emloc_core.stages.progress import ProgressEvent
from emloc_core.stages.result import Result
from emloc_core.units import human_bytes, human_seconds

#: What each stage is doing before its first progress.
BEGINNING = {
    "compress": "reading the model, and messages that the emulator is fitted to",
    "train": "loading the emulator: training needs nothing of the model",
    "correct": "which correction serves the model best? asking held-out messages",
    "eval": "loading the model, to ask it messages that it has not seen",
}


def happening(event: ProgressEvent) -> str:
    """Return what a stage is doing, and why, in one line."""
    current, total = min(event.step + 1, event.total), event.total
    remaining = f" ({human_seconds(event.seconds_left)} left)" if event.seconds_left else ""
    match event.stage:
        case "compress":
            return f"fitting block {current} of {total} to reproduce the model's outputs{remaining}"
        case "train":
            loss = "" if event.loss is None else f", loss {event.loss:.2f}"
            return f"step {event.step} of {total} on the emulator alone{loss}{remaining}"
        case "eval" if event.what:
            return f"asking {event.what}, {current} of {total}: which answers are right?"
        case "eval":
            return "counting the right answers"
    return BEGINNING.get(event.stage, event.stage)


def outcome(stage: str, result: Result) -> str:
    """Return the outcome of a stage in one line."""
    content, settings = result.result, result.manifest["request"].get("settings", {})
    match stage:
        case "compress":
            sizes = content["bytes"]
            return f"{settings['kind']} emulator, {human_bytes(sizes['emulator'])} of {human_bytes(sizes['base'])}"
        case "train":
            losses = [entry["loss"] for entry in read_json(result.path / "log.json") if "loss" in entry]
            return f"{content['steps']} steps on the emulator, loss {losses[0]:.2f} to {losses[-1]:.2f}"
        case "correct":
            return f"LoRA on the model: {how_corrected(content)}"
    return f"{len(content)} systems asked {read_json(result.path / 'results.json')['tasks']['right']['rows']} messages"


def how_corrected(correction: Mapping[str, Any]) -> str:
    """Return how a LoRA was corrected: what did best on held-out rows."""
    if correction["scale"] != 1:
        return f"scaled by {correction['scale']:g}"
    return "unchanged, which did best" if correction["clamp"] == 0 else f"corrected with clamp {correction['clamp']}"


def decision(plan: Mapping[str, Any]) -> str:
    """Return what a plan decided, in one line.

    Args:
        plan: what ``emloc plan --json`` says.
    """
    ordinary, *_ = plan["ways"]
    best = next((way for way in plan["ways"] if way["name"] == plan["best"] and way["fits"]), None)
    needs = f"an ordinary LoRA needs {human_bytes(ordinary['bytes'])}"
    if best is None:
        return f"{needs}: nothing fits"
    if best["kind"] is None:
        return f"{needs}: no emulator is needed"
    return f"{needs}: too much; on an {best['kind']} emulator {human_bytes(best['bytes'])}"
