"""Pictures of an evaluation's rows: found before anything is loaded, and decoded with their batch.

An lm-eval task file names the column of a row's pictures (``doc_to_image: images``), and marks their places in the
prompt with ``<image>``. Paths are relative to the data file. The model receives them as the argument ``visual``.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from emloc_core.data.images import Picture
from emloc_core.errors import EmlocError, first_line
from emloc_core.files.inputs import Inputs
from emloc_core.files.limits import unpacking

#: lm-eval's mark of a picture's place in a prompt.
PLACEHOLDER = "<image>"


class Pictures:
    """The pictures of one row, decoded on iteration, so that only those of a batch take memory."""

    def __init__(self, pictures: Sequence[Picture]) -> None:
        self._pictures = pictures

    def __len__(self) -> int:
        return len(self._pictures)

    def __iter__(self) -> Iterator[Any]:
        return (picture.read() for picture in self._pictures)


def read_table(path: Path) -> Any:
    """Return a local file of rows as a ``datasets.Dataset``, as lm-eval reads it.

    Raises:
        EmlocError: it cannot be read as JSON or Parquet.
    """
    from datasets import disable_progress_bars, enable_progress_bars, load_dataset
    from datasets.exceptions import DatasetGenerationError

    kind = "parquet" if path.suffix == ".parquet" else "json"
    disable_progress_bars()  # it is fast, and its progress line mentions a train split
    try:
        with unpacking([path]):
            return load_dataset(kind, data_files=str(path), split="train")
    except (DatasetGenerationError, ValueError, OSError) as error:
        reason = first_line(error.__cause__ or error)
        raise EmlocError(
            f"{path} cannot be read as rows in {kind} ({reason}).",
            "Correct it; all values of a column must be of one kind, such as text or parts.",
        ) from error
    finally:
        enable_progress_bars()


def hash_pictures(data: Sequence[Path], declared: Any, inputs: Inputs) -> str:
    """Find all pictures of a task's rows, and return the SHA-256 of their bytes, in hex.

    Args:
        data: the task's files of rows.
        declared: ``doc_to_image`` of the task file: a column, or a list of columns. Pictures named by a template or
            function are found when the task runs, and are not hashed.
        inputs: receives the pictures' files.

    Raises:
        EmlocError: a file cannot be read, a picture is missing, or the files are in several directories.
    """
    picture_directory(data)
    total, files = hashlib.sha256(), set()
    for path in data:
        table = read_table(path)
        columns = [name for name in _listed(declared) if name in table.column_names]
        for number, row in enumerate(table.select_columns(columns) if columns else [], start=1):
            for source in (source for name in columns for source in _listed(row[name])):
                try:
                    picture = Picture.from_source(source, path.parent)
                except EmlocError as error:
                    raise EmlocError(f"{path}, row {number}: {error.args[0]}", error.fix, code=error.code) from None
                total.update(picture.sha256.encode())
                if picture.path:
                    files.add(picture.path)
    inputs.hash(sorted(files))
    return total.hexdigest()


def picture_directory(data: Sequence[Path]) -> Path:
    """Return the directory that pictures' paths are relative to: the one with the files of rows.

    Raises:
        EmlocError: there are several.
    """
    directories = sorted({path.parent.resolve() for path in data}) or [Path()]
    if len(directories) > 1:
        raise EmlocError(
            f"A task with images has data files in {directories[0]} and in {directories[1]}.",
            "Paths of images are relative to the data: keep the files of one task in one directory.",
        )
    return directories[0]


def shows_pictures(task: Any) -> bool:
    """Return whether an lm-eval task has pictures in its prompts."""
    return getattr(task.config, "doc_to_image", None) is not None


def find_pictures(task: Any, directory: Path) -> None:
    """Make an lm-eval task return its pictures as :class:`Pictures`.

    When its requests are built, it raises an EmlocError if a picture is missing, or if a prompt does not have as many
    placeholders as pictures.

    Args:
        task: a task with ``doc_to_image``.
        directory: the directory that paths are relative to.
    """
    declared = task.config.doc_to_image

    def pictures(doc: Any) -> Pictures:  # a plain function: lm-eval deep-copies a task's configuration
        sources = _listed(task.doc_to_image(doc, declared))
        prompt = task.doc_to_text(doc)
        places = prompt.count(PLACEHOLDER) if isinstance(prompt, str) else len(sources)
        if places != len(sources):
            start = prompt if len(prompt) <= 60 else prompt[:60] + " ..."
            raise EmlocError(
                f"A prompt of the task {task.task_name} has {places} times {PLACEHOLDER}, but its row has "
                f"{len(sources)} image(s): {start!r}.",
                f"Let doc_to_text write {PLACEHOLDER} once per image, where the model should see it.",
            )
        return Pictures([Picture.from_source(source, directory) for source in sources])

    task.config.doc_to_image = pictures


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
