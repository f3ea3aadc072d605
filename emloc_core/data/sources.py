"""Reads rows from their sources: files, folders of pictures, and saved and hub datasets.

:mod:`emloc_core.data.rows` parses them.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from emloc_core.data.files import READERS, Numbered, names_rows, read_file
from emloc_core.data.row import FORMS
from emloc_core.errors import EmlocError, first_line
from emloc_core.files.checkpoint import may_be_hub_id
from emloc_core.files.hub_cache import require_cache

#: Files that ``save_to_disk`` of ``datasets`` leaves: of a dataset, and of one with several splits.
_SAVED = ("state.json", "dataset_dict.json")
#: The file of a folder of pictures with the captions, as ``datasets`` reads it.
_FOLDER = "metadata.jsonl"
#: Suffixes of pictures, each with a text file beside it.
_PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
_PATIENCE = 10.0  # seconds to wait for the hub


def reader_of(source: str) -> tuple[Callable[[str], Iterator[Numbered]], Path]:
    """Return how a source is read; nothing is read yet.

    Args:
        source: path of a file or a directory, or id of a hub dataset.

    Returns:
        A function of the split of a dataset that yields its rows with their numbers, or why one cannot be read; and
        the directory that paths of images are relative to.

    Raises:
        EmlocError: it is an empty file, or neither a file nor a saved dataset, and cannot be the id of a hub dataset.
    """
    path = Path(source)
    if path.is_file():
        if not path.stat().st_size:
            raise no_rows(source)
        return lambda _: read_file(path), path.parent
    if any((path / name).is_file() for name in _SAVED):
        return partial(_read_saved, path), Path()
    if _is_folder(path):
        return lambda _: _read_folder(path), path
    if path.is_dir():
        raise EmlocError(
            f"{path} is a directory.",
            f"Give a file ({', '.join(READERS)}), or what `save_to_disk` of datasets wrote, or a folder "
            "of pictures with a metadata.jsonl or a .txt beside each.",
        )
    if names_rows(path) or not may_be_hub_id(source):
        raise EmlocError(
            f"There is no file {source}.", "Check the path; a hub dataset is organisation/name.", code="missing"
        )
    return partial(_read_hub, source), Path()


def no_rows(source: str) -> EmlocError:
    """Return the error for a source without rows."""
    return EmlocError(f"{source} holds no rows.", FORMS)


def _is_folder(path: Path) -> bool:
    """Return whether a path is a directory of pictures, each with its caption, or a list of them."""
    captions = (file.with_suffix(".txt") for file in _pictures(path)) if path.is_dir() else ()
    return (path / _FOLDER).is_file() or any(caption.is_file() for caption in captions)


def _pictures(path: Path) -> list[Path]:
    return [file for file in sorted(path.iterdir()) if file.suffix.lower() in _PICTURES]


def _read_folder(path: Path) -> Iterator[Numbered]:
    """Yield the rows of a folder of pictures: those of its ``metadata.jsonl``, or a picture and the text beside it."""
    if (path / _FOLDER).is_file():
        for number, row in read_file(path / _FOLDER):
            yield number, _pictured(row) if isinstance(row, dict) else row
        return
    for number, file in enumerate(_pictures(path), start=1):
        caption = file.with_suffix(".txt")
        if not caption.is_file():
            raise EmlocError(f"{file} has no {caption.name} beside it.", "Write one, or move the picture elsewhere.")
        try:
            text = caption.read_text(encoding="utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise EmlocError(f"{caption}: not UTF-8 ({error}).", "Correct it.") from None
        yield number, {"prompt": text, "image": file.name}


def _pictured(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of ``metadata.jsonl`` with the usual columns: scripts of diffusers call the prompt ``text``."""
    aliases = {"file_name": "image", "text": "prompt", "caption": "prompt"}
    return {**{usual: row[name] for name, usual in aliases.items() if name in row}, **row}


def _read_saved(path: Path, split: str) -> Iterator[Numbered]:
    from datasets import DatasetDict, load_from_disk

    try:
        dataset = load_from_disk(str(path))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise EmlocError(
            f"{path} cannot be read as a saved dataset ({first_line(error)}).", "Save it again.", code="damaged"
        ) from None
    if isinstance(dataset, DatasetDict):
        if split not in dataset:
            raise EmlocError(f"{path} has no split {split!r}.", f"Give one of: {', '.join(dataset)}.", code="missing")
        dataset = dataset[split]
    yield from enumerate(_undecoded(dataset), start=1)


def _read_hub(source: str, split: str) -> Iterator[Numbered]:
    """Yield the rows of a split of a dataset of the hub, downloaded unless it is cached."""
    from datasets import load_dataset
    from huggingface_hub import is_offline_mode

    try:
        if not is_offline_mode():
            _require_answer(source)
        dataset = load_dataset(source, split=split)
    except ConnectionError as error:
        require_cache(error)
        raise EmlocError(
            f"There is no file {source}, and the hub could not be reached to look for a dataset of that name.",
            "Check the path, or the connection; with HF_HUB_OFFLINE=1, what was downloaded before is used.",
            code="unavailable",
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        require_cache(error)
        raise EmlocError(
            f"There is no file {source}, and no dataset of that name could be loaded from the hub: {error}",
            "Check the path, or the dataset's id and --split.",
            code="missing",
        ) from error
    yield from enumerate(_undecoded(dataset), start=1)


def _require_answer(source: str) -> None:
    """Ask the hub once: ``load_dataset`` would try again for half a minute.

    Raises:
        ConnectionError: it does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        HfApi().dataset_info(source, timeout=_PATIENCE)
    except (HfHubHTTPError, HFValidationError):
        pass  # load_dataset reports what is wrong with the name
    except Exception as error:  # whatever the HTTP library of this version of huggingface_hub raises
        raise ConnectionError from error


def _undecoded(dataset: Any) -> Any:
    """Return a dataset whose images are stored bytes or paths, decoded only when they are used."""
    from datasets import Image, List

    for name in ("images", "image"):
        feature = dataset.features.get(name)
        if isinstance(feature, Image):
            dataset = dataset.cast_column(name, Image(decode=False))
        elif isinstance(feature, List) and isinstance(feature.feature, Image):
            dataset = dataset.cast_column(name, List(Image(decode=False)))
    return dataset
