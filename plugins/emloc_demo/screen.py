"""What the demo shows in a terminal."""

import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from emloc_core.units import human_bytes, human_seconds

#: Maximum columns of a line: longer ones are hard to read.
_WIDEST = 110
#: Seconds between lines that say what is happening, without a terminal that could update one.
_EVERY = 10.0
#: Maximum characters of an answer.
_ANSWER = 160
_TITLE = "[bold]Fine-tune a model in the memory that inference needs[/]"
_FACTS = {
    "model": "SmolLM2-135M-Instruct, 135 million parameters in 16 bits: 269 MB",
    "task": "a customer's message in, JSON out: order number, item, request",
    "memory": "{memory} for training, Python and its libraries included",
}
_SYSTEMS = {
    "base": "the model as it was",
    "emulator+lora": "where it was trained",
    "base+corrected": "the LoRA on the model",
    "full_lora": "an ordinary LoRA",
}


class Screen:
    """A line for every step that is done, and below them one that says what is happening, and why.

    Args:
        memory: memory that the demo trains in.
        quiet: show nothing.
    """

    def __init__(self, memory: str, *, quiet: bool = False) -> None:
        self._console = Console(stderr=True, quiet=quiet, highlight=False)
        self._console.width = _width(self._console)
        facts = Table.grid(padding=(0, 2))
        for name, fact in _FACTS.items():
            facts.add_row(Text(name, "cyan"), fact.format(memory=memory))
        self._console.print(_TITLE, facts, "", sep="\n")

    @contextmanager
    def step(
        self,
        name: str,
        activity: str,
        outcome: Callable[[], str],
        peak: Callable[[], int] = lambda: 0,
        *,
        before: bool = False,
    ) -> Iterator[Callable[[str], None]]:
        """Show what is happening while the block runs, and then a line with the outcome.

        Args:
            name: name of the step.
            activity: what happens first.
            outcome: returns the outcome as text.
            peak: returns the step's peak memory in bytes; 0 if it has no meaning.
            before: whether the step was done before, and is only checked.

        Yields:
            A function that shows what happens next.
        """
        started = time.monotonic()
        with self._happening(name, activity) as update:
            yield update
        elapsed = "there already" if before else human_seconds(time.monotonic() - started)
        line = Table.grid(Column(), Column(width=8), Column(ratio=1), Column(justify="right"),
                          Column(width=8, justify="right"), padding=(0, 2, 0, 0), expand=True)  # fmt: skip
        line.add_row(
            Text("✓", "green"), Text(name, "cyan"), Text(outcome()), elapsed, human_bytes(peak()) if peak() else ""
        )
        self._console.print(line)

    @contextmanager
    def _happening(self, name: str, activity: str) -> Iterator[Callable[[str], None]]:
        if not self._console.is_terminal:
            last = time.monotonic()
            self._console.print(f"  {name:<8}  {activity}", markup=False)

            def print_now_and_then(text: str) -> None:
                nonlocal last
                if time.monotonic() - last >= _EVERY:
                    last = time.monotonic()
                    self._console.print(f"  {name:<8}  {text}", markup=False)

            yield print_now_and_then
            return
        one_line = Column(no_wrap=True, ratio=1)
        text = TextColumn("[cyan]{task.fields[name]}[/]  {task.description}", table_column=one_line)
        columns = (SpinnerColumn(), text, TimeElapsedColumn())
        with Progress(*columns, console=self._console, transient=True, expand=True) as progress:
            task = progress.add_task(escape(activity), name=f"{name:<8}")
            yield lambda text: progress.update(task, description=escape(text))


def _width(console: Console) -> int:
    """Return the columns of lines: the terminal's up to a maximum, or the maximum for a file."""
    return min(console.width, _WIDEST) if console.is_terminal else _WIDEST


def show(results: Mapping[str, Any], output: Path) -> None:
    """Print answers before and after, the scores, and where to go from here."""
    console = Console(highlight=False)
    console.width = _width(console)
    console.print("", _answers(results["answers"]), _scores(results), _next(output), sep="\n")


def _answers(answers: Sequence[Mapping[str, str]]) -> Table:
    table = Table(
        Column("a held-out message", ratio=5),
        Column("answer before", ratio=5),
        Column("answer after", ratio=6),
        box=box.SIMPLE_HEAD,
        expand=True,
        show_lines=True,
    )
    for answer in answers:
        judged = [_judged(answer[when], answer["expected"]) for when in ("before", "after")]
        table.add_row(Text(answer["prompt"]), *judged)
    return table


def _judged(answer: str, expected: str) -> Text:
    mark = ("✓ ", "bold green") if answer.strip() == expected.strip() else ("✗ ", "bold red")
    text = " ".join(answer.replace('","', '", "').split())  # a place to break the line
    return Text.assemble(mark, text if len(text) <= _ANSWER else f"{text[: _ANSWER - 3]}...")


def _scores(results: Mapping[str, Any]) -> Table:
    rows = results["tasks"]["right"]["rows"]
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("system")
    table.add_column("")
    table.add_column(f"right of {rows}", justify="right")
    table.add_column("loss per token", justify="right")
    for name, description in _SYSTEMS.items():
        if scores := results["systems"].get(name):
            style = "bold green" if name == "base+corrected" else ""
            table.add_row(name, description, str(round(rows * scores["acc"])), f"{scores['nll']:.3f}", style=style)
    return table


def _next(output: Path) -> Table:
    table = Table.grid(padding=(0, 2))
    chat = shlex.join(["emloc", "chat", str(output / "corrected")])
    table.add_row(Text("see", "cyan"), str(output / "report.html"))
    table.add_row(Text("next", "cyan"), f"{chat}  talk to the result")
    table.add_row("", "make demo-full  compare all ways to tune it, in forty minutes")
    table.add_row("", "emloc tune MODEL --data train.jsonl -o tuned  your own model")
    return table
