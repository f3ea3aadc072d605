"""What exceptions say, in a line."""

import pytest

from emloc_core.errors import first_line, typed_line


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
