"""The only place where transformers and PEFT load untrusted configs, tokenizers, models and adapters.

Python code that comes with a model is never run, not even after a prompt, and no file of a model can cause a download.
All other modules receive what is loaded here as objects, never as paths that would be loaded again.
"""

import importlib.util
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import SafetensorError
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import AutoConfig

from emloc_core.compat.transformers import never_ask_for_code
from emloc_core.errors import EmlocError, first_line
from emloc_core.files.documents import read_config, read_object
from emloc_core.files.limits import limited
from emloc_core.files.lora import CONFIG, require_lora
from emloc_core.files.own import require_own_files
from emloc_core.files.patterns import pattern_problems
from emloc_core.files.templates import bound_templates

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Arguments for every loader.
_NOTHING_FOREIGN: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
#: The implementations built into transformers; any other name is a repository of compiled code.
_BUILT_IN = {
    "attn_implementation": {None, "eager", "sdpa", "flex_attention"},
    "experts_implementation": {None, "eager", "batched_mm", "grouped_mm"},
}
#: Limits for a config: seconds, bytes to read it, bytes to build its model without weights, modules.
_SECONDS, _CONFIG_BYTES, _MODEL_BYTES, _MODULES = 60.0, 512 << 20, 4 << 30, 200_000
#: Fields that count parts of a model, which may be built one by one, and a number that no model reaches. Experts that
#: are rows of one matrix number more than ten thousand; experts that are modules are counted as they are built.
_COUNTS = {re.compile(r"(layers?|depths?|blocks?)$"): 10_000, re.compile(r"experts$"): 100_000}
_FLASH = {f"flash_attention_{version}" for version in (2, 3, 4)}
#: Quantisation methods whose loaders read only the model's own files.
_QUANTISED = {"emloc", "bitsandbytes"}

never_ask_for_code()
bound_templates()


def load_config(path: Path) -> Any:
    """Return transformers' config for the file at ``path``.

    Raises:
        EmlocError: transformers does not know the architecture or rejects the file, or it names code to download.
    """
    _check(read_config(path), str(path))
    try:
        with limited(f"Reading {path}", _SECONDS, _CONFIG_BYTES):
            return AutoConfig.from_pretrained(path, **_NOTHING_FOREIGN)
    except EmlocError:
        raise
    except Exception as error:  # transformers' checks of a config raise exceptions of any type
        _refuse_own_code(error, path, "config")
        raise EmlocError(
            f"transformers cannot read {path}: {first_line(error)}",
            "Check the file. Code that comes with a model is never run: its architecture must be built into "
            "transformers.",
            code="unsupported",
        ) from error


def make_config(arguments: Mapping[str, Any]) -> Any:
    """Return transformers' config for the content of a ``config.json``.

    Raises:
        EmlocError: it names code to download.
        Exception: transformers rejects the config.
    """
    _check(arguments, "the config")
    with limited("Reading the config", _SECONDS, _CONFIG_BYTES):
        return AutoConfig.for_model(**arguments)


def auto_class(name: str) -> Any:
    """Return the transformers class of this name, such as ``AutoModelForCausalLM``; None if there is none."""
    return getattr(transformers, name, None)


def new_model(name: str, config: Any, dtype: torch.dtype) -> "PreTrainedModel":
    """Return a model for a config, with initial weights.

    Raises:
        EmlocError: the sizes in the config are larger than any model's, or transformers cannot build it.
    """
    try:
        with limited("Building the model of this config", _SECONDS, _MODEL_BYTES), _few_modules():
            model: PreTrainedModel = auto_class(name).from_config(config, dtype=dtype, trust_remote_code=False)
    except EmlocError:
        raise
    except Exception as error:  # sizes that do not fit each other, negative ones, ...
        raise EmlocError(
            f"transformers cannot build {name} from the config ({first_line(error)}).",
            "Check that the config.json belongs to the model.",
        ) from error
    return model


def load_model(name: str, directory: Path, **settings: Any) -> Any:
    """Return the model or emulator in a directory, in the dtype that it is stored in.

    Raises:
        EmlocError: it needs its own code, is quantised by a method that may read other files, or contains an adapter,
            which transformers would silently apply; or its weights cannot be read.
        Exception: whatever transformers raises.
    """
    import emloc_core.standins.quantizer  # noqa: F401 - with it, from_pretrained reads emulators too
    from emloc_core.compat import halves

    require_own_files(directory, ["*"])
    config = load_config(directory / "config.json")
    _require_plain(config, directory)
    settings = {"dtype": "auto", "use_safetensors": True, **settings, **_NOTHING_FOREIGN}
    try:
        model = auto_class(name).from_pretrained(str(directory), config=config, **settings)
    except SafetensorError as error:
        raise EmlocError(
            f"A file of weights in {directory} is truncated or damaged ({first_line(error)}).",
            "Download or copy the model again.",
            code="damaged",
        ) from error
    except ValueError as error:
        _refuse_own_code(error, directory, "model")
        raise
    halves.serve(model.dtype)
    return model


def load_processing(name: str, directory: Path) -> Any:
    """Return the tokenizer or processor in a directory.

    Args:
        name: name of the transformers class, ``AutoTokenizer`` or ``AutoProcessor``.

    Raises:
        EmlocError: it needs its own code, or names another model to load.
        Exception: whatever transformers raises.
    """
    require_own_files(directory, ["*"])
    processor = directory / "processor_config.json"
    if processor.is_file() and "audio_tokenizer" in read_object(processor):
        raise EmlocError(
            f"{processor} names another model, which would be loaded.",
            "Use a model whose processor does not.",
            code="refused",
        )
    kind = name.removeprefix("Auto").lower()
    try:
        processing = auto_class(name).from_pretrained(str(directory), **_NOTHING_FOREIGN)
    except ValueError as error:
        _refuse_own_code(error, directory, kind)
        raise
    length = getattr(getattr(processing, "tokenizer", processing), "model_max_length", None)
    if length is not None and not isinstance(length, int | float):
        raise EmlocError(
            f"The {kind} in {directory} has the model_max_length {length!r}, which is not a number.",
            "Correct its tokenizer_config.json.",
        )
    return processing


def load_gguf(name: str, file: Path, **settings: Any) -> Any:
    """Return the model in a GGUF file or, with ``AutoTokenizer``, its tokenizer."""
    return auto_class(name).from_pretrained(str(file.parent), gguf_file=file.name, **settings, **_NOTHING_FOREIGN)


def load_lora(model: Any, directory: Path, **settings: Any) -> Any:
    """Return a model with the LoRA in a directory applied, as a ``PeftModel``.

    Args:
        settings: further arguments of ``PeftModel.from_pretrained``, such as ``is_trainable``.

    Raises:
        EmlocError: it is not a LoRA or not in safetensors (other adapters may load further models, or pickles), or a
            pattern in its config might take forever to match.
        Exception: whatever PEFT raises.
    """
    from peft import PeftModel

    require_own_files(directory, ["*"])
    config = read_object(directory / CONFIG)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise EmlocError(
            f"The adapter {directory} is a {kind}; only LoRAs are supported.", "Train a LoRA.", code="unsupported"
        )
    require_lora(directory)
    if problems := pattern_problems(config):
        raise EmlocError(
            f"The adapter {directory} cannot be used: {problems[0]}.", "Use full module names.", code="refused"
        )
    return PeftModel.from_pretrained(model, str(directory), **settings, local_files_only=True)


@contextmanager
def _few_modules() -> Iterator[None]:
    """Refuse to build a model with more modules than any real one: each takes time, even without weights."""
    built = 0

    def count(*_: object) -> None:
        nonlocal built
        built += 1
        if built > _MODULES:
            raise EmlocError(
                f"The config asks for a model with more than {_MODULES:,} modules, more than any model has.",
                "Check its numbers of layers and experts.",
                code="refused",
            )

    handle = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _check(content: Any, where: str) -> None:
    """Refuse a config that names an implementation to download, or has a count larger than any model's."""
    for key, value in _fields(content):
        most = next((most for name, most in _COUNTS.items() if name.search(key)), None)
        if most is not None and isinstance(value, int) and value > most:
            raise EmlocError(
                f"{key} in {where} is {value:,}, more than any model has.", "Correct the config.", code="refused"
            )
        if key in ("dtype", "torch_dtype") and not _is_dtype(value):
            raise EmlocError(f"{key} in {where} is {value!r}, which is not a dtype.", "Correct the config.")
        if key == "llm_int8_skip_modules" and value is not None:
            if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
                raise EmlocError(f"{key} in {where} is {value!r}, which is not a list of names.", "Correct the config.")
            if problems := pattern_problems({key: value}):
                raise EmlocError(f"{where} cannot be used: {problems[0]}.", "Use full module names.", code="refused")
        name = key.strip("_").removesuffix("_internal")
        if name in _BUILT_IN and not set(_names(value)) <= _BUILT_IN[name] | (_FLASH if _has_flash() else set()):
            raise EmlocError(
                f"{key} in {where} is {value!r}, which is not built into transformers: it would be downloaded and run.",
                f"Remove it, or set it to one of {', '.join(sorted(filter(None, _BUILT_IN[name])))}.",
                code="refused",
            )


def _fields(content: Any) -> Iterator[tuple[str, Any]]:
    """Yield every key with its value, at any depth of a JSON document."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield key, value
            yield from _fields(value)
    elif isinstance(content, list):
        for value in content:
            yield from _fields(value)


def _is_dtype(value: Any) -> bool:
    """Return whether this is null, or a dtype of torch or its name."""
    if isinstance(value, str):
        value = getattr(torch, value.removeprefix("torch."), None)
        return isinstance(value, torch.dtype)
    return value is None or isinstance(value, torch.dtype)


def _names(value: Any) -> list[str | None]:
    """Return the names of implementations: one for the model, or one per part."""
    names = list(value.values()) if isinstance(value, Mapping) else [value]
    return [name if name is None else str(name) for name in names]


def _has_flash() -> bool:
    """Return whether naming flash attention is safe: with ``kernels`` but no ``flash_attn``, it is downloaded."""
    return importlib.util.find_spec("flash_attn") is not None or importlib.util.find_spec("kernels") is None


def _require_plain(config: Any, directory: Path) -> None:
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised.quant_method
        if method not in _QUANTISED:
            raise EmlocError(
                f"{directory} is quantised by {method!r}, which may load files from elsewhere.",
                "Give the unquantised model.",
                code="unsupported",
            )
    if (directory / CONFIG).exists():
        raise EmlocError(
            f"{directory} holds a model and an adapter, which would be applied whenever the model is loaded.",
            "Move the adapter to its own directory.",
        )


def _refuse_own_code(error: Exception, path: Path, kind: str) -> None:
    """Raise an :class:`EmlocError` if transformers complains that it may not run a model's code."""
    if "trust_remote_code" in str(error) or "custom code" in str(error):
        raise EmlocError(
            f"The {kind} in {path} needs its own Python code, which is never run.",
            f"Use a model whose {kind} is part of transformers.",
            code="refused",
        ) from error
