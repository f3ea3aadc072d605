"""Rows of a data set of the hub; what is in the rows is for :mod:`emloc_core.data.rows`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from emloc_core.errors import EmlocError

_PATIENCE = 10.0  # seconds in which the hub has to answer


def read_data_set(source: str, split: str) -> Iterator[Any]:
    """Yield the rows of a split of a data set, fetched where it is not in the cache.

    Args:
        source: its id, ``organisation/name``.
        split: ``train``, say.

    Raises:
        EmlocError: there is no such data set, or the hub cannot be reached; says that there is no such file either.
    """
    from datasets import load_dataset

    try:
        with _offline_if_unreachable(source):
            found = load_dataset(source, split=split)
    except ConnectionError as error:
        raise EmlocError(
            f"There is no file {source}, and the hub could not be reached to look for a data set of that name.",
            "Check the path, or the connection.",
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise EmlocError(
            f"There is no file {source}, and no data set of that name could be loaded from the hub: {error}",
            "Check the path, or the data set's id and --split.",
        ) from error
    yield from _undecoded(found)


@contextmanager
def _offline_if_unreachable(source: str) -> Iterator[None]:
    """Ask the hub once; where it does not answer, what is cached is looked for, without half a minute of retries."""
    import datasets.config
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    saved = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    try:
        HfApi().dataset_info(source, timeout=_PATIENCE)
    except (HfHubHTTPError, HFValidationError):
        pass  # load_dataset says what is wrong with the name
    except Exception:  # whatever the HTTP library of this version of huggingface_hub raises without a connection
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = saved


def _undecoded(found: Any) -> Any:
    """Return a data set whose images are bytes or paths, as they are stored: they are decoded when they are used."""
    from datasets import Image, List

    for name in ("images", "image"):
        feature = found.features.get(name)
        if isinstance(feature, Image):
            found = found.cast_column(name, Image(decode=False))
        elif isinstance(feature, List) and isinstance(feature.feature, Image):
            found = found.cast_column(name, List(Image(decode=False)))
    return found
