"""One-line texts for exceptions."""

import ast

import pytest
from support.paths import ROOT

from emloc_core.errors import CODES, EmlocError, first_line, printable, typed_line


@pytest.mark.parametrize(
    ("error", "line", "typed"),
    [
        (ValueError("wrong"), "wrong", "ValueError: wrong"),
        (ValueError("\n wrong\nand more"), "wrong", "ValueError: wrong"),
        (ValueError(), "ValueError", "ValueError"),
        (OSError(" \n"), "OSError", "OSError"),
    ],
)
def test_what_an_exception_says(error, line, typed):
    assert first_line(error) == line
    assert typed_line(error) == typed


def test_a_line_has_nothing_that_a_terminal_acts_on():
    assert printable("a\nb\x1b[2J\r\x00\u202e\ud800 \u00e9\u4e16") == "a b\\x1b[2J\\r\\x00\\u202e\\ud800 \u00e9\u4e16"


def test_every_code_is_a_known_one():
    used = {"invalid"}  # the default
    for path in (ROOT / "emloc_core").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "code" and isinstance(node.value, ast.Constant):
                used.add(node.value.value)
    assert used <= set(CODES)
    with pytest.raises(AssertionError):
        EmlocError("wrong", code="nonsense")
