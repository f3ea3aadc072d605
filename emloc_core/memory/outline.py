"""A model's outline: its modules and the shapes of its parameters, as JSON and as torch modules that compute nothing.

Plans need no more of a model, unless a step has to be traced, and transformers takes seconds to be imported.
"""

import json
from collections.abc import Mapping
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from emloc_core.compat.torch import children
from emloc_core.compat.transformers import laid_out_otherwise
from emloc_core.standins.vocabulary import vocabulary_layers

#: Classes that code asks for; an outline's modules are instances of these, under the names of their own classes.
_CLASSES = {
    "linear": nn.Linear,
    "embedding": nn.Embedding,
    "convolution": nn.Conv1d,
    "transposed": nn.ConvTranspose1d,
    "list": nn.ModuleList,
    "other": nn.Module,
}


class Config(SimpleNamespace):
    """What transformers' config of a model says, with its parts in place of their dictionaries."""

    def get_text_config(self) -> "Config":
        """Return the part for the language model, or the whole."""
        return getattr(self, self.text_part) if self.text_part else self


class Outline(nn.Module):
    """The outline of a transformers model, with as much of its interface as plans need.

    Args:
        content: see :func:`described`.

    Attributes:
        replaced_by_bitsandbytes: paths of modules that differ where bitsandbytes quantises the model.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        super().__init__()
        self.config, self._ends = _config(content["config"]), content["ends"]
        self.replaced_by_bitsandbytes: list[str] = content["replaced_by_bitsandbytes"]
        shared: dict[str, nn.Parameter] = {}
        _fill(self, content["model"], shared)

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the output projection, if there is one."""
        return self.get_submodule(self._ends["head"]) if "head" in self._ends else None

    def get_input_embeddings(self) -> nn.Module | None:
        """Return the token embeddings, if there are any."""
        return self.get_submodule(self._ends["embedding"]) if "embedding" in self._ends else None


def described(model: Any) -> dict[str, Any]:
    """Return the outline of a model as JSON values.

    Args:
        model: transformers' model; meta tensors suffice.
    """
    names: dict[int, str] = {}
    ends = {"embedding" if isinstance(layer, nn.Embedding) else "head": path
            for path, layer in vocabulary_layers(model).items()}  # fmt: skip
    return {
        "config": _config_values(model.config),
        "ends": ends,
        "replaced_by_bitsandbytes": laid_out_otherwise(model, "bitsandbytes"),
        "model": _described(model, "", names),
    }


def _config_values(config: Any) -> dict[str, Any]:
    """Return a config as JSON values, with its fields under their other names too."""
    if isinstance(config, Mapping):  # not transformers'
        return {**json.loads(json.dumps(config)), "text_part": None}
    values = json.loads(config.to_json_string(use_diff=False))
    values |= {name: values[field] for name, field in config.attribute_map.items() if field in values}
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    values |= {name: _config_values(part) for name, part in parts.items() if part is not None}
    text = config.get_text_config()
    return {**values, "text_part": next((name for name, part in parts.items() if part is text), None)}


def _config(values: Mapping[str, Any]) -> Config:
    return Config(**{name: _config(value) if _is_part(value) else value for name, value in values.items()})


def _is_part(value: Any) -> bool:
    return isinstance(value, dict) and "text_part" in value


def _described(module: nn.Module, path: str, names: dict[int, str]) -> dict[str, Any]:
    """Return a module with all below it, in order; ``names`` has the parameters seen so far: tied ones are one."""
    parameters = []
    for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
        first = names.setdefault(id(parameter), f"{path}{name}")
        parameters.append([name, first, list(parameter.shape), str(parameter.dtype).removeprefix("torch.")])
    attributes = {name: value for name, value in vars(module).items() if _is_plain(name, value)}
    if isinstance(module, nn.Linear):  # some models compute them, as other numbers than Python's
        attributes |= {name: int(getattr(module, name)) for name in ("in_features", "out_features")}
    return {
        "class": type(module).__name__,
        "kind": next(kind for kind, base in _CLASSES.items() if isinstance(module, base)),
        "attributes": attributes,
        "parameters": parameters,
        "modules": [[name, _described(child, f"{path}{name}.", names)] for name, child in children(module)],
    }


def _is_plain(name: str, value: Any) -> bool:
    """Return whether an attribute is a number, a switch, or a list of numbers, such as the blocks of DeepStack."""
    numbers = value if isinstance(value, list | tuple) else [value]
    return not name.startswith("_") and name != "training" and all(isinstance(number, int) for number in numbers)


def _fill(module: nn.Module, content: Mapping[str, Any], shared: dict[str, nn.Parameter]) -> None:
    for name, value in content["attributes"].items():
        setattr(module, name, value)
    for name, first, shape, dtype in content["parameters"]:
        if first not in shared:
            empty = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
            shared[first] = nn.Parameter(empty, requires_grad=False)
        module.register_parameter(name, shared[first])
    if isinstance(module, nn.Linear) and not hasattr(module, "bias"):
        module.register_parameter("bias", None)
    for name, child in content["modules"]:
        kind = _class(child["class"], child["kind"])
        submodule = kind.__new__(kind)
        nn.Module.__init__(submodule)
        module.add_module(name, submodule)
        _fill(submodule, child, shared)


@cache
def _class(name: str, kind: str) -> type[nn.Module]:
    return type(name, (_CLASSES[kind],), {})
