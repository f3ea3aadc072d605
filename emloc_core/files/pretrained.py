"""The one place where transformers and PEFT load what somebody else has made: configs, tokenizers, models, adapters.

No Python that comes with a model is ever run, nobody is asked whether it may be, and a file of a model cannot make
anything be fetched. Everything else gets what is loaded here as objects, never as paths that would be loaded again.
"""

import importlib.util
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import AutoConfig, PreTrainedModel, dynamic_module_utils

from emloc_core.errors import EmlocError, first_line
from emloc_core.files.limits import limited
from emloc_core.files.output import read_object
from emloc_core.files.own import require_own_files
from emloc_core.files.patterns import pattern_problems
from emloc_core.files.templates import bound_templates

#: What is said to every loader.
_NOTHING_FOREIGN: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
#: The implementations that transformers itself has; any other name is that of a repository of compiled code.
_BUILT_IN = {
    "attn_implementation": {None, "eager", "sdpa", "flex_attention"},
    "experts_implementation": {None, "eager", "batched_mm", "grouped_mm"},
}
#: What a config may take: seconds, bytes to be read, bytes to be built without weights, modules.
_SECONDS, _CONFIG_BYTES, _MODEL_BYTES, _MODULES = 60.0, 512 << 20, 4 << 30, 200_000
#: Fields that count parts of a model, which are made one by one, and more than any has.
_COUNTS, _MOST = re.compile(r"(layers?|depths?|blocks?|experts)$"), 10_000
_FLASH = {f"flash_attention_{version}" for version in (2, 3, 4)}
#: Methods of quantisation whose loading reads the model's own files alone.
_QUANTISED = {"emloc", "bitsandbytes"}

# Where a class is loaded for a part of a model, no argument of ours arrives. Transformers asks on the terminal then,
# for so many seconds; of none it makes an error.
dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
bound_templates()


def load_config(path: Path) -> Any:
    """Return transformers' config of the file at ``path``.

    Raises:
        EmlocError: transformers does not know the architecture, or refuses the file; or it names code to be fetched.
    """
    _check(read_object(path), str(path))
    try:
        with limited(f"Reading {path}", _SECONDS, _CONFIG_BYTES):
            return AutoConfig.from_pretrained(path, **_NOTHING_FOREIGN)
    except EmlocError:
        raise
    except Exception as error:  # whatever transformers' own checks of a config raise
        _refuse_own_code(error, path, "config")
        raise EmlocError(
            f"transformers cannot read {path}: {first_line(error)}",
            "Check the file. Code that a model brings is never run: it needs an architecture that transformers has.",
        ) from error


def make_config(arguments: Mapping[str, Any]) -> Any:
    """Return transformers' config of the content of a ``config.json``.

    Raises:
        EmlocError: it names code to be fetched.
        Exception: whatever transformers' own checks of a config raise.
    """
    _check(arguments, "the config")
    with limited("Reading the config", _SECONDS, _CONFIG_BYTES):
        return AutoConfig.for_model(**arguments)


def auto_class(name: str) -> Any:
    """Return the class of transformers of this name, such as ``AutoModelForCausalLM``; None where there is none."""
    return getattr(transformers, name, None)


def new_model(name: str, config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model of a config, with the weights that its class starts with.

    Args:
        name: of the class of transformers.
        config: transformers' config.
        dtype: of its weights.

    Raises:
        EmlocError: the sizes in the config are such as no model has.
        Exception: whatever transformers raises.
    """
    with limited("Building the model of this config", _SECONDS, _MODEL_BYTES), _few_modules():
        model: PreTrainedModel = auto_class(name).from_config(config, dtype=dtype, trust_remote_code=False)
    return model


def load_model(name: str, directory: Path, **settings: Any) -> Any:
    """Return the model, or emulator, in a directory, in the dtype that it is stored in.

    Args:
        name: of the class of transformers.
        directory: of the model.
        settings: further ones of ``from_pretrained``.

    Raises:
        EmlocError: it brings code of its own, is quantised by a method that is not known to read its own files alone,
            or has an adapter in it, which transformers would put on it without a word.
        Exception: whatever transformers raises.
    """
    import emloc_core.lowrank  # noqa: F401 - with it, from_pretrained reads emulators too

    require_own_files(directory, ["*"])
    config = load_config(directory / "config.json")
    _require_plain(config, directory)
    settings = {"dtype": "auto", "use_safetensors": True, **settings, **_NOTHING_FOREIGN}
    try:
        return auto_class(name).from_pretrained(str(directory), config=config, **settings)
    except ValueError as error:
        _refuse_own_code(error, directory, "model")
        raise


def load_processing(name: str, directory: Path) -> Any:
    """Return the tokenizer or processor in a directory.

    Args:
        name: of the class of transformers, ``AutoTokenizer`` or ``AutoProcessor``.
        directory: of the model.

    Raises:
        EmlocError: it brings code of its own, or names another model to be loaded.
        Exception: whatever transformers raises.
    """
    require_own_files(directory, ["*"])
    processor = directory / "processor_config.json"
    if processor.is_file() and "audio_tokenizer" in read_object(processor):
        raise EmlocError(f"{processor} names another model, which would be loaded.", "Use a model without it.")
    what = name.removeprefix("Auto").lower()
    try:
        return auto_class(name).from_pretrained(str(directory), **_NOTHING_FOREIGN)
    except ValueError as error:
        _refuse_own_code(error, directory, what)
        raise


def load_gguf(name: str, file: Path, **settings: Any) -> Any:
    """Return the model or tokenizer in a GGUF file: by ``AutoTokenizer`` the latter.

    Args:
        name: of the class of transformers.
        file: a file that a package brings, say.
        settings: further ones of ``from_pretrained``.
    """
    return auto_class(name).from_pretrained(str(file.parent), gguf_file=file.name, **settings, **_NOTHING_FOREIGN)


def load_lora(model: Any, directory: Path, *, is_trainable: bool = False) -> Any:
    """Return a model with the LoRA in a directory on it, as a ``PeftModel``.

    Args:
        model: that it was trained for.
        directory: of the LoRA.
        is_trainable: whether it is to be trained on.

    Raises:
        EmlocError: it is no LoRA, or not in safetensors: of other adapters some load further models, or
            pickles; or a pattern in its config might never end.
        Exception: whatever PEFT raises.
    """
    from peft import PeftModel

    require_own_files(directory, ["*"])
    config = read_object(directory / "adapter_config.json")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise EmlocError(f"The adapter {directory} is a {kind}, and only LoRAs are loaded.", "Train a LoRA.")
    if not (directory / "adapter_model.safetensors").is_file():
        raise EmlocError(f"{directory} has no adapter_model.safetensors.", "Save the LoRA in safetensors.")
    if problems := pattern_problems(config):
        raise EmlocError(f"The adapter {directory} cannot be used: {problems[0]}.", "Name the modules in full.")
    return PeftModel.from_pretrained(model, str(directory), is_trainable=is_trainable, local_files_only=True)


@contextmanager
def _few_modules() -> Iterator[None]:
    """Refuse to build a model of more modules than any has: each costs time, though its weights take no memory."""
    made = 0

    def count(*_: object) -> None:
        nonlocal made
        made += 1
        if made > _MODULES:
            raise EmlocError(
                f"The config asks for a model of more than {_MODULES:,} modules, and none has so many.",
                "Check its numbers of layers and experts.",
            )

    handle = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _check(content: Any, where: str) -> None:
    """Refuse a config of which some part names an implementation to be fetched, or counts more than any model has."""
    for key, value in _fields(content):
        if _COUNTS.search(key) and isinstance(value, int) and value > _MOST:
            raise EmlocError(f"{key} in {where} is {value:,}, and no model has so many.", "Correct the config.")
        name = key.strip("_").removesuffix("_internal")
        if name in _BUILT_IN and not set(_names(value)) <= _BUILT_IN[name] | (_FLASH if _has_flash() else set()):
            raise EmlocError(
                f"{key} in {where} is {value!r}, which is not built into transformers: it would be fetched and run.",
                f"Remove it, or set it to one of {', '.join(sorted(filter(None, _BUILT_IN[name])))}.",
            )


def _fields(content: Any) -> Iterator[tuple[str, Any]]:
    """Return every key with its value, at any depth of a JSON document."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield key, value
            yield from _fields(value)
    elif isinstance(content, list):
        for value in content:
            yield from _fields(value)


def _names(value: Any) -> list[str | None]:
    """Return the names of implementations: one for the model, or one for each of its parts."""
    given = list(value.values()) if isinstance(value, Mapping) else [value]
    return [name if name is None else str(name) for name in given]


def _has_flash() -> bool:
    """Say whether flash attention is what is installed. With the package kernels alone transformers fetches it."""
    return importlib.util.find_spec("flash_attn") is not None or importlib.util.find_spec("kernels") is None


def _require_plain(config: Any, directory: Path) -> None:
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised.quant_method
        if method not in _QUANTISED:
            raise EmlocError(
                f"{directory} is quantised by {method!r}, which is not known to need its own files alone.",
                "Give the unquantised model.",
            )
    if (directory / "adapter_config.json").exists():
        raise EmlocError(
            f"{directory} holds a model and an adapter, which would be put on the model whenever it is loaded.",
            "Keep the adapter in a directory of its own.",
        )


def _refuse_own_code(error: Exception, place: Path, what: str) -> None:
    """Raise the user's error if this is transformers' complaint that it may not run a model's code."""
    if "trust_remote_code" in str(error) or "custom code" in str(error):
        raise EmlocError(
            f"The {what} in {place} needs Python code of its own, which is never run.",
            f"Use a model whose {what} transformers has.",
        ) from error
