"""Rows of a hub dataset; :mod:`emloc_core.data.rows` parses them."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from emloc_core.compat.huggingface_hub import offline
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

    try:
        with _offline_if_unreachable(source):
            found = load_dataset(source, split=split)
    except ConnectionError as error:
        raise EmlocError(
            f"There is no file {source}, and the hub could not be reached to look for a dataset of that name.",
            "Check the path, or the connection.",
            code="unavailable",
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise EmlocError(
            f"There is no file {source}, and no dataset of that name could be loaded from the hub: {error}",
            "Check the path, or the dataset's id and --split.",
            code="missing",
        ) from error
    yield from undecoded(found)


@contextmanager
def _offline_if_unreachable(source: str) -> Iterator[None]:
    """Ask the hub once; if it does not answer, use the cache only, without half a minute of retries."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    found: AbstractContextManager[None] = nullcontext()
    try:
        HfApi().dataset_info(source, timeout=_PATIENCE)
    except (HfHubHTTPError, HFValidationError):
        pass  # load_dataset reports what is wrong with the name
    except Exception:  # whatever the HTTP library of this version of huggingface_hub raises without a connection
        found = offline()
    with found:
        yield


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
