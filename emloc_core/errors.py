"""The exception that users see, its subclass for full disks, and the messages of other exceptions, also pydantic's."""

import errno
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError

Model = TypeVar("Model", bound="BaseModel")

#: What torch prints after a module's class, over several lines.
_REPR = re.compile(r"\(\n(?: .*\n)+\)")
#: Error codes, for programs, with their meanings.
CODES = {
    "invalid": "a file, row, setting or argument is wrong",
    "missing": "a file, directory or model does not exist",
    "damaged": "a file is truncated, or not what was written",
    "changed": "an input changed while it was being read",
    "mismatch": "inputs do not belong together, such as an adapter and a base",
    "unsupported": "a model, adapter or file is of a kind that is not supported",
    "refused": "a file could run code, exhaust memory or time, or leave its directory",
    "exists": "the output path already holds something else",
    "busy": "another process is writing there",
    "disk-full": "the disk is full",
    "memory": "memory ran out, or nothing fits in the memory given",
    "not-finite": "NaN or Inf in weights, activations or a loss",
    "plugin": "a plugin, or an algorithm that it provides, failed",
    "unavailable": "the hub, a device or an optional package is not available",
    "died": "a process ended without an answer",
}


#: Phrases of torch's plain RuntimeErrors on the CPU and for mapped files.
_NO_MEMORY = ("can't allocate memory", "cannot allocate memory", "not enough memory", "out of memory", "bad_alloc")
#: All that oneDNN says where there is no memory for its code.
_NO_PRIMITIVE = "could not create a primitive"
#: Error numbers for a full disk, quota or file system.
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class EmlocError(Exception):
    """An error that the user can fix, or a fault in their files or machine.

    The message says what is wrong and where; ``fix`` says what to do about it. The command line prints both on one
    line and exits with code 1, without a traceback unless ``--debug`` is given.

    Attributes:
        code: the kind of error, one of :data:`CODES`.
        fix: what to do, unless the message says it all.
        resumable: the request is not at fault (for example, memory ran out): the unfinished output is kept, and the
            same command resumes. Otherwise fixing the error changes the request, and the unfinished output is dropped.
    """

    def __init__(self, message: str, fix: str | None = None, *, code: str = "invalid", resumable: bool = False) -> None:
        super().__init__(message)
        assert code in CODES
        self.code = code
        self.fix = fix
        self.resumable = resumable

    def to_dict(self) -> dict[str, Any]:
        """Return the arguments that make the same error, as JSON values."""
        return {"message": str(self.args[0]), "fix": self.fix, "code": self.code, "resumable": self.resumable}

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message} {self.fix}" if self.fix else message


class DiskFullError(EmlocError):
    """The disk is full. The same command resumes where it stopped."""

    def __init__(self, message: str, fix: str) -> None:
        super().__init__(message, fix, code="disk-full", resumable=True)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception, Python's or torch's, says that memory ran out."""
    if isinstance(error, MemoryError) or "OutOfMemoryError" in class_names(error):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    message = str(error).lower()
    return message == _NO_PRIMITIVE or any(phrase in message for phrase in _NO_MEMORY)


def class_names(error: BaseException) -> set[str]:
    """Return the names of an exception's classes, so that torch and click need not be imported to compare them."""
    return {kind.__name__ for kind in type(error).__mro__}


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type if empty; a module is reduced to its class.

    If it introduces others, the first of those is returned too.
    """
    first, *more = _REPR.sub("", str(error)).strip().splitlines() or [type(error).__name__]
    return f"{first} {more[0].strip()}" if first.endswith(":") and more else first


def typed_line(error: BaseException) -> str:
    """Return an exception's type and the first line of its message, for exceptions not meant for users."""
    name, line = type(error).__name__, first_line(error)
    return name if line == name else f"{name}: {line}"


def printable(text: object) -> str:
    """Return ``str(text)`` on one line, with everything escaped that a terminal would act on."""
    return "".join(
        character if character.isprintable() else " " if character == "\n" else _escaped(character)
        for character in str(text)
    )


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def did_you_mean(word: str, candidates: list[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the candidate closest to ``word``, or an empty string."""
    import difflib

    near = difflib.get_close_matches(word, candidates, n=1)
    return f" Did you mean '{near[0]}'?" if near else ""


#: Names of settings on the command line or in other tools.
_SHORT = {
    "lr": "learning_rate",
    "rank": "lora_rank",
    "r": "lora_rank",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "rslora": "use_rslora",
    "target": "target_modules",
    "max_steps": "steps",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulation",
    "max_seq_length": "max_length",
}
#: Pydantic's names for a union's members.
_MEMBERS = re.compile(r"(literal|list|dict)\[.*\]|(constrained|function)-.*|str|float|bool")


def validated(model: type[Model], values: Mapping[str, Any], remedy: str, where: str = "") -> Model:
    """Return a pydantic model of values by name.

    Args:
        values: values of its fields; the others have their defaults.
        remedy: what to do about the error, a sentence.
        where: the file that they were read from, if any.

    Raises:
        EmlocError: names or values are wrong; the message lists them all.
    """
    from pydantic import ValidationError

    try:
        return model(**values)
    except ValidationError as error:
        raise EmlocError(f"{where and f'{where}: '}{explain(error, model)}", remedy) from None


def explain(error: "ValidationError", model: type["BaseModel"]) -> str:
    """Return all problems of a failed validation in one line, with suggestions for misspelt names."""
    texts = []
    # Users need not know which member of a union pydantic tried.
    located = [
        ([str(step) for step in problem["loc"] if not _MEMBERS.fullmatch(str(step))], problem)
        for problem in error.errors()
    ]
    for steps, problem in located:
        if any(inner[: len(steps)] == steps != inner for inner, _ in located):
            continue  # of a member of another type; the one that was meant has a problem further inside
        name = ".".join(steps) or "settings"
        if problem["type"] == "extra_forbidden":
            names = list(_section(model, steps[:-1]).model_fields)
            short = _SHORT.get(steps[-1])
            suggestion = f" Did you mean '{short}'?" if short in names else did_you_mean(steps[-1], names)
            text = f"there is no setting {name!r}.{suggestion}".removesuffix(".")
        elif problem["type"] == "model_type":
            fields = ", ".join(_section(model, steps).model_fields)
            text = f"{name} = {problem['input']!r}: this is a section, with {fields}"
        elif problem["type"] == "missing":
            text = f"{name} is missing"
        elif problem["type"] == "value_error":  # about several settings together: the input is all of them
            text = (f"{name}: " if steps else "") + problem["msg"].removeprefix("Value error, ")
        else:
            text = f"{name} = {problem['input']!r}: {problem['msg']}"
        if text not in texts:
            texts.append(text)
    message = "; ".join(texts)
    return message if message.endswith(("?", ".")) else f"{message}."


def _section(model: type["BaseModel"], steps: list[str]) -> type["BaseModel"]:
    from pydantic import BaseModel

    remaining = iter(steps)
    for step in remaining:
        annotation: Any = model.model_fields[step].annotation
        if get_origin(annotation) in (dict, list):
            next(remaining, None)  # a key or an index
        options = [option for option in (annotation, *get_args(annotation)) if isinstance(option, type)]
        model = next(option for option in options if issubclass(option, BaseModel))
    return model
