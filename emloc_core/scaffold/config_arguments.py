"""The fewest arguments of ``AutoConfig.for_model`` that give the same model as a config."""

import re
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from transformers import AutoConfig

from emloc_core.errors import EmlocError

#: What changes neither a module nor what it computes once it is tuned: the tiny config takes the class's own.
_COSMETIC = re.compile(r"_.*|dtype|architectures|transformers_version|id2label|label2id|use_cache|problem_type")
#: Numbers with a fraction that are of no account in a tiny model with random weights. Multipliers and scalings are.
_COSMETIC_NUMBERS = re.compile(r"\w*(drop|init|eps|_loss|_prob|_std|jitter|_threshold)\w*|time_step_\w+")


def plain(config: Any) -> dict[str, Any]:
    """Return keyword arguments of ``AutoConfig.for_model`` for a model of the same sizes as that of ``config``.

    What equals the default of the config class is left out, and so is what changes no module.
    """
    return needed(structure(config.to_dict()))


def needed(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments without which the config would be another, ``model_type`` first.

    Args:
        sizes: arguments of ``AutoConfig.for_model``.

    Raises:
        EmlocError: transformers refuses them.
    """
    wanted = make_config(sizes).to_dict()
    found = {"model_type": sizes["model_type"], **sizes}
    for path in _removable(sizes):
        fewer = _without(found, path)
        with suppress(EmlocError):
            if make_config(fewer).to_dict() == wanted:
                found = fewer
    return found


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


def large_sizes(content: Mapping[str, Any], at: str = "") -> Iterator[str]:
    """Yield the whole numbers of a config above 512, as ``section.name=value``."""
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from large_sizes(value, f"{at}{name}.")
        elif isinstance(value, int) and value > 512:
            yield f"{at}{name}={value}"


def structure(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a config without what changes no module."""
    kept = {name: value for name, value in content.items() if not _is_cosmetic(str(name), value)}
    return {name: structure(value) if isinstance(value, Mapping) else value for name, value in kept.items()}


def _is_cosmetic(name: str, value: Any) -> bool:
    if name == "rope_parameters":  # a list has an entry for every frequency, of which a tiny head has fewer
        lists = any(isinstance(part, list | tuple) for part in (value or {}).values())
        return not value or (lists and not value.get("mrope_section"))
    if isinstance(value, float):
        return bool(_COSMETIC_NUMBERS.fullmatch(name))
    return bool(_COSMETIC.fullmatch(name))


def _removable(content: Mapping[str, Any], at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the path of every entry, sections before what is in them."""
    for name, value in content.items():
        if (*at, name) != ("model_type",):
            yield (*at, name)
            if isinstance(value, Mapping):
                yield from _removable(value, (*at, name))


def _without(content: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    name, *rest = path
    if not rest:
        return {key: value for key, value in content.items() if key != name}
    if name not in content:  # the section is gone
        return dict(content)
    return {**content, name: _without(content[name], tuple(rest))}
