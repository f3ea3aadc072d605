"""Running what has compiled functions without them."""

import pytest

from emloc_core.algorithms import native


def without_compilers(function, *args, **kwargs):
    """Return what a function does where nothing compiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", lambda _: None)
        patch.setattr(native, "compiler", lambda: None)
        return function(*args, **kwargs)
