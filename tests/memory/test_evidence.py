"""What plans say of the kinds of emulator is what the benchmark of quality has measured."""

import json
from statistics import mean

import pytest
from support.paths import ROOT

from emloc_core.kinds import RECOMMENDED
from emloc_core.memory.evidence import RECOVERY

TASKS = ("extraction", "classification", "arithmetic")


@pytest.mark.parametrize("kind", RECOVERY)
def test_plans_say_what_was_measured(kind):
    rows = json.loads((ROOT / "benchmarks/results/quality.json").read_text())["recovery"]
    for system, told in zip(("auto", "polish20"), RECOVERY[kind], strict=True):
        measured = {row["task"]: row["mean"] for row in rows if row["system"] == f"{kind}+{system}"}
        found = [measured[task] for task in TASKS]
        assert told == pytest.approx(mean(found), abs=0.005)


def test_recommended_kinds_are_ordered_by_what_they_gave():
    measured = [RECOVERY[name].corrected for name in RECOMMENDED if name in RECOVERY]
    assert measured == sorted(measured, reverse=True)
