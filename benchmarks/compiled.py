"""What the compiled code of Triton's kernels takes on cards that are not at hand: registers, spills, widths, bytes.

Every kernel is compiled as it is launched, see ``tests/support/kernels.py``; ptxas, which Triton brings along, says
what registers it takes. Bytes per weight are those of codes, scales and the matrix, each moved once; the time is theirs
at the bandwidth that is published for a card of the target, so it is a lower bound: nothing has been run.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from harness import goal, markdown, write_results

#: A card of each target, and its published bandwidth in bytes per second.
CARDS = {
    "75": ("T4", 320e9), "80": ("A100 80GB", 2039e9), "86": ("RTX 3090", 936e9), "89": ("RTX 4090", 1008e9),
    "90": ("H100", 3350e9), "100": ("B200", 8000e9), "120": ("RTX 5090", 1792e9), "gfx942": ("MI300X", 5300e9),
}  # fmt: skip
#: Shared memory that a program of any of them may have.
SHARED = 48 << 10
MOST = 2.35
#: Whose bytes and times count.
WHOLE = "14336 x 4096"
HEADER = ["kernel", "instantiation", "target", "registers", "spilled", "shared", "loads", "stores", "bytes per weight",
          "card", "microseconds"]  # fmt: skip


def measured() -> list[dict[str, Any]]:
    """Return a row for every kernel, as it is launched, and target."""
    root = Path(__file__).parents[1]
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-W", "ignore", "-m", "support.kernels", *CARDS]
    out = subprocess.run(
        command, cwd=root / "tests", env=environment, stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    rows = [json.loads(line) for line in out.splitlines()]
    for row in rows:
        if WHOLE in row["instantiation"]:
            row["bytes_per_weight"] = round(row["bytes"] / row["weights"], 3)
            row["microseconds"] = round(row["bytes"] / CARDS[row["target"]][1] * 1e6, 1)
    return rows


def widths(moves: dict[str, int] | None) -> str:
    """Return how many loads or stores of how many bytes a thread does, in words."""
    if moves is None:
        return "unread"
    return ", ".join(f"{count} of {size}" for size, count in sorted(moves.items(), key=lambda item: -int(item[0])))


def main() -> None:
    rows = measured()
    lines = [
        [row["kernel"], row["instantiation"], row["target"], row["registers"], row["spilled"], row["shared"],
         widths(row.get("loads")), widths(row.get("stores")), row.get("bytes_per_weight", ""),
         CARDS[row["target"]][0], row.get("microseconds", "")]
        for row in rows
    ]  # fmt: skip
    halves = [row for row in rows if "bytes_per_weight" in row and not row["instantiation"].startswith("fp32")]
    goals = [
        goal("bytes that any kernel spills", 0, most := max(row["spilled"] for row in rows), most == 0),
        goal("shared memory, bytes", f"at most {SHARED}", most := max(row["shared"] for row in rows), most <= SHARED),
    ]
    for name in "trellis", "levels":
        most = max(row["bytes_per_weight"] for row in halves if row["kernel"] == name)
        goals.append(goal(f"bytes per weight of {name} in 16 bits", f"at most {MOST}", most, most <= MOST))
        stored = [size for row in halves if row["kernel"] == name for size in map(int, row.get("stores", {}))]
        goals.append(goal(f"bytes of a store of {name} in 16 bits", 16, min(stored), min(stored) == 16))
    write_results("compiled", "make bench-compiled", rows, goals, markdown(HEADER, lines))


if __name__ == "__main__":
    main()
