"""transformers: chat templates, code of models, fused experts, and the loading of a checkpoint's tensors by name.

``transformers`` is imported in functions: its base classes of models take two seconds, and text is tokenized without.
"""

import contextlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from threading import Lock
from typing import TYPE_CHECKING, Any

from emloc_core.compat.private import private

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, TrainingArguments

#: Compiles the text of a template to an object with ``render``, ``generate`` and ``environment``, as Jinja's have.
Compile = Callable[[str], Any]
#: Threads that load tensors take turns: transformers' settings are for all of a process.
_ONE_AT_A_TIME = Lock()


def wrap_template_compiler(wrap: Callable[[Compile], Compile]) -> None:
    """Have all chat templates compiled by ``wrap`` of transformers' own function, those of TRL and lm-eval included.

    There is no hook for it: a template is a program that comes with a model, and its time and memory have no limits.
    """
    from transformers.utils import chat_template_utils

    templates: Any = chat_template_utils
    with private("transformers"):
        templates._compile_jinja_template = wrap(templates._compile_jinja_template)


def never_ask_for_code() -> None:
    """Have transformers refuse a model that comes with code, where it would ask on the terminal for 15 seconds.

    ``trust_remote_code=False`` says the same, but does not reach the classes that are loaded for a part of a model.
    """
    from transformers import dynamic_module_utils

    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0


def use_one_gpu(config: "TrainingArguments") -> None:
    """Have a trainer use one GPU of several: it would split the batch by ``nn.DataParallel``, and no field says no."""
    if config.n_gpu > 1:
        config._n_gpu = 1


def recomputing_field() -> str:
    """Return the field of a trainer's config that has activations recomputed: transformers 5.23 renamed it."""
    from transformers import TrainingArguments

    renamed = "activation_checkpointing"
    return renamed if renamed in TrainingArguments.__dataclass_fields__ else "gradient_checkpointing"


def recompute_activations(model: Any) -> None:
    """Have a model recompute its activations in the backward pass, by the method of either name."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()


def grouped_product(x: "torch.Tensor", stack: "torch.Tensor", ends: "torch.Tensor") -> "torch.Tensor":
    """Multiply rows, sorted by expert, each group by its expert's matrix, as transformers' own fused experts do.

    Args:
        x: (rows, n).
        stack: (E, m, n).
        ends: (E), int32: where the rows of each expert end.
    """
    from transformers.integrations import moe

    with private("transformers"):
        product = moe._grouped_linear
    return product(x, stack, ends)


def gated(experts: Any, x: "torch.Tensor") -> "torch.Tensor":
    """Apply the activation of a module of fused experts to its gate and up products, (rows, 2 i): (rows, i)."""
    with private("transformers"):
        gate = experts._apply_gate
    return gate(x)


@contextlib.contextmanager
def attending(sink: Callable[..., None]) -> Iterator[None]:
    """Give ``sink`` the queries, keys and values of every attention by torch's own function, before it is computed."""
    from transformers import AttentionInterface

    name = "sdpa"
    attend = AttentionInterface()[name]

    def attention(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        sink(query, key, value)
        return attend(module, query, key, value, *args, **kwargs)

    AttentionInterface.register(name, attention)
    try:
        yield
    finally:
        AttentionInterface.register(name, attend)


def keep_as_it_is(module: Any) -> None:
    """Have ``from_pretrained`` draw no initial values for a module: codes in bytes cannot be drawn."""
    module._is_hf_initialized = True


def retie(model: Any, ties: dict[str, str]) -> None:
    """Have a model tie these parameters, each to another one, by name, instead of those that its class names."""
    model.all_tied_weights_keys = ties
    model._tied_weights_keys = dict(ties)  # is read again by save_pretrained


def tie_as_its_class_does(model: Any) -> None:
    """Tie the parameters of a model that its class names, whatever was tied instead."""
    vars(model).pop("_tied_weights_keys", None)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    model.tie_weights()


def was_loaded(parameter: Any) -> bool:
    """Return whether ``from_pretrained`` found a parameter in the files; a missing one is left as it was, or drawn."""
    return getattr(parameter, "_is_hf_initialized", False)


def kept_in_fp32(model: Any) -> list[str]:
    """Return the ends of paths of modules that ``from_pretrained`` keeps in fp32, and bitsandbytes does not pack."""
    return list(getattr(model, "_keep_in_fp32_modules", None) or ())


def has_own_cache(model: "PreTrainedModel") -> bool:
    """Return whether ``generate`` leaves it to a model to make its cache, since it takes no other class's."""
    takes_others = getattr(model, "_supports_default_dynamic_cache", lambda: True)
    return not takes_others()


def laid_out_otherwise(model: Any, method: str) -> list[str]:
    """Return the paths of modules that ``from_pretrained`` replaces by others in a model quantised by this method.

    All modules count where transformers does not load the model: other libraries may replace others.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return [path for path, _ in model.named_modules()]
    with private("transformers"):
        from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION
    patches: dict[str, Any] = MODULES_TO_PATCH_FOR_QUANTIZATION
    methods = {name: entry["quantization_methods"] for name, entry in patches.items()}
    return [path for path, module in model.named_modules() if method in methods.get(type(module).__name__, ())]


class TensorLoader:
    """Makes a model's parameters and buffers from a checkpoint's tensors, some at a time.

    Keys are not module names (legacy prefixes, fused tensors): they are mapped and converted as ``from_pretrained``
    does it. These functions are importable, but no documentation promises them.

    Args:
        model: the model; its parameters are replaced when tensors are loaded.
        conversions: entries besides transformers' own, for its ``weight_mapping``.
    """

    def __init__(self, model: "PreTrainedModel", conversions: Iterable[Any] = ()) -> None:
        with private("transformers"):
            from transformers.conversion_mapping import get_model_conversion_mapping
        self._model = model
        self._mapping = [*get_model_conversion_mapping(model), *conversions]

    def sources(self, keys: Iterable[str]) -> dict[str, list[str]]:
        """Return the keys of the tensors that each parameter or buffer is made from, by its name.

        If there are several, they are in the order of its converter's patterns, then of the numbers in the keys.
        """
        with private("transformers"):
            from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        expected = self._model.state_dict()
        sources: dict[str, list[str]] = defaultdict(list)
        positions: dict[str, tuple[Any, ...]] = {}
        for key in keys:
            target, pattern = rename_source_key(key, renamings, converters, self._model.base_model_prefix, expected)
            if target not in expected and key in expected:
                target, pattern = key, None
            sources[target].append(key)
            if pattern is not None:
                numbers = [int(part) for part in key.split(".") if part.isdecimal()]
                positions[key] = (by_pattern[pattern].source_patterns.index(pattern), numbers)
                # One tensor of the checkpoint may be split into several parameters.
                first, *more = by_pattern[pattern].target_patterns
                for target_pattern in more:
                    sources[target.replace(first, target_pattern)].append(key)
        converted = {
            name: sorted(names, key=positions.__getitem__)
            for name, names in sources.items()
            if positions.keys() >= set(names)
        }
        return sources | converted

    def load(
        self, tensors: dict[str, Any], dtype: "torch.dtype", device: "torch.device"
    ) -> tuple[dict[str, str], list[tuple[str, Any, Any]]]:
        """Load tensors into the model.

        Args:
            tensors: tensors, or safetensors' slices, by key.

        Returns:
            Why parameters could not be made, by name; and for each mismatch its name, its shape, and the model's.
        """
        with private("transformers"):
            from transformers.core_model_loading import convert_and_load_state_dict_in_model
            from transformers.modeling_utils import LoadStateDictConfig
        settings = LoadStateDictConfig(dtype=dtype, weight_mapping=self._mapping, device_map={"": str(device)})
        with _ONE_AT_A_TIME, _quiet_and_sequential():
            info, _ = convert_and_load_state_dict_in_model(self._model, tensors, settings)
        problems = {
            name: problem.partition("\nError:")[0].strip().splitlines()[-1]
            for name, problem in info.conversion_errors.items()
        }
        return problems, list(info.mismatched_keys)


@contextlib.contextmanager
def _quiet_and_sequential() -> Iterator[None]:
    """Load without a progress bar per part, and without a thread pool that would read beyond the memory limit."""
    from transformers import logging

    variable = "HF_DEACTIVATE_ASYNC_LOAD"
    saved = os.environ.get(variable)
    os.environ[variable] = "1"
    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bar:
            logging.enable_progress_bar()
        if saved is None:
            del os.environ[variable]
        else:
            os.environ[variable] = saved
