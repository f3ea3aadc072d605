"""Checks, the conditions under which they run, and their results. Light to import."""

import re
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from emloc_core.errors import EmlocError, typed_line
from emloc_core.family import Family
from emloc_core.plugins.manager import plugin_manager

_MOST = 4  # problems in a message
#: Pattern of an error of torch or of a model's own code -> what is wrong with the declaration, and how to fix it.
_MEANINGS = (
    (
        r"has no attribute [`'\"]\d+",
        "blocks names a module that is not a list of blocks",
        "Name the ModuleList whose children are the blocks: print(model) shows the paths.",
    ),
    (
        r"expected device meta|meta tensor|meta device|data of a meta",
        "the model computes with a weight that is not loaded at that moment: one that is read without calling its "
        "module, or one of blocks that no tower declares",
        "Declare every list of blocks as a tower. If a module reads another's weight, the model cannot be streamed: "
        "declare the module around both as the block.",
    ),
    (
        r"mat1 and mat2 shapes|must match the size of tensor|size mismatch",
        "sizes do not fit each other: those of the tiny config, or a factor is taken for the weight of its Linear",
        "Correct the sizes in tiny_configs. If only the emulator does not run, some code reads the weight of a Linear "
        "without calling it: list that Linear in keep_dense.",
    ),
)


@dataclass(frozen=True)
class CheckResult:
    """Result of one check on a family, or on one of its tiny models.

    Attributes:
        config: label of the tiny config; ``all`` for a check of the declaration.
        passed: whether the check passed. A check that could not run has not passed.
        message: what is wrong; for a passed check, a note.
        blocked: whether it was not run because a check that it needs failed.
    """

    family: str
    config: str
    check: str
    passed: bool
    message: str = ""
    remedy: str = ""
    traceback: str = ""
    blocked: bool = False

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}".strip()


class Subject:
    """What checks run on: a declaration, or one of its tiny models.

    Attributes:
        raised: the exception of each failed check, by its name.
    """

    def __init__(self, declared: Family, label: str) -> None:
        self.declared, self.label = declared, label
        self.results: dict[str, CheckResult] = {}
        self.raised: dict[str, Exception] = {}


@dataclass(frozen=True)
class Check:
    """One property that a declaration must have.

    Attributes:
        run: takes the subject; returns a note or None, and raises ``EmlocError(what is wrong, how to fix it)``.
        needs: checks that must pass for this one to be meaningful.
    """

    name: str
    run: Callable[[Any], str | None]
    needs: tuple["Check", ...] = ()

    def on(self, subject: Subject) -> CheckResult:
        """Check the subject once, after the checks that this one needs."""
        if self.name not in subject.results:
            subject.results[self.name] = self._judged(subject)
        return subject.results[self.name]

    def _judged(self, subject: Subject) -> CheckResult:
        result = partial(CheckResult, subject.declared.name, subject.label, self.name)
        failed = [need.name for need in self.needs if not need.on(subject).passed]
        if failed:
            reason = f"Could not run: it needs {', '.join(failed)}, which failed."
            return result(False, reason, "Fix that first.", blocked=True)
        try:
            with under_test(subject.declared):
                return result(True, self.run(subject) or "")
        except EmlocError as error:
            subject.raised[self.name] = error
            return result(False, str(error.args[0]), error.fix or "")
        except Exception as error:  # a declaration may break anything, and a check must say so
            subject.raised[self.name] = error
            return result(False, *_explained(error), traceback.format_exc())


def _explained(error: Exception) -> tuple[str, str]:
    """Return what an error of torch says about a declaration, as far as it is a known one, and what to do."""
    for pattern, problem, remedy in _MEANINGS:
        if re.search(pattern, str(error)):
            return f"Could not run: {problem} ({typed_line(error)})", remedy
    hint = "The traceback shows where: emloc families check --json, or the test's report."
    return f"Could not run: {typed_line(error)}", hint


def check(*needs: Check) -> Callable[[Callable[[Any], str | None]], Check]:
    """Return a decorator that turns a function into a check of the same name."""

    def decorate(function: Callable[[Any], str | None]) -> Check:
        return Check(function.__name__.replace("_", "-"), function, needs)

    return decorate


def require(problems: Iterable[str], remedy: str) -> None:
    """Fail if there are problems.

    Raises:
        EmlocError: names the problems, once if they differ only in a block's number, and the remedy.
    """
    alike: dict[str, list[str]] = {}
    for problem in problems:
        alike.setdefault(re.sub(r"\.\d+\b", ".N", problem), []).append(problem)
    messages = [group[0] + (f" ({len(group) - 1} more like it)" if len(group) > 1 else "") for group in alike.values()]
    if messages:
        more = f"; and {len(messages) - _MOST} more" if len(messages) > _MOST else ""
        raise EmlocError(f"{'; '.join(messages[:_MOST])}{more}.", remedy)


@contextmanager
def under_test(family: Family) -> Iterator[None]:
    """Make the stages use a declaration, installed or not, without output and on one thread.

    Tiny tensors gain nothing from threads: with two, the kit takes six times the processor time.
    """
    import torch
    from transformers import logging

    level, bars, threads = logging.get_verbosity(), logging.is_progress_bar_enabled(), torch.get_num_threads()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings(), plugin_manager().declaring(family):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(threads)
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
