"""What the commands that make emulators say of one."""

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emloc_core.report.towers import place, short_names
from emloc_core.units import human_bytes

if TYPE_CHECKING:
    from emloc_core.emulator.compress import Compression
    from emloc_core.emulator.cut import Cut


def sizes(job: "Compression | Cut") -> dict[str, Any]:
    """Return what a dry run knows of an emulator, as JSON values."""
    before, after = job.plan.parameters()
    return {
        "output": str(job.output.path),
        "family": job.family.name,
        "base_bytes": job.base.nbytes,
        "emulator_bytes": job.base.nbytes - (before - after) * job.skeleton.dtype.itemsize,
        "linears": [linear.describe() for linear in job.plan.linears],
        "kept_dense": [vars(kept) for kept in job.plan.kept],
    }


def size_lines(job: "Compression | Cut") -> list[str]:
    """Return the same for a person."""
    known = sizes(job)
    return [
        f"{job.base.directory}: family {job.family.name}, {human_bytes(known['base_bytes'])}",
        f"emulator: {human_bytes(known['emulator_bytes'])}; {len(job.plan.ranks)} Linears at these ranks:",
        *(f"  {line}" for line in job.plan.lines()),
    ]


def summary(directory: Path) -> list[str]:
    """Return what a person wants to know of a finished emulator."""
    from emloc_core.files.output import read_manifest

    result = (read_manifest(directory) or {})["result"]
    errors: dict[tuple[str, str], list[float]] = defaultdict(list)
    for linear in result["linears"]:
        if linear["relative_error"] is not None:
            tower, _, kind = place(linear["path"])
            errors[tower, kind].append(linear["relative_error"])
    names = short_names(list(dict.fromkeys(tower for tower, _ in errors)))
    kinds = [(f"{names[tower]} {kind}".strip(), of) for (tower, kind), of in errors.items()]
    lines = ["relative output error on the calibration rows (mean, worst):"]
    width = max((len(kind) for kind, _ in kinds), default=0)
    lines += [f"  {kind:<{width}} {sum(of) / len(of):.3f}  {max(of):.3f}" for kind, of in kinds]
    lines.append(f"base {human_bytes(result['bytes']['base'])} -> emulator {human_bytes(result['bytes']['emulator'])}")
    return lines
