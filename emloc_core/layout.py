"""What a plugin declares about checkpoints that transformers' own classes do not read. Data; imports no torch.

The same weights under other names, some of them fused: ``emloc import`` rewrites them as the native model has them.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emloc_core.family import CHECKED


@dataclass(frozen=True)
class Split:
    """A tensor that holds several of the native model's.

    Attributes:
        pattern: regular expression of its whole key.
        targets: the native keys of its parts, with the pattern's groups as in ``re.Match.expand``.
        parts: given the tensor and the source's config, yields the parts in the order of ``targets``: views, or
            copies made when they are asked for. It is called with a tensor on the meta device first, for their shapes.
    """

    __pydantic_config__ = CHECKED

    pattern: str
    targets: Sequence[str]
    parts: Callable[[Any, Mapping[str, Any]], Iterable[Any]]


@dataclass(frozen=True)
class Layout:
    """How checkpoints of another layout become native ones.

    Attributes:
        name: the layout's name, unique among the installed plugins.
        model_types: values of ``model_type`` in the ``config.json`` that it reads.
        config: given the content of that file and its directory, returns the native ``config.json``. It raises
            :class:`~emloc_core.errors.EmlocError` with the name of a field whose value the native model cannot have.
        renames: (regular expression of a whole key, native key with the pattern's groups): the first that matches
            holds. A tensor that neither these nor ``splits`` match is refused: nothing is dropped.
        splits: the fused tensors; they go before ``renames``.
        files: given the same as ``config``, returns by name the files that are written instead of the source's: JSON
            objects, text, or None for a file that is left out. Everything else that is not weights is copied.
    """

    __pydantic_config__ = CHECKED

    name: str
    model_types: frozenset[str] | set[str]
    config: Callable[[Mapping[str, Any], Path], dict[str, Any]]
    renames: Sequence[tuple[str, str]]
    splits: Sequence[Split] = ()
    files: Callable[[Mapping[str, Any], Path], Mapping[str, dict[str, Any] | str | None]] = lambda _config, _path: {}

    def place(self, key: str) -> tuple[list[str], Split | None] | None:
        """Return the native keys of what the tensor ``key`` holds, and how it is split; None for an unknown tensor."""
        for split in self.splits:
            if match := re.fullmatch(split.pattern, key):
                return [match.expand(target) for target in split.targets], split
        for pattern, target in self.renames:
            if match := re.fullmatch(pattern, key):
                return [match.expand(target)], None
        return None
