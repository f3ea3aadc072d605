"""Rows of a hub dataset; :mod:`emloc_core.data.rows` parses them."""

from collections.abc import Iterator
from typing import Any

from emloc_core.errors import EmlocError

_PATIENCE = 10.0  # seconds to wait for the hub


def read_data_set(source: str, split: str) -> Iterator[Any]:
    """Yield the rows of a split of a dataset, downloaded unless it is cached.

    Args:
        source: id of the dataset, ``organisation/name``.
        split: name of the split, such as ``train``.

    Raises:
        EmlocError: there is neither a file nor a dataset of this name, or the hub cannot be reached.
    """
    from datasets import load_dataset
    from huggingface_hub import is_offline_mode

    try:
        if not is_offline_mode():
            _require_answer(source)
        found = load_dataset(source, split=split)
    except ConnectionError as error:
        raise EmlocError(
            f"There is no file {source}, and the hub could not be reached to look for a dataset of that name.",
            "Check the path, or the connection; with HF_HUB_OFFLINE=1, what was downloaded before is used.",
            code="unavailable",
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise EmlocError(
            f"There is no file {source}, and no dataset of that name could be loaded from the hub: {error}",
            "Check the path, or the dataset's id and --split.",
            code="missing",
        ) from error
    yield from undecoded(found)


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


def undecoded(found: Any) -> Any:
    """Return a dataset whose images are stored bytes or paths, decoded only when they are used."""
    from datasets import Image, List

    for name in ("images", "image"):
        feature = found.features.get(name)
        if isinstance(feature, Image):
            found = found.cast_column(name, Image(decode=False))
        elif isinstance(feature, List) and isinstance(feature.feature, Image):
            found = found.cast_column(name, List(Image(decode=False)))
    return found
