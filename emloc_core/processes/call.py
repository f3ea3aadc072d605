"""Calls a function in a separate process, so that its memory is freed afterwards and its peak can be measured.

The call is one JSON object on the child's stdin, the answers are lines of JSON on its stdout, and anything else that it
prints goes to stderr. An :class:`EmlocError` in the child is raised again in the parent.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from contextvars import ContextVar
from importlib import import_module
from inspect import signature
from pathlib import Path
from types import GeneratorType
from typing import IO, Any

from emloc_core.errors import EmlocError
from emloc_core.processes.environment import VARIABLES, hush_libraries, without_collections
from emloc_core.processes.lifetime import child_environment, end_with_parent, run_to_end

_IS_HERE = ContextVar("is_here", default=False)


class ProcessDiedError(EmlocError):
    """The process ended without an answer.

    Attributes:
        exit_code: its exit code; the negative number of the signal that ended it.
    """

    def __init__(self, function: str, code: int) -> None:
        ending = (
            f"was killed by signal {-code}, maybe for lack of memory" if code < 0 else f"ended with exit code {code}"
        )
        super().__init__(
            f"The process of {function} {ending}.", "Run the same command again.", code="died", resumable=True
        )
        self.exit_code = code


def call(
    function: str,
    arguments: Mapping[str, Any],
    *,
    log: Path | None = None,
    environment: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Iterator[Any]:
    """Call a function in a new process and yield its answers.

    Args:
        function: ``package.module:name``. It returns one answer, or yields them; if it has an argument ``tell``, it is
            given a function that sends an answer at once.
        arguments: by name, JSON values.
        log: file for the process's output; stderr by default.

    Yields:
        The answers, JSON values.

    Raises:
        EmlocError: the function raised it.
        ProcessDiedError: the process ended without an answer.
    """
    question = json.dumps({"function": function, "arguments": dict(arguments)})
    if _IS_HERE.get():
        yield from _answered_here(question)
        return
    command = [sys.executable, "-m", "emloc_core.processes.call"]
    with (
        _opened(log) as stderr,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=child_environment({**VARIABLES, **os.environ, **(environment or {})}),
            cwd=cwd,
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with suppress(BrokenPipeError):
                process.stdin.write(question)
                process.stdin.close()
            last = None
            for line in process.stdout:
                last = json.loads(line)
                yield from unpacked(last)
        except KeyboardInterrupt:
            process.kill()
            raise
    if last is None or "answer" in last:
        raise ProcessDiedError(function, process.returncode)


@contextmanager
def called_here() -> Iterator[None]:
    """Make calls in this process, for calls that only describe: each new process would import torch again."""
    before = _IS_HERE.set(True)
    try:
        yield
    finally:
        _IS_HERE.reset(before)


def _answered_here(question: str) -> Iterator[Any]:
    messages: list[str] = []
    with redirect_stdout(sys.stderr):
        answer(json.loads(question), lambda message: messages.append(json.dumps(message)))
    for message in messages:
        yield from unpacked(json.loads(message))


def unpacked(message: Mapping[str, Any]) -> Iterator[Any]:
    """Yield an answer; raise an error."""
    if "answer" in message:
        yield message["answer"]
    elif "error" in message:
        raise EmlocError(**message["error"])


@contextmanager
def _opened(log: Path | None) -> Iterator[IO[bytes] | None]:
    if log is None:
        yield None
    else:
        with log.open("wb") as stream:
            yield stream


def answer(question: Mapping[str, Any], send: Callable[[dict[str, Any]], Any]) -> None:
    """Make the call, and send the messages to the parent: the answers, and how the call ended."""

    def tell(answer: Any) -> None:
        send({"answer": answer})

    module, _, name = question["function"].partition(":")
    try:
        with without_collections():
            function = getattr(import_module(module), name)
        telling = {"tell": tell} if "tell" in signature(function).parameters else {}
        result = function(**question["arguments"], **telling)
        for item in result if isinstance(result, GeneratorType) else [result]:
            tell(item)
    except EmlocError as error:
        send({"error": error.to_dict()})
    else:
        send({"done": True})


def main() -> int:
    """Answer the question on stdin."""
    end_with_parent()
    hush_libraries()
    question = json.load(sys.stdin)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keep what libraries print out of the answers

    def send(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    try:
        answer(question, send)
    except KeyboardInterrupt:  # the parent was interrupted too, and says so
        return 130
    return 0


if __name__ == "__main__":
    run_to_end(main)
