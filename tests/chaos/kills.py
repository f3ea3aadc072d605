"""Kills processes before each call, or asks them to stop, then repeats the same command or runs another."""

import random
import signal
from collections.abc import Callable, Iterator
from functools import partial

from chaos.cases import Case, kill, on_call, spread
from chaos.judge import finish, require_nothing_half, require_same, succeeded
from chaos.kernel import Call
from chaos.results import Verdict
from chaos.stages import Bench, Stage
from chaos.supervise import Act, Run

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_RANDOM = random.Random(0)


def kills(bench: Bench, stage: Stage, most: int | None) -> Iterator[Case]:
    """Kill a stage before each call, and run it again."""
    for number in spread(len(bench.reference(stage.command).run.calls) + 1, most):
        name = f"{stage.name}, before call {number}{_named(bench, stage, number)}"
        yield Case(f"killed: {stage.name}", name, partial(_interrupt, stage, on_call(number, kill)))


def kills_twice(bench: Bench, stage: Stage, most: int | None) -> Iterator[Case]:
    """Kill a stage, kill the next one somewhere else, and run it again."""
    count = len(bench.reference(stage.command).run.calls)
    for first in spread(count, most):
        second = _RANDOM.randint(1, count)
        name = f"{stage.name}, before call {first}, and again before call {second}"
        yield Case("killed twice", name, partial(_interrupt_twice, stage, on_call(first, kill), on_call(second, kill)))


def _interrupt(stage: Stage, act: Act, bench: Bench) -> Verdict:
    directory, reference = bench.new_directory(), bench.reference(stage.command)
    run = bench.run(stage.command, directory, act)
    require_nothing_half(directory, stage.outputs, reference)
    finish(bench, stage.command, directory, reference)
    return Verdict.WHOLE if run.code == 0 else Verdict.RESUMED


def _interrupt_twice(stage: Stage, first: Act, second: Act, bench: Bench) -> Verdict:
    directory, reference = bench.new_directory(), bench.reference(stage.command)
    for act in (first, second):
        bench.run(stage.command, directory, act)
        require_nothing_half(directory, stage.outputs, reference)
    finish(bench, stage.command, directory, reference)
    return Verdict.RESUMED


def kills_before_another(bench: Bench, stage: Stage, most: int | None) -> Iterator[Case]:
    """Kill a stage while it publishes, and let another request for the same output follow."""
    for number in publishing(bench, stage, most):
        name = f"{stage.name}, before call {number}{_named(bench, stage, number)}"
        yield Case("killed while publishing, another request follows", name, partial(_another, stage, number))


def _another(stage: Stage, number: int, bench: Bench) -> Verdict:
    mine, others = bench.reference(stage.command), bench.reference(stage.other)
    directory = bench.new_directory()
    bench.run(stage.command, directory, on_call(number, kill))
    if succeeded(bench.run(stage.other, directory)):
        require_same(directory, others)
        return Verdict.WHOLE
    require_nothing_half(directory, stage.outputs, mine, others)
    finish(bench, stage.command, directory, mine)  # nothing of the first was lost
    return Verdict.REFUSED


def publishing(bench: Bench, stage: Stage, most: int | None) -> Iterator[int]:
    """Yield the calls from the writing of the manifest to the end."""
    calls = bench.reference(stage.command).run.calls
    first = next(
        number for number, call in enumerate(calls, 1) if call.path.name.startswith((".emloc.json", "emloc.json"))
    )
    return spread(len(calls) + 1, most, first)


def signals(bench: Bench, stage: Stage, most: int | None) -> Iterator[Case]:
    """Tell a stage to end, before calls and at random moments."""
    count = len(bench.reference(stage.command).run.calls)
    for sent in _SIGNALS:
        for number in spread(count, most):
            name = f"{stage.name}, {sent.name} before call {number}{_named(bench, stage, number)}"
            yield Case(sent.name, name, partial(_signalled, stage, {"act": on_call(number, partial(_send, sent))}))
    for sent in (*_SIGNALS, signal.SIGKILL):
        for _ in range(min(count, most or count) // 2):
            moment = _RANDOM.uniform(0, 1.1) * bench.reference(stage.command).seconds
            name = f"{stage.name}, {sent.name} after {moment:.2f} s"
            after = {"after": (moment, partial(_send, sent))}
            yield Case(f"{sent.name} at a random moment", name, partial(_signalled, stage, after))


def _send(sent: signal.Signals, run: Run, _call: Call | None = None) -> None:
    run.signal(sent, group=sent != signal.SIGTERM)  # a terminal tells all of a job's processes; kill(1) tells one


def _signalled(stage: Stage, options: dict[str, Callable[..., None]], bench: Bench) -> Verdict:
    directory, reference = bench.new_directory(), bench.reference(stage.command)
    run = bench.run(stage.command, directory, **options)
    require_nothing_half(directory, stage.outputs, reference)
    killed = run.code == -signal.SIGKILL or (run.code < 0 and not run.calls)  # the latter before it had begun
    if not killed and succeeded(run):
        require_same(directory, reference)
        return Verdict.WHOLE
    finish(bench, stage.command, directory, reference)
    return Verdict.RESUMED


def _named(bench: Bench, stage: Stage, number: int) -> str:
    calls = bench.reference(stage.command).run.calls
    return f" ({calls[number - 1]})" if number <= len(calls) else " (none is left)"
