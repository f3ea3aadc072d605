"""The fewest arguments of ``AutoConfig.for_model`` that give the same model as a config."""

import re
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from transformers import AutoConfig

from emloc_core.errors import EmlocError

#: Fields that change neither modules nor their results after tuning: the tiny config takes the class's defaults.
_COSMETIC = re.compile(r"_.*|dtype|architectures|transformers_version|id2label|label2id|use_cache|problem_type")
#: Floats that do not matter in a tiny model with random weights. Multipliers and scalings do.
_COSMETIC_NUMBERS = re.compile(r"\w*(drop|init|eps|_loss|_prob|_std|jitter|_threshold)\w*|time_step_\w+")


def plain(config: Any) -> dict[str, Any]:
    """Return keyword arguments of ``AutoConfig.for_model`` for a model of the same sizes as ``config``'s.

    Defaults of the config class are left out, and so are fields that change no module.
    """
    return minimal(structure(config.to_dict()))


def minimal(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Return only the arguments that change the config, ``model_type`` first.

    Args:
        sizes: arguments of ``AutoConfig.for_model``.

    Raises:
        EmlocError: transformers refuses them.
    """
    target = make_config(sizes).to_dict()
    arguments = {"model_type": sizes["model_type"], **sizes}
    for path in _removable(sizes):
        fewer = _without(arguments, path)
        with suppress(EmlocError):
            if make_config(fewer).to_dict() == target:
                arguments = fewer
    return arguments


def make_config(arguments: Mapping[str, Any]) -> Any:
    """Return transformers' config of these arguments of ``AutoConfig.for_model``.

    Raises:
        EmlocError: transformers refuses them.
    """
    try:
        return AutoConfig.for_model(**arguments)
    except Exception as error:  # whatever the config class's own checks raise
        raise not_tiny(arguments["model_type"], error) from error


def not_tiny(model_type: str, error: Exception | str) -> EmlocError:
    """Return the error for a config that could not be made tiny."""
    reason = textwrap.shorten(str(error), 400).rstrip(".") or type(error).__name__
    return EmlocError(
        f"The config of this {model_type!r} cannot be shrunk to a tiny one: {reason}.",
        "Make the smallest config.json that the model runs with (few blocks, narrow) and give that file instead.",
        code="unsupported",
    )


def large_sizes(content: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the whole numbers of a config above 512, as ``section.name=value``."""
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from large_sizes(value, f"{prefix}{name}.")
        elif isinstance(value, int) and value > 512:
            yield f"{prefix}{name}={value}"


def structure(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a config without the fields that change no module."""
    structural = {name: value for name, value in content.items() if not _is_cosmetic(str(name), value)}
    return {name: structure(value) if isinstance(value, Mapping) else value for name, value in structural.items()}


def _is_cosmetic(name: str, value: Any) -> bool:
    if name == "rope_parameters":  # a list has an entry for every frequency, of which a tiny head has fewer
        lists = any(isinstance(part, list | tuple) for part in (value or {}).values())
        return not value or (lists and not value.get("mrope_section"))
    if isinstance(value, float):
        return bool(_COSMETIC_NUMBERS.fullmatch(name))
    return bool(_COSMETIC.fullmatch(name))


def _removable(content: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the path of every entry, sections before their entries."""
    for name, value in content.items():
        if (*prefix, name) != ("model_type",):
            yield (*prefix, name)
            if isinstance(value, Mapping):
                yield from _removable(value, (*prefix, name))


def _without(content: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    name, *rest = path
    if not rest:
        return {key: value for key, value in content.items() if key != name}
    if name not in content:  # the section is gone
        return dict(content)
    return {**content, name: _without(content[name], tuple(rest))}
