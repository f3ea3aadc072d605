"""A finished run as files, without a model, for tests of the run page."""

import json
from pathlib import Path
from typing import Any

HOSTILE = "<script>document.title = 'broken in'</script>&\"'"


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def finished_run(directory: Path) -> Path:
    """Two towers, a Linear that stayed dense, all stages of a recipe, and a name that no page may run."""
    linears = [
        {"path": f"{tower}.{block}.mlp.{name}", "relative_error": None if (block, name) == (1, "down_proj") else error}
        for tower in ("model.layers", "vision.blocks")
        for block in range(4)
        for name, error in (("up_proj", 0.1 + block / 10), ("down_proj", 0.2))
    ]
    compared = [{"clamp": 0, "scale": 1.0}, {"clamp": 3, "scale": 1.0}, {"clamp": 0, "scale": 0.85}]
    results = {
        "emulator": {"bytes": {"base": 2_000_000_000, "emulator": 600_000_000}, "linears": linears},
        "adapter": {},
        "corrected": {**compared[2], "candidates": [
            {**candidate, "nll": 1.5 - index / 10, "gain": index / 2, "gain_stderr": 0.1, "rows": 32}
            for index, candidate in enumerate(compared)
        ]},
        "polished": {},
        "full_lora": {},
        "full_lora_60": {},
        "evaluation": {},
    }  # fmt: skip
    compress_settings = {"kind": "low-rank", "ratio": 0.6, "lora_rank": 8}
    for index, (name, result) in enumerate(results.items()):
        settings = {"settings": {"learning_rate": 0.001, "extra": {}, "note": HOSTILE, **compress_settings}}
        inputs = {"base": "/home/someone/models/base-1b", "data": HOSTILE}
        versions = {"emloc": "0.2.0", "torch": "2.13.0", "device": "cpu"}
        content = {"request": settings, "result": result, "inputs": inputs, "versions": versions}
        write(directory / name / "emloc.json", content)
        write(directory / name / "timing.json", {"seconds": 60.0 * index, "peak_rss_bytes": (index + 1) * 10**9})
    for name in ("adapter", "polished", "full_lora"):
        log = [{"step": step, "loss": 2.0 / step, "learning_rate": 0.001} for step in range(1, 21)]
        evaluated = [{"step": step, "eval_loss": 1.5 / step, "eval_base_loss": 1.8 / step} for step in (5, 10, 15, 20)]
        if name == "polished":
            log = [{**entry, "rewards/margins": entry["step"] / 10} for entry in log]
        write(directory / name / "log.json", log + evaluated)
    write(directory / "answers.json", {"answers": [dict.fromkeys(("prompt", "expected", "before", "after"), HOSTILE)]})
    systems = {"base": {"nll": 1.5, "accuracy": 0.25}, HOSTILE: {"nll": 0.5, "accuracy": 0.75}}
    write(directory / "results.json", {
        "systems": systems,
        "stderr": {"base": {"nll": 0.05, "accuracy": None}},
        "metrics": {"nll": {"higher_is_better": False}, "accuracy": {"higher_is_better": True}},
        "tasks": {},
    })  # fmt: skip
    return directory
