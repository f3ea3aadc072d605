"""Limits that a model's config sets for rows."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Limits:
    """Limits of a model, each None if its config sets none.

    Attributes:
        tokens: the longest row.
        vocabulary: the number of token ids.
    """

    tokens: int | None = None
    vocabulary: int | None = None

    @classmethod
    def for_config(cls, config: Any) -> "Limits":
        """Return the limits of a config's model."""
        text = config.get_text_config()
        sizes = (getattr(text, name, None) for name in ("max_position_embeddings", "vocab_size"))
        return cls(*(size if isinstance(size, int) and size > 0 else None for size in sizes))  # -1 is no limit
