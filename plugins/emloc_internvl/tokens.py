"""The ids of the tokens that a model adds to its tokenizer, from the files alone."""

from pathlib import Path

from emloc_core.errors import EmlocError
from emloc_core.files.documents import read_object


def token_ids(directory: Path) -> dict[str, int]:
    """Return the ids of added tokens, from all tokenizer files that have them.

    Raises:
        EmlocError: a file is damaged.
    """
    ids: dict[str, int] = {}
    try:
        for entry in _read(directory / "tokenizer.json").get("added_tokens", []):
            ids[entry["content"]] = int(entry["id"])
        for index, entry in _read(directory / "tokenizer_config.json").get("added_tokens_decoder", {}).items():
            ids[entry["content"]] = int(index)
        for token, index in _read(directory / "added_tokens.json").items():
            ids[token] = int(index)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise EmlocError(
            f"The tokenizer's files in {directory} are damaged ({type(error).__name__}: {error}).", "Copy them again."
        ) from None
    return ids


def require_token(directory: Path, token: str) -> int:
    """Return the id of ``token``.

    Raises:
        EmlocError: no file names it.
    """
    ids = token_ids(directory)
    if token not in ids:
        raise EmlocError(
            f"The tokenizer in {directory} has no token {token}.",
            "Copy the tokenizer's files (tokenizer_config.json, added_tokens.json) that were published with the model.",
        )
    return ids[token]


def _read(path: Path) -> dict:
    return read_object(path) if path.is_file() else {}
