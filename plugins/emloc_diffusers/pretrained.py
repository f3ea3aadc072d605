"""The only module of the plugin that builds and loads transformers and parts of pipelines.

As in :mod:`emloc_core.files.pretrained`: no code of their own is run, no pickle is read, nothing is downloaded.
"""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from emloc_core.compat import halves
from emloc_core.compat.torch import tree_map
from emloc_core.errors import EmlocError, first_line
from emloc_core.files.limits import limited
from emloc_core.files.own import require_own_files

if TYPE_CHECKING:
    import torch

#: Limits for building a model without weights: seconds, and bytes.
_SECONDS, _BYTES = 60.0, 4 << 30


def library() -> Any:
    """Return diffusers.

    Raises:
        EmlocError: it is not installed.
    """
    try:
        import diffusers
    except ImportError as error:
        raise EmlocError(
            f"Transformers that draw need the package diffusers ({first_line(error)}).",
            "pip install 'emloc[diffusion]'",
            code="unavailable",
        ) from error
    return diffusers


def new_transformer(class_name: str, config: Mapping[str, Any], dtype: "torch.dtype") -> Any:
    """Return a transformer with initial weights.

    Raises:
        EmlocError: diffusers does not have the class, or cannot build it.
    """
    kind = getattr(library(), class_name, None)
    if kind is None:
        raise EmlocError(f"This version of diffusers has no {class_name}.", "pip install --upgrade diffusers")
    parameters = inspect.signature(kind.__init__).parameters  # an emulator's config has more
    arguments = {name: value for name, value in config.items() if name in parameters}
    try:
        with limited("Building the model of this config", _SECONDS, _BYTES):
            model = kind.from_config(arguments)
    except EmlocError:
        raise
    except Exception as error:  # sizes that do not fit each other, negative ones, ...
        raise EmlocError(
            f"diffusers cannot build {class_name} from the config ({first_line(error)}).",
            "Check that the config.json belongs to the model.",
        ) from error
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.to(dtype), requires_grad=False))
    for module in model.children():
        if next(module.parameters(), None) is None:
            module.register_forward_hook(_copied)
    return model


def _copied(_module: nn.Module, _args: Any, output: Any) -> Any:
    """Copy the output of a module without weights, a table that it reuses: samples that wait need their own."""
    return tree_map(lambda leaf: leaf.clone() if hasattr(leaf, "clone") else leaf, output)


def load_part(owner: str, class_name: str, directory: Path, dtype: "torch.dtype | None" = None) -> Any:
    """Return a part of a pipeline.

    Args:
        owner, class_name: library and class, as the pipeline's index names them.
        directory: directory of the part.
        dtype: dtype of a part of diffusers; None for fp32. Parts of transformers keep their stored dtype.

    Raises:
        EmlocError: neither transformers nor diffusers has the class, or the part cannot be loaded.
    """
    import emloc_diffusers.quantizer  # noqa: F401 - with it, from_pretrained reads emulators too

    kind = _class_of(owner, class_name, directory)
    require_own_files(directory, ["*"])
    settings: dict[str, Any] = {"local_files_only": True}
    if owner == "transformers":
        settings["trust_remote_code"] = False
    if hasattr(kind, "forward"):
        settings |= {"use_safetensors": True, "torch_dtype": "auto" if owner == "transformers" else dtype}
    try:
        part = kind.from_pretrained(str(directory), **settings)
    except Exception as error:  # whatever the libraries raise for a damaged file
        raise EmlocError(
            f"{directory} cannot be loaded ({first_line(error)}).", "Download or copy it again.", code="damaged"
        ) from error
    if hasattr(part, "dtype"):
        halves.serve(part.dtype)
    return part


def _class_of(owner: str, class_name: str, directory: Path) -> Any:
    import transformers

    libraries: dict[str, Any] = {"transformers": transformers, "diffusers": library()}
    kind = getattr(libraries.get(owner), class_name, None)
    if not hasattr(kind, "from_pretrained"):
        raise EmlocError(
            f"{directory} has a {owner}.{class_name}, which neither transformers nor diffusers has.",
            "Use a pipeline without code of its own.",
            code="refused",
        )
    return kind
