"""Models as plans see them, kept in this process and between runs."""

import json
from collections.abc import Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from emloc_core.errors import EmlocError, typed_line
from emloc_core.family import Family
from emloc_core.files.checkpoint import read_config_json
from emloc_core.files.quantised import is_in_four_bits, is_in_mxfp4
from emloc_core.memory.cache import Cache, key
from emloc_core.memory.outline import Outline, described
from emloc_core.plugins.manager import plugin_manager
from emloc_core.standins.format import kind_of
from emloc_core.standins.layer import replace_linear
from emloc_core.standins.nf4 import FourBitLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Fields for which transformers would assume another model's size if they were missing.
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
#: The loss is traced tile by tile of the vocabulary; beyond this, a plan would take minutes.
_LARGEST_VOCABULARY = 10_000_000


class PlannedModel:
    """A model as plans see it.

    Args:
        digest: of its config and family.

    Attributes:
        config: the content of its ``config.json``.
        traces: what steps of it need, by a digest of what was traced.
    """

    config: dict[str, Any]
    config_file: Path
    family: Family

    def __init__(self, digest: str) -> None:
        self.traces, self._outlines = Cache(f"{digest}-traces"), Cache(f"{digest}-outline")

    @cached_property
    def outline(self) -> Outline:
        """Its outline, from the cache or from the model itself.

        Raises:
            EmlocError: the config lacks a field, or transformers cannot build the model.
        """
        try:
            return Outline(self._outlines.values)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):  # nothing is kept, or it is damaged
            self._outlines.add(described(self.model))
            return Outline(self._outlines.values)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of its weights.

        Raises:
            EmlocError: the config does not say.
        """
        return self._dtype_of(self.outline.config)

    def _dtype_of(self, config: Any) -> torch.dtype:
        dtype = self.config.get("dtype") or config.dtype or config.get_text_config().dtype
        if dtype is None:
            raise EmlocError(
                f"{self.config_file} has no dtype.", 'Add the dtype of the weights, such as "dtype": "bfloat16".'
            )
        return getattr(torch, dtype) if isinstance(dtype, str) else dtype

    @cached_property
    def packed(self) -> list[str]:
        """Paths of the Linears that its checkpoint has in four bits; none of an ordinary model.

        Raises:
            EmlocError: they are packed in another way than the kind nf4, or as for :attr:`outline`.
        """
        settings = self.config.get("quantization_config")
        if not settings:
            return []
        from emloc_core.model.packed_checkpoints import packed_linears

        return packed_linears(self.outline, settings)

    @cached_property
    def stored(self) -> Outline:
        """Its outline with the :attr:`packed` Linears in four bits.

        Raises:
            EmlocError: as for :attr:`packed`.
        """
        if not self.packed:
            return self.outline
        outline = Outline(self._outlines.values)
        for path in self.packed:
            replace_linear(outline, path, FourBitLinear)
        return outline

    @cached_property
    def model(self) -> "PreTrainedModel":
        """The model itself, without weights, whose steps can be traced.

        Raises:
            EmlocError: as for the outline.
        """
        from emloc_core.model.skeleton import build_model

        with TemporaryDirectory() as directory:
            file = self.config_file
            if not file.is_file():  # it was written for a registry's entry, and is no longer needed there
                file = Path(directory) / "config.json"
                file.write_text(json.dumps(self.config), encoding="utf-8")
            config = plugin_manager().objective_of(self.family).config(file)
        _require_sizes(self.config_file, self.config, config)
        dtype = self._dtype_of(config)
        try:
            return build_model(config, self.family, dtype)
        except Exception as error:  # the model's own code may raise anything on bad values
            raise EmlocError(
                f"The model of {self.config_file} cannot be built ({typed_line(error.__cause__ or error)}).",
                "Check the values in the file.",
            ) from error


_cached = lru_cache(maxsize=8)(PlannedModel)


def planned_model(config_file: Path) -> PlannedModel:
    """Return the model of a ``config.json`` as plans see it.

    Raises:
        EmlocError: no family declares it, it is an emulator, or it is quantised and not in four bits.
    """
    raw = read_config_json(config_file)
    family = plugin_manager().family_for(raw)
    dtype = plugin_manager().objective_of(family).dtype(config_file)
    if dtype is not None:
        raw = {"dtype": dtype, **raw}
    if is_in_mxfp4(raw):
        raw = {name: value for name, value in raw.items() if name != "quantization_config"}
    if raw.get("quantization_config"):
        _require_base(raw, config_file)
    planned = _cached(key(raw, family))
    planned.config, planned.config_file, planned.family = raw, config_file, family
    return planned


def _require_base(raw: Mapping[str, Any], config_file: Path) -> None:
    """Refuse an emulator, and a base that is quantised to anything but four bits."""
    is_emulator = kind_of(raw) is not None
    if is_emulator or not is_in_four_bits(raw):
        raise EmlocError(
            f"The model of {config_file} is {'an emulator' if is_emulator else 'quantised, and not in four bits'}.",
            "Give the original model.",
            code="unsupported",
        )


def _require_sizes(config_file: Path, raw: Mapping[str, Any], config: Any) -> None:
    """Refuse a config without its sizes, for which transformers would use its own defaults."""
    sections = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", {})}
    for name, section in sections.items():
        if section is not None:
            values = raw.get(name)
            if name == "text_config" and values is None:  # published at the top level, which transformers accepts
                values = raw
            if not isinstance(values, dict):
                raise EmlocError(f"{config_file} has no {name}.", "Add it, or download the file again.")
            _require_fields(config_file, values, section, f"{name}.")
    if not sections:
        _require_fields(config_file, raw, config, "")


def _require_fields(config_file: Path, raw: Mapping[str, Any], config: Any, prefix: str) -> None:
    renamed = getattr(config, "attribute_map", {})
    for name in _SIZES:
        derived = isinstance(getattr(type(config), name, None), property)  # from other fields
        if hasattr(config, name) and not derived and name not in raw and renamed.get(name) not in raw:
            raise EmlocError(f"{config_file} has no {prefix}{name}.", "Add it, or download the file again.")
    # If it is missing, some classes use the number of heads, and others assume a number.
    if "num_key_value_heads" not in raw and isinstance(getattr(type(config), "num_key_value_heads", None), int):
        raise EmlocError(f"{config_file} has no {prefix}num_key_value_heads.", "Add it, or download the file again.")
    if isinstance(vocabulary := getattr(config, "vocab_size", None), int) and vocabulary > _LARGEST_VOCABULARY:
        raise EmlocError(
            f"{config_file}: {prefix}vocab_size is {vocabulary:,}, more than any model has.",
            "Check the values in the file.",
        )
    heads, shared = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if isinstance(heads, int) and isinstance(shared, int) and (shared < 1 or heads % shared):
        raise EmlocError(
            f"{config_file}: {prefix}num_attention_heads is {heads}, not a multiple of num_key_value_heads, {shared}.",
            "Check the values in the file.",
        )
