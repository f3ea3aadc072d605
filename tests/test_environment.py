"""What other libraries are told: environment variables, and to keep quiet."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

from emloc_core.errors import EmlocError
from emloc_core.processes.call import call, called_here
from emloc_core.processes.environment import VARIABLES, settle
from emloc_core.zoo.engines.engine import environment
from emloc_core.zoo.jobs.job import ZooJob


def variables() -> dict[str, str | None]:
    """Return the settings as this process finds them."""
    return {name: os.environ.get(name) for name in VARIABLES}


def child_variables() -> dict[str, str | None]:
    """Return the settings as a process that this one starts finds them."""
    return {name: next(call("os:getenv", {"key": name})) for name in VARIABLES}


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the settings out of the environment."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("unset")
def test_they_are_set_everywhere() -> None:
    assert child_variables() == VARIABLES
    assert environment(ZooJob(name="x", model="x"), {}).items() >= VARIABLES.items()
    settle()
    assert variables() == VARIABLES


@pytest.mark.usefixtures("unset")
def test_what_the_user_sets_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    mine = {**VARIABLES, "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256"}
    assert child_variables() == mine
    assert environment(ZooJob(name="x", model="x"), dict(os.environ)).items() >= mine.items()
    settle()
    assert variables() == mine


def test_make_sets_them_too() -> None:
    """Before Python starts: OpenMP reads its variables when torch is imported."""
    exported = re.findall(r"^export (\w+) \?= (\w+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert dict(exported) == VARIABLES


def test_a_child_keeps_back_what_no_one_can_act_on(tmp_path: Path) -> None:
    log = tmp_path / "said"
    for name, words in (("bitsandbytes.backends.cpu.ops", ""), ("bitsandbytes", "install something\n")):
        warn = f"logging.getLogger({name!r}).warning('install something')"
        list(call("timeit:timeit", {"stmt": warn, "setup": "import logging", "number": 1}, log=log))
        assert log.read_text() == words


def test_calls_of_a_dry_run_are_made_here() -> None:
    with called_here():
        assert next(call("os:getpid", {})) == os.getpid()
        with pytest.raises(EmlocError, match="no-such-kind"):
            list(call("emloc_core.standins.registry:format_named", {"name": "no-such-kind"}))
    assert next(call("os:getpid", {})) != os.getpid()


SHAPES = """
from pathlib import Path
import torch

def used():
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("RssAnon:") + 1])

weight = torch.zeros(256, 128, dtype=torch.bfloat16)
def product(rows):
    torch.nn.functional.linear(torch.zeros(rows, 128, dtype=torch.bfloat16), weight)

product(8)
before = used()
for rows in range(20, 420):
    product(rows)
print(used() - before)
"""


@pytest.mark.thorough
def test_products_of_many_shapes_take_no_more_and_more_memory() -> None:
    """Caches of single shapes are dropped, so that rows of many lengths stay within the plan: 54 MB, not 250."""
    process = subprocess.run(
        [sys.executable, "-c", SHAPES], env={**os.environ, **VARIABLES}, capture_output=True, check=True
    )
    assert int(process.stdout) < 100_000


ENDING = """
import atexit, sys, threading, time
from emloc_core.processes.lifetime import run_to_end
class Held:
    def __del__(self): print("freed")
held = Held()
held.itself = held
def main():
    atexit.register(print, "registered")
    threading.Thread(target=lambda: (time.sleep(0.2), print("of a thread"))).start()
    sys.stdout.write("written" * 20_000)
    END
run_to_end(main)
"""


@pytest.fixture
def buffered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Python hold output back, as it does by default."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)


@pytest.mark.usefixtures("buffered")
@pytest.mark.parametrize(
    ("end", "code", "message"),
    [
        ("return 3", 3, ""),
        ("return None", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.exit('words')", 1, "words"),
        ("raise ValueError('words')", 1, "ValueError: words"),
    ],
)
def test_a_process_ends_with_all_that_was_said_and_frees_nothing(end: str, code: int, message: str) -> None:
    script = ENDING.replace("END", end)
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (process.returncode, process.stderr.strip().rpartition("\n")[2]) == (code, message)
    assert process.stdout == "written" * 20_000 + "of a thread\nregistered\n"


@pytest.mark.usefixtures("buffered")
@pytest.mark.parametrize(("code", "exit_code"), [(0, 120), (3, 3)])
def test_output_that_cannot_be_written_is_told_by_the_exit_code(code: int, exit_code: int) -> None:
    script = f"from emloc_core.processes.lifetime import run_to_end; run_to_end(lambda: print(1) or {code})"
    with Path("/dev/full").open("w") as full:
        assert subprocess.run([sys.executable, "-c", script], stdout=full, check=False).returncode == exit_code


def test_output_that_is_closed_from_the_start_is_nothing_to_write() -> None:
    script = "from emloc_core.processes.lifetime import run_to_end; run_to_end(lambda: print(1))"
    command = 'exec "$0" -c "$1" >&-'
    process = subprocess.run(["sh", "-c", command, sys.executable, script], stderr=subprocess.PIPE, check=False)
    assert (process.returncode, process.stderr) == (0, b"")
