"""Judges the cases: what a command may print, what it may leave behind, and what is a defect."""

from collections.abc import Iterable
from pathlib import Path

from chaos.results import Result, Verdict
from chaos.stages import Bench, Reference, snapshot
from chaos.supervise import Run

_INTERRUPTED = (130, 143)


class DefectError(Exception):
    """What the toolkit promises did not hold."""

    def __init__(self, verdict: Verdict, why: str) -> None:
        super().__init__(why)
        self.verdict, self.why = verdict, why


def wrong(why: str) -> DefectError:
    """Return the defect of an output that is not what was asked for, or of work that is lost."""
    return DefectError(Verdict.WRONG, why)


def succeeded(run: Run) -> bool:
    """Say whether a command that was left alone, or met a fault, succeeded; if not, it has to say why.

    Raises:
        DefectError: it ended in another way.
    """
    if run.hung:
        raise DefectError(Verdict.UNEXPECTED, "it hangs")
    if run.code == 0:
        return True
    sentence = "emloc: interrupted" if run.code in _INTERRUPTED else "emloc: error: "
    if run.code not in (1, *_INTERRUPTED) or not run.last_line.startswith(sentence) or "Traceback" in run.output:
        raise DefectError(Verdict.UNEXPECTED, f"exit code {run.code}: {run.output.strip()[-300:]}")
    return False


def require_same(directory: Path, *references: Reference) -> None:
    """Require that a directory holds what one of these uninterrupted runs leaves, to the byte, and nothing else.

    Raises:
        DefectError: it does not.
    """
    files = snapshot(directory)
    if not any(files == reference.files for reference in references):
        raise wrong(_differences(files, references[0].files))


def require_nothing_half(directory: Path, outputs: Iterable[str], *references: Reference) -> None:
    """Require that each output is absent, or what one of these uninterrupted runs leaves there.

    Raises:
        DefectError: one looks finished and is not.
    """
    files = snapshot(directory)
    for output in outputs:
        contents = _below(files, output)
        if contents and not any(contents == _below(reference.files, output) for reference in references):
            raise wrong(f"{output} looks finished: {_differences(contents, _below(references[0].files, output))}")


def finish(bench: Bench, command: str, directory: Path, reference: Reference) -> None:
    """Run a command again: it has to succeed and leave what an uninterrupted run leaves.

    Raises:
        DefectError: it does not.
    """
    again = bench.run(command, directory)
    if not succeeded(again):
        raise wrong(f"the same command again says: {again.last_line}")
    require_same(directory, reference)


def _below(files: dict[str, bytes], output: str) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name.startswith(f"{output}/") and name != f"{output}/"}


def _differences(actual: dict[str, bytes], expected: dict[str, bytes]) -> str:
    texts = [f"{name} is left behind" for name in sorted(actual.keys() - expected.keys())]
    texts += [f"{name} is missing" for name in sorted(expected.keys() - actual.keys())]
    texts += [f"{name} differs" for name in sorted(actual.keys() & expected.keys()) if actual[name] != expected[name]]
    return ", ".join(texts[:6])


__all__ = ["DefectError", "Result", "finish", "require_nothing_half", "require_same", "succeeded", "wrong"]
