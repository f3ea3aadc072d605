"""The results of the cases, in one table."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


class Verdict(StrEnum):
    """The outcome of a case. The last two are defects."""

    WHOLE = "whole"
    RESUMED = "resumed identically"
    REFUSED = "refused with a sentence"
    WRONG = "wrong"
    UNEXPECTED = "unexpected"


FAILED = (Verdict.WRONG, Verdict.UNEXPECTED)


@dataclass(frozen=True)
class Result:
    """One case.

    Attributes:
        kind: the row of the table.
        case: what was done, where.
        verdict: its outcome.
        why: the reason, where that is a defect.
    """

    kind: str
    case: str
    verdict: Verdict
    why: str = ""

    def __str__(self) -> str:
        return f"{self.verdict}: {self.kind}: {self.case}: {self.why}"


def counts(results: Iterable[Result]) -> dict[str, Counter[Verdict]]:
    """Return how many cases of each kind had which verdict."""
    tallies: dict[str, Counter[Verdict]] = {}
    for result in results:
        tallies.setdefault(result.kind, Counter())[result.verdict] += 1
    return tallies


def markdown(tallies: Mapping[str, Counter[Verdict]]) -> str:
    """Return the table, with a last row of sums."""
    rows = {**tallies, "all": sum(tallies.values(), Counter())}
    lines = [
        f"| kind | tried | {' | '.join(Verdict)} |",
        f"| --- | ---: | {' | '.join(['---:'] * len(Verdict))} |",
        *(
            f"| {kind} | {row.total()} | {' | '.join(str(row[verdict]) for verdict in Verdict)} |"
            for kind, row in rows.items()
        ),
    ]
    return "\n".join(lines) + "\n"


def write(path: Path, results: list[Result]) -> None:
    """Write the table as JSON, and the cases that failed."""
    failed = [
        {"kind": result.kind, "case": result.case, "verdict": result.verdict, "why": result.why}
        for result in results
        if result.verdict in FAILED
    ]
    kinds = {
        kind: {"tried": row.total(), **{verdict: row[verdict] for verdict in Verdict}}
        for kind, row in counts(results).items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"kinds": kinds, "failed": failed}, indent=2) + "\n", encoding="utf-8")
