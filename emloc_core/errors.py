"""The one exception that users meet, its special case, and what other exceptions say in a line."""

#: What kind of fault an error is, for programs: each with what it stands for.
CODES = {
    "invalid": "a file, a row, a setting or an argument is not as it must be",
    "missing": "something is not where it was said to be",
    "damaged": "a file is truncated, or is not what was written",
    "changed": "an input changed while it was read",
    "mismatch": "things do not belong together: an adapter and a base, say",
    "unsupported": "a model, an adapter or a file is of a kind that is not handled",
    "refused": "something could run code or leave its directory",
    "exists": "something else is at the place of an output",
    "busy": "another process is writing there",
    "disk-full": "there is no room on the disk",
    "memory": "memory ran out, or nothing fits the memory given",
    "not-finite": "NaN or Inf in weights, activations or a loss",
    "plugin": "a plugin, or an algorithm that it brings, failed",
    "unavailable": "the hub, a device or an optional package is not to be had",
    "died": "a process ended without an answer",
}


class EmlocError(Exception):
    """A mistake that the user can fix, or a fault of their files or machine.

    The message says what is wrong and where; ``fix`` says what to do about it. The command line prints both in one
    line and exits with 1, without a traceback unless ``--debug`` is given.

    Attributes:
        code: what kind of fault it is, of :data:`CODES`.
        fix: what to do, if there is more to say than the message does.
        resumable: the fault is not in what was asked for (memory ran out, say): what an unfinished output holds is
            kept, so that the same command resumes. Otherwise fixing the fault changes the request, and it is dropped.
    """

    def __init__(self, message: str, fix: str | None = None, *, code: str = "invalid", resumable: bool = False) -> None:
        super().__init__(message)
        assert code in CODES
        self.code = code
        self.fix = fix
        self.resumable = resumable

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message} {self.fix}" if self.fix else message


class DiskFullError(EmlocError):
    """There is no room for what is being written. The same command resumes where it stopped."""

    def __init__(self, message: str, fix: str) -> None:
        super().__init__(message, fix, code="disk-full", resumable=True)


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
