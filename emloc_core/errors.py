"""The one exception that users meet, its special case, and what other exceptions say in a line."""


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


def first_line(error: BaseException) -> str:
    """Return the first line of what an exception says; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def typed_line(error: BaseException) -> str:
    """Return an exception's type and the first line of what it says: for one that was not written for users."""
    name, line = type(error).__name__, first_line(error)
    return name if line == name else f"{name}: {line}"


def printable(text: object) -> str:
    """Return what ``str`` makes of it in one line, with nothing in it that a terminal would act on."""
    return "".join(each if each.isprintable() else " " if each == "\n" else _escaped(each) for each in str(text))


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def did_you_mean(word: str, known: list[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the known word nearest to ``word``, or an empty string."""
    import difflib

    near = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean '{near[0]}'?" if near else ""
