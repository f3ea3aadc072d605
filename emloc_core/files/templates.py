"""Limits on rendering chat templates, which are programs that come with a model.

Transformers runs them in Jinja's sandbox, which keeps them away from the machine, but not from running forever or
filling memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

from emloc_core.compat.transformers import Compile, wrap_template_compiler
from emloc_core.errors import EmlocError
from emloc_core.files.limits import limited

SECONDS = 10.0
NBYTES = 1 << 30
#: Characters of a rendered conversation. The result is tokenised, which cannot be interrupted.
LENGTH = 16 << 20
_WHAT = "Rendering the model's chat template"

_is_bounded = ContextVar("_is_bounded", default=False)


@contextmanager
def rendering() -> Iterator[None]:
    """Bound all that the block renders together: reading how much memory is used takes longer than a template.

    Raises:
        EmlocError: it takes too much time or memory.
    """
    if _is_bounded.get():
        yield
        return
    with limited(_WHAT, SECONDS, NBYTES):
        before = _is_bounded.set(True)
        try:
            yield
        finally:
            _is_bounded.reset(before)


class _Bounded:
    """A compiled Jinja template that is rendered within limits."""

    def __init__(self, template: Any) -> None:
        self._template = template
        template.globals = dict(template.globals)  # of several maps, which Jinja would join for every row
        self.environment = template.environment

    def render(self, *args: Any, **values: Any) -> str:
        with rendering():
            text: str = self._template.render(*args, **values)
        if len(text) > LENGTH:
            raise EmlocError(
                f"{_WHAT} gives {len(text):,} characters.", "Do not use this model, or shorten the row.", code="refused"
            )
        return text

    def generate(self, *args: Any, **values: Any) -> Iterator[str]:
        with rendering():
            yield from self._template.generate(*args, **values)


def _bounded(compile_template: Compile) -> Compile:
    @lru_cache
    def compile_bounded(chat_template: str) -> _Bounded:
        with limited(_WHAT, SECONDS, NBYTES):  # compiling computes constants
            return _Bounded(compile_template(chat_template))

    return compile_bounded


def bound_templates() -> None:
    """Make transformers render chat templates within limits from now on."""
    wrap_template_compiler(_bounded)
