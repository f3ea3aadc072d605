"""Processor time until a command answers, its children's included, beside that of importing torch and transformers."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness import goal, markdown, write_results

RUNS = 3
PYTHON, EMLOC = [sys.executable, "-c"], [str(Path(sys.executable).with_name("emloc"))]
ENTRY = "meta-llama/Llama-3.1-8B"
RECIPE = '[model]\nbase = "base"\nmemory = "1GiB"\n[data]\ntrain = "rows.jsonl"\n[train]\nmax_length = 256\n'
#: Commands by what they are, with the most seconds that they are to take; the first three have no goal of their own.
COMMANDS: dict[str, tuple[list[str], float | None]] = {
    "python -c pass": ([*PYTHON, "pass"], None),
    "import torch, transformers": ([*PYTHON, "import torch, transformers"], None),
    "emloc train --help": ([*EMLOC, "train", "--help"], None),
    "import emloc_core": ([*PYTHON, "import emloc_core"], 0.1),
    "emloc --help": ([*EMLOC, "--help"], 0.4),
    "emloc families": ([*EMLOC, "families"], 0.4),
    "an unknown model type": ([*EMLOC, "plan", "odd"], 1.5),
    "a missing directory": ([*EMLOC, "compress", "missing", "--data", "rows.jsonl", "-o", "o"], 1.5),
    "a bad setting": ([*EMLOC, "train", "base", "--data", "rows.jsonl", "--batch-size", "0", "-o", "o"], 1.5),
    "a missing unit": ([*EMLOC, "plan", "base", "--memory", "12"], 1.5),
    "a wrong path of rows": ([*EMLOC, "train", "base", "--data", "none.jsonl", "-o", "o"], 1.5),
    "an unknown kind": ([*EMLOC, "plan", "base", "--kind", "six-bit"], 1.5),
    "emloc plan, a registry entry": ([*EMLOC, "plan", ENTRY], 3.0),
    "emloc plan, a registry entry, 12 GiB": ([*EMLOC, "plan", ENTRY, "--memory", "12GiB"], 3.0),
    "emloc plan, a local model": ([*EMLOC, "plan", "base", "--memory", "1GiB"], 3.0),
    "emloc run --dry-run": ([*EMLOC, "run", "recipe.toml", "--dry-run"], 6.0),
}
#: Those that keep what they find for the next time.
KEEPING = ("emloc plan", "emloc run")


def least_seconds(command: Sequence[str], place: Path, cache: Path | None) -> float:
    """Return the least processor time of several runs: what else the machine does makes it longer.

    Args:
        command: may fail, as an error of the user's does.
        place: working directory.
        cache: of what is kept between runs; None: a new one each time.
    """
    found = []
    for _ in range(RUNS):
        with TemporaryDirectory() as new:
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            environment = {**os.environ, "COLUMNS": "100", "EMLOC_CACHE": str(cache or new)}
            subprocess.run(command, cwd=place, env=environment, check=False, capture_output=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(found)


def main() -> None:
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as directory:
        place = Path(directory)
        (place / "odd").mkdir()
        (place / "odd" / "config.json").write_text('{"model_type": "odd"}')
        texts = (
            json.dumps({"prompt": f"Add one to {number}: ", "completion": str(number + 1)}) for number in range(200)
        )
        (place / "rows.jsonl").write_text("\n".join(texts))
        (place / "recipe.toml").write_text(RECIPE)
        write = f"from emloc_demo.model import write_base; write_base({str(place / 'base')!r})"
        subprocess.run([*PYTHON, write], check=True, stdout=subprocess.DEVNULL)
        for name, (command, allowed) in COMMANDS.items():
            times: dict[str, Path | None] = {name: None}
            if name.startswith(KEEPING):
                times = {f"{name}: for the first time": None, f"{name}: again": place / "cache"}
            for what, cache in times.items():
                seconds = least_seconds(command, place, cache)
                rows.append({"command": what, "seconds": seconds, "allowed": allowed})
                print(f"{seconds:6.2f} s  {what}", flush=True)
    imports = rows[1]["seconds"]
    table = markdown(
        ["command", f"processor seconds, least of {RUNS}", "x importing torch and transformers"],
        [[row["command"], f"{row['seconds']:.2f}", f"{row['seconds'] / imports:.2f}"] for row in rows],
    )
    goals = [
        goal(f"{row['command']}: processor seconds", f"at most {row['allowed']:g}", round(row["seconds"], 2),
             row["seconds"] <= row["allowed"])
        for row in rows if row["allowed"] is not None
    ]  # fmt: skip
    write_results("startup", "make bench-startup", rows, goals, table)


if __name__ == "__main__":
    main()
