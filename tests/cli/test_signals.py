"""A signal ends a command with one sentence, and every process that it has started with it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import rich_click as click

from emloc_core.cli import cli
from emloc_core.cli.console import resumes

#: Stands in for Python: what ``emloc run`` starts waits, and says which process it is.
STAGE = """#!{python}
import os, pathlib, time
from emloc_core.processes.lifetime import end_with_parent
end_with_parent()
pathlib.Path({pid_file!r}).write_text(str(os.getpid()))
time.sleep(600)
"""

RUN = """
import sys
from pathlib import Path
from types import SimpleNamespace
from emloc_core.recipe import recipe as recipes, run
from emloc_core.cli import main
output = sys.argv[1]
recipe = SimpleNamespace(output=output, eval=None, model=SimpleNamespace(memory=None))
recipes.load_recipe = run.load_recipe = lambda *_: recipe
run.decided, run.require_named, run.require_tuning = lambda recipe: recipe, lambda _: None, lambda _: None
request = SimpleNamespace(stage="train", to_json=dict)
found = [SimpleNamespace(name="adapter", purpose="tune", request=request, output=Path(output) / "adapter")]
run.tried = lambda recipe: [SimpleNamespace(is_first=True)]
run.stages = run.stages_of = lambda *_: found
sys.executable = sys.argv[2]
sys.argv[1:] = ["run", "recipe.toml"]
main()
"""


def await_(condition):
    while not condition():
        time.sleep(0.02)


def is_running(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGKILL", -9)])
def test_a_stage_ends_with_its_run(tmp_path, number, code):
    pid_file, stage = tmp_path / "process", tmp_path / "stage"
    stage.write_text(STAGE.format(python=sys.executable, pid_file=str(pid_file)))
    stage.chmod(0o755)
    with subprocess.Popen(
        [sys.executable, "-c", RUN, str(tmp_path), str(stage)], stderr=subprocess.PIPE, text=True
    ) as run:
        await_(lambda: run.poll() is not None or (pid_file.exists() and pid_file.read_text()))
        assert run.poll() is None, run.stderr.read()
        os.kill(run.pid, signal.Signals[number])
        errors = run.stderr.read()
    assert run.returncode == code
    child = int(pid_file.read_text())
    await_(lambda: not is_running(child))
    if code > 0:
        assert errors.splitlines()[-1] == "emloc: interrupted; the same command resumes where it stopped."


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("instead", [None, ValueError("not a number"), SystemExit(3)], ids=repr)
def test_whatever_a_library_makes_of_a_signal_it_is_an_interruption(emloc, monkeypatch, number, code, instead):
    @click.command("wait")
    @resumes
    def wait():
        try:
            os.kill(os.getpid(), number)
            time.sleep(600)
        except KeyboardInterrupt:
            if instead:
                raise instead from None
            raise

    monkeypatch.setitem(cli.commands, "wait", wait)
    before = signal.getsignal(number)
    status, out, err = emloc("wait")
    assert (status, out) == (code, "")
    assert err.strip() == "emloc: interrupted; the same command resumes where it stopped."
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("command", [["plan", "model"], ["chat", "model"], ["zoo", "status", "zoo"], ["families"]])
def test_a_command_that_keeps_nothing_does_not_claim_to_resume(emloc, monkeypatch, command):
    def interrupted(self, _):
        if self.name in command:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(click.Command, "invoke", interrupted)
    status, out, err = emloc(*command)
    assert (status, out, err.strip()) == (130, "", "emloc: interrupted.")


def test_a_signal_that_comes_as_handlers_are_set_is_an_interruption(emloc, monkeypatch):
    original, before = signal.signal, signal.getsignal(signal.SIGINT)

    def set_and_receive(number, handler):
        original(number, handler)
        monkeypatch.setattr(signal, "signal", original)
        signal.raise_signal(number)

    monkeypatch.setattr(signal, "signal", set_and_receive)
    status, _, err = emloc("families")
    assert (status, err.strip()) == (130, "emloc: interrupted.")
    assert signal.getsignal(signal.SIGINT) is before
