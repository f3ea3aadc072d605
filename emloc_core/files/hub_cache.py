"""Where Hugging Face's libraries keep what they download and prepare: an error about that place names it."""

import errno
import os
from pathlib import Path

from emloc_core.errors import EmlocError

_UNUSABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}


def require_cache(error: BaseException) -> None:
    """Raise an :class:`EmlocError` if an error, or its cause, is that the place cannot be used."""
    from huggingface_hub.constants import HF_HOME

    caches = {name: os.environ[name] for name in ("HF_DATASETS_CACHE", "HF_HUB_CACHE") if name in os.environ}
    for cause in (error, error.__cause__):
        if not isinstance(cause, OSError) or cause.errno not in _UNUSABLE or cause.filename is None:
            continue
        path = Path(os.fsdecode(cause.filename))
        for name, cache in {**caches, "HF_HOME": HF_HOME}.items():
            if path.is_relative_to(cache) or Path(cache).is_relative_to(path):
                raise EmlocError(
                    f"{path}, for what is downloaded and prepared, cannot be used ({cause.strerror}).",
                    f"Make it writable, or set {name} to another directory.",
                    code="unavailable",
                ) from error
