"""A case of the campaign: one fault at one moment of a command, and the outcomes that are allowed."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from chaos.judge import DefectError, wrong
from chaos.kernel import Call
from chaos.results import Result, Verdict
from chaos.stages import Bench
from chaos.supervise import Act, Run


@dataclass(frozen=True)
class Case:
    """Something to try.

    Attributes:
        kind: the row of the table.
        name: what is done, where.
        attempt: does it, and says what came of it, or raises :class:`DefectError`.
    """

    kind: str
    name: str
    attempt: Callable[[Bench], Verdict]

    def result(self, bench: Bench) -> Result:
        """Try it; whatever the outcome, the inputs are as they were."""
        try:
            verdict, why = self.attempt(bench), ""
            if not bench.is_untouched():
                raise wrong("the inputs were written to")
        except DefectError as defect:
            verdict, why = defect.verdict, defect.why
        if not bench.is_untouched():
            bench.restore()
        return Result(self.kind, self.name, verdict, why)


def on_call(number: int, act: Act) -> Act:
    """Act at the ``number``-th call alone, counted from 1."""
    return lambda run, call: act(run, call) if len(run.calls) == number and run.calls[-1] is call else None


def kill(run: Run, _call: Call) -> None:
    """End the command before the call is made."""
    run.kill()


def spread(last: int, most: int | None, first: int = 1) -> Iterator[int]:
    """Yield the numbers from ``first`` to ``last``, at most so many: the ends, and what lies between at random."""
    numbers = list(range(first, last + 1))
    if most is None or len(numbers) <= most:
        yield from numbers
        return
    chosen = random.Random(last).sample(numbers[:-1], max(0, most - 1))
    yield from sorted([*chosen, numbers[-1]])
