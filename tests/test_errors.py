"""What exceptions say, in a line."""

import pytest

from emloc_core.errors import first_line, printable, typed_line


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
