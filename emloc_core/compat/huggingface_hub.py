"""huggingface_hub and datasets: working offline, which both read from the environment as they are imported."""

from collections.abc import Iterator
from contextlib import contextmanager

from emloc_core.compat.private import private


@contextmanager
def offline() -> Iterator[None]:
    """Use caches alone: no request is made, none is retried."""
    import datasets.config
    from huggingface_hub import constants

    with private("huggingface_hub"):
        ours = constants.HF_HUB_OFFLINE
    with private("datasets"):
        theirs = datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = ours, theirs
