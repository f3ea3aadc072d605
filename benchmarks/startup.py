"""Time until the command line answers without a model, relative to an interpreter that does nothing."""

import os
import subprocess
import sys
import time
from pathlib import Path

from harness import goal, markdown, write_results

RUNS = 9
ALLOWED = 0.3  # seconds
EMLOC = [str(Path(sys.executable).with_name("emloc"))]
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "emloc --help": [*EMLOC, "--help"],
    "emloc families": [*EMLOC, "families"],
    "emloc train --help": [*EMLOC, "train", "--help"],
}


def best_seconds(command: list[str]) -> float:
    """Return the shortest of several runs: the others measure what else the machine did."""
    seconds = []
    for _ in range(RUNS):
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "COLUMNS": "100"})
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main() -> None:
    rows = [{"command": name, "seconds": best_seconds(command)} for name, command in COMMANDS.items()]
    for row in rows:
        row["above_interpreter"] = row["seconds"] - rows[0]["seconds"]
    table = markdown(
        ["command", f"seconds, best of {RUNS}", "above the interpreter"],
        [[row["command"], f"{row['seconds']:.3f}", f"{row['above_interpreter']:.3f}"] for row in rows],
    )
    goals = [
        goal(f"{row['command']}: seconds above the interpreter", f"at most {ALLOWED}",
             round(row["above_interpreter"], 3), row["above_interpreter"] <= ALLOWED)
        for row in rows[1:3]
    ]  # fmt: skip
    write_results("startup", "make bench-startup", rows, goals, table)


if __name__ == "__main__":
    main()
