"""Shared by the benchmarks: one process per measurement, the machine, and results as JSON and Markdown.

Run as a script, it is the other end of :func:`in_process`.
"""

import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from emloc_core.files.meter import peak_rss_bytes
from emloc_core.files.output import versions
from emloc_core.processes.environment import VARIABLES

RESULTS = Path(__file__).parent / "results"


def in_process(work: Callable[..., dict[str, Any]] | str, *args: Any, env: dict[str, str] | None = None) -> Any:
    """Do ``work`` in a fresh Python process and return what it gives.

    Args:
        work: a function at the top of a module, called with ``args`` (of JSON values, or paths, which become strings);
            or the text of a script, which finds them in ``sys.argv`` and prints one line of JSON last.
        args: as above.
        env: environment variables beside those of this process.

    Returns:
        The function's dictionary with ``peak_rss_bytes`` of its process, unless it has its own; or what the script
        printed.
    """
    if isinstance(work, str):
        command = ["-c", work, *map(str, args)]
    else:
        command = [__file__, work.__code__.co_filename, work.__name__, json.dumps(args, default=str)]
    environment = {**VARIABLES, **os.environ, **(env or {})}
    run = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, text=True, check=False, env=environment)
    if run.returncode:
        sys.exit(f"{work if isinstance(work, str) else work.__name__} {args} failed with {run.returncode}.")
    return json.loads(run.stdout.splitlines()[-1])


def resident_bytes() -> int:
    """Return the resident set of this process now, in bytes: just after the imports, what the interpreter needs."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def goal(name: str, goal: Any, value: Any, met: bool) -> dict[str, Any]:
    """Return an entry of a result's ``goals``: what was aimed at, what was measured, and whether it was reached."""
    return {"name": name, "goal": goal, "value": value, "met": bool(met)}


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a Markdown table; numbers stand right."""
    numeric = [all(not isinstance(row[column], str) for row in rows) for column in range(len(header))]
    lines = [header, ["---:" if right else "---" for right in numeric], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def machine() -> dict[str, Any]:
    """Return what the figures depend on: processors, memory, graphics card."""
    import torch

    info = Path("/proc/cpuinfo")
    models = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return {
        "cpus": os.cpu_count(),
        "cpu": models[0] if models else platform.processor(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def write_results(
    name: str, command: str, rows: Sequence[dict[str, Any]], goals: Sequence[dict[str, Any]], table: str, **more: Any
) -> None:
    """Print a benchmark's table and goals, and write ``results/NAME.json`` and ``results/NAME.md``.

    Args:
        name: of the benchmark.
        command: that makes these figures again.
        rows: the measurements.
        goals: see :func:`goal`.
        table: Markdown; the goals are added below it.
        more: what else the JSON holds.
    """
    verdicts = [[entry["name"], entry["goal"], entry["value"], "yes" if entry["met"] else "**no**"] for entry in goals]
    text = f"{table}\n\n{markdown(['goal', 'aimed at', 'measured', 'reached'], verdicts)}\n"
    document = {
        **more,
        "command": command,
        "machine": machine(),
        "versions": versions(),
        "rows": list(rows),
        "goals": list(goals),
    }
    RESULTS.mkdir(exist_ok=True)
    for kind, content in (("json", json.dumps(document, indent=2) + "\n"), ("md", text)):
        new = RESULTS / f".{name}.{kind}.new"
        new.write_text(content, encoding="utf-8")
        new.replace(RESULTS / f"{name}.{kind}")  # at once, so that a kill leaves what was there
    print(text)


def _serve(file: str, function: str, arguments: str) -> None:
    specification = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    measurement = getattr(module, function)(*json.loads(arguments))
    print(json.dumps({"peak_rss_bytes": peak_rss_bytes(), **measurement}))


if __name__ == "__main__":
    _serve(*sys.argv[1:])
