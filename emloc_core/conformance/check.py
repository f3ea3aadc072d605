"""A check, what it found, and how one is judged. Light to import."""

import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from emloc_core.errors import EmlocError


@dataclass(frozen=True)
class CheckResult:
    """What one check found out about a family, or about one of its tiny models.

    Attributes:
        family: the family's name.
        config: which of its tiny configs; ``all`` for a check of the declaration as a whole.
        check: the check's name.
        passed: whether it holds. A check that could not run has not passed.
        message: what is wrong; of a passed check, a note.
        remedy: how to mend it.
        traceback: where the check broke off, if it did so unexpectedly.
    """

    family: str
    config: str
    check: str
    passed: bool
    message: str = ""
    remedy: str = ""
    traceback: str = ""

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}".strip()


class Subject(Protocol):
    """What checks are run on."""

    label: str
    results: dict[str, CheckResult]

    @property
    def family_name(self) -> str:
        """The family's name."""

    def in_use(self) -> AbstractContextManager[Any]:
        """Let the stages work by the family's declaration, quietly."""


@dataclass(frozen=True)
class Check:
    """One property that a declaration promises.

    Attributes:
        name: such as ``input-groups``.
        run: is given the subject; returns a note or None, and raises ``EmlocError(what is wrong, how to mend it)``.
        needs: checks that must hold for this one to mean anything.
    """

    name: str
    run: Callable[[Any], str | None]
    needs: tuple["Check", ...] = ()

    def on(self, subject: Subject) -> CheckResult:
        """Judge the subject, once: what it needs is judged first."""
        if self.name not in subject.results:
            subject.results[self.name] = self._judged(subject)
        return subject.results[self.name]

    def _judged(self, subject: Subject) -> CheckResult:
        def result(passed: bool, message: str = "", remedy: str | None = None, trace: str = "") -> CheckResult:
            return CheckResult(subject.family_name, subject.label, self.name, passed, message, remedy or "", trace)

        failed = [need.name for need in self.needs if not need.on(subject).passed]
        if failed:
            return result(False, f"Could not run: it needs {', '.join(failed)}, which failed.", "Mend that first.")
        try:
            with subject.in_use():
                return result(True, self.run(subject) or "")
        except EmlocError as error:
            return result(False, str(error.args[0]), error.fix)
        except Exception as error:  # a declaration may break anything, and a check must say so
            reason = (str(error).strip().splitlines() or ["no message"])[0]
            return result(
                False,
                f"Could not run: {type(error).__name__}: {reason}",
                "The traceback shows where: emloc families check --json, or the test's report.",
                traceback.format_exc(),
            )


def check(*needs: Check) -> Callable[[Callable[[Any], str | None]], Check]:
    """Return a decorator that makes a function a check of that name."""

    def decorate(function: Callable[[Any], str | None]) -> Check:
        return Check(function.__name__.replace("_", "-"), function, needs)

    return decorate


def require(problems: list[str], remedy: str, most: int = 4) -> None:
    """Fail where there are problems.

    Raises:
        EmlocError: names them, at most ``most``, and the remedy.
    """
    problems = list(dict.fromkeys(problems))
    if problems:
        more = f"; and {len(problems) - most} more" if len(problems) > most else ""
        raise EmlocError(f"{'; '.join(problems[:most])}{more}.", remedy)
