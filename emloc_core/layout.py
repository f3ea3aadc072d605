"""A plugin's declaration of other layouts than transformers' own. Data; imports no torch.

They hold the same weights under other names, some of them fused: checkpoints that ``emloc import`` converts to the
native layout, and GGUF, which ``emloc export`` writes.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emloc_core.family import CHECKED


@dataclass(frozen=True)
class Split:
    """A fused tensor that holds several tensors of the native model.

    Attributes:
        pattern: regular expression that matches its full key.
        targets: the native keys of its parts, with the pattern's groups as in ``re.Match.expand``.
        parts: given the tensor and the source's config, yields the parts in the order of ``targets``, as views or as
            copies made lazily. First called with a tensor on the meta device, to get their shapes.
    """

    __pydantic_config__ = CHECKED

    pattern: str
    targets: Sequence[str]
    parts: Callable[[Any, Mapping[str, Any]], Iterable[Any]]


@dataclass(frozen=True)
class Layout:
    """How to convert checkpoints with another layout to the native one.

    Attributes:
        name: the layout's name, unique among the installed plugins.
        model_types: values of ``model_type`` in ``config.json`` that it reads.
        config: given the content of that file and its directory, returns the native ``config.json``. Raises
            :class:`~emloc_core.errors.EmlocError`, naming the field, for a value that the native model does not allow.
        renames: pairs of a regular expression that matches a full key and the native key, with the pattern's groups;
            the first match applies. A tensor that matches neither these nor ``splits`` is an error: nothing is dropped.
        splits: the fused tensors; matched before ``renames``.
        files: called like ``config``, returns files to write instead of the source's, by name: JSON objects, text, or
            None to leave a file out. All other files except weights are copied.
    """

    __pydantic_config__ = CHECKED

    name: str
    model_types: frozenset[str] | set[str]
    config: Callable[[Mapping[str, Any], Path], dict[str, Any]]
    renames: Sequence[tuple[str, str]]
    splits: Sequence[Split] = ()
    files: Callable[[Mapping[str, Any], Path], Mapping[str, dict[str, Any] | str | None]] = lambda _config, _path: {}

    def native_keys(self, key: str) -> tuple[list[str], Split | None] | None:
        """Return the native keys for the tensor ``key``, and how to split it; None for an unknown tensor."""
        for split in self.splits:
            if match := re.fullmatch(split.pattern, key):
                return [match.expand(target) for target in split.targets], split
        for pattern, target in self.renames:
            if match := re.fullmatch(pattern, key):
                return [match.expand(target)], None
        return None


@dataclass(frozen=True)
class Gguf:
    """How a text model is written for llama.cpp by ``emloc export --gguf``.

    Attributes:
        architectures: ``model_type`` -> llama.cpp's name of the architecture, as in the package ``gguf``.
        paired: ends of the paths of Linears whose outputs llama.cpp rotates in adjacent pairs, while transformers
            rotates the halves of a head: their rows are reordered.
        splits: how a byte-level tokenizer splits text before BPE -> llama.cpp's name for it. The key joins the
            pre-tokenizer's parts by ``+``: the regular expression of a split, ``digits``, and ``words`` for GPT-2's.
    """

    __pydantic_config__ = CHECKED

    architectures: Mapping[str, str]
    paired: Sequence[str] = ()
    splits: Mapping[str, str] = field(default_factory=dict)
