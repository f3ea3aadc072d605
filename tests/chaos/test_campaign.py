"""Runs a part of the campaign, and checks that it finds planted defects."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

from chaos.kernel import Call, is_supported
from chaos.syncs import unsynced

needs_kernel = pytest.mark.skipif(not is_supported(), reason="the kernel does not tell what processes do to files")


def campaign(*arguments):
    command = [sys.executable, "-m", "chaos", *arguments]
    return subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True, check=False)


@pytest.mark.thorough
@needs_kernel
@pytest.mark.slow
def test_a_part_of_the_campaign():
    stages = ["compress", "train", "correct", "polish", "merge", "import"]
    kinds = ["kills", "kills-before-another", "syncs", "signals", "disks", "writers", "changes"]
    chosen = [f"--stage={stage}" for stage in stages] + [f"--kind={kind}" for kind in kinds]
    done = campaign(*chosen, "--sample=10")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| all | 10 |" in done.stdout


def call(name, path, source=None, flags=0):
    return Call(name, Path(path), 0, 0, (0, flags, flags), Path(source) if source else None)


WRITTEN = [call("openat", "/c/.w/file", flags=0o101), call("write", "/c/.w/file")]
SYNCED = [call("fsync", "/c/.w/file"), call("fsync", "/c/.w")]
PUBLISHED = [call("rename", "/c/out", "/c/.w"), call("fsync", "/c")]


@pytest.mark.parametrize(
    ("calls", "late"),
    [
        (WRITTEN + SYNCED + PUBLISHED, set()),
        (WRITTEN + SYNCED[1:] + PUBLISHED, {"file"}),
        (WRITTEN + SYNCED[:1] + PUBLISHED, {".w"}),
        (WRITTEN + SYNCED + WRITTEN[1:] + PUBLISHED, {"file"}),
        (WRITTEN + PUBLISHED[:1] + SYNCED + PUBLISHED[1:], {"file", ".w"}),
        (WRITTEN + SYNCED + PUBLISHED[:1], {"its name"}),
        ([call("pwrite64", "/c/.w/#1 (deleted)"), *WRITTEN, *SYNCED, *PUBLISHED], set()),
    ],
)
def test_what_a_power_cut_would_leave(calls, late):
    assert unsynced(calls, Path("/c/out")) == late
