"""Two commands at once on one output: the second runs while the first is held before a call."""

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from threading import Thread

from chaos.cases import Case, on_call, spread
from chaos.judge import finish, require_nothing_half, require_same, succeeded, wrong
from chaos.kernel import Call
from chaos.kills import publishing
from chaos.results import Verdict
from chaos.stages import Bench, Stage
from chaos.supervise import Run

_WAITS = 1.0  # seconds without a call after one for a lock: it waits for it


def two_writers(bench: Bench, stage: Stage, most: int | None) -> Iterator[Case]:
    """Hold a stage before calls, those of publishing among them, and let the same or another request run meanwhile."""
    count = len(bench.reference(stage.command).run.calls)
    half = most and max(1, most // 2)
    numbers = sorted({*spread(count, half), *publishing(bench, stage, half)} - {count + 1})
    for number in numbers:
        for second, label in ((stage.command, "the same"), (stage.other, "another")):
            name = f"{stage.name}, held before call {number}, {label} request meanwhile"
            yield Case("two writers", name, partial(_both, stage, number, second))


def _both(stage: Stage, number: int, second: str, bench: Bench) -> Verdict:
    mine, others = bench.reference(stage.command), bench.reference(second)
    directory = bench.new_directory()
    meanwhile = _Meanwhile(bench, second, directory)
    first = bench.run(stage.command, directory, on_call(number, meanwhile.start))
    other = meanwhile.end()
    succeeded_first, succeeded_other = succeeded(first), succeeded(other)
    require_nothing_half(directory, stage.outputs, mine, others)
    if succeeded_first and succeeded_other and mine.files != others.files:
        raise wrong("both say that they have finished")
    if succeeded_first or not succeeded_other:
        finish(bench, stage.command, directory, mine)
    else:
        require_same(directory, others)
    return Verdict.WHOLE if succeeded_first and succeeded_other else Verdict.REFUSED


class _Meanwhile:
    """A command that runs while another is held, until it has ended or waits for a lock of the other's."""

    def __init__(self, bench: Bench, command: str, directory: Path) -> None:
        self._called: tuple[str, float] = ("", time.monotonic())
        self._runs: list[Run] = []
        self._thread = Thread(target=lambda: self._runs.append(bench.run(command, directory, self._note)))

    def start(self, _run: Run, _call: Call) -> None:
        self._thread.start()
        while self._thread.is_alive():
            self._thread.join(0.02)
            name, since = self._called
            if name == "flock" and time.monotonic() > since + _WAITS:
                return

    def end(self) -> Run:
        """Return the run, once it has ended."""
        if self._thread.ident is None:
            raise wrong("the first command ended before it was held")
        self._thread.join()
        return self._runs[0]

    def _note(self, _run: Run, call: Call) -> None:
        self._called = (call.name, time.monotonic())
