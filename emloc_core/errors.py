"""The one exception that users meet, and its special case."""


class EmlocError(Exception):
    """A mistake that the user can mend, or a fault of their files or machine.

    The message says what is wrong and where; ``fix`` says what to do about it. The command line prints both in one
    line and exits with 1, without a traceback unless ``--debug`` is given.

    ``resumable`` says that the fault is not in what was asked for (memory ran out, say): what an unfinished output
    holds is kept, so that the same command goes on. Otherwise mending the fault changes the request, and it is dropped.
    """

    def __init__(self, message: str, fix: str | None = None, *, resumable: bool = False) -> None:
        super().__init__(message)
        self.fix = fix
        self.resumable = resumable

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message} {self.fix}" if self.fix else message


class DiskFullError(EmlocError):
    """There is no room for what is being written. The same command goes on where it stopped."""


def did_you_mean(word: str, known: list[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the known word nearest to ``word``, or an empty string."""
    import difflib

    near = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean '{near[0]}'?" if near else ""
