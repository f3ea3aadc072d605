"""Prints jobs for the zoo's commands."""

from collections import Counter
from typing import TYPE_CHECKING

from emloc_core.units import counted, human_bytes, human_seconds

if TYPE_CHECKING:
    from emloc_core.zoo.state.record import JobRecord


def line(record: "JobRecord") -> str:
    """Return the details to print after a job's state."""
    if record.state == "duplicate":
        return f"the same as {record.duplicate_of}"
    if not record.attempts:
        return ""
    last = record.attempts[-1]
    if record.state == "done" and "bytes" in record.result:
        sizes = record.result["bytes"]
        return f"{human_bytes(sizes['base'])} -> {human_bytes(sizes['emulator'])} in {human_seconds(last.seconds or 0)}"
    if record.state in ("running", "interrupted"):
        return f"attempt {last.number}, {last.log}"
    return f"{last.cause}: {last.message} ({last.log})" if last.cause else ""


def totals(records: "list[JobRecord]") -> str:
    """Return the number of jobs in each state."""
    if not records:
        return "no jobs yet"  # they are planned first
    counts = Counter(record.state for record in records)
    return f"{counted(len(records), 'job')}: " + ", ".join(f"{count} {state}" for state, count in counts.items())
