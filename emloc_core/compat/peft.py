"""PEFT: a check of adapters that are put into a model, in any script, and its wrappers of modules."""

import warnings
from collections.abc import Callable, Iterator
from functools import wraps
from importlib import import_module
from typing import Any

from torch import nn

from emloc_core.compat.imports import when_imported
from emloc_core.compat.private import private

#: What PEFT puts into the names of a Linear's parameters when it gets a LoRA.
WRAPPER = "base_layer."
#: PEFT's module that puts adapters of every kind into a model.
_WRAPS = "peft.tuners.tuners_utils"


def check_adapters(
    check: Callable[[nn.Module, dict[str, Any]], None], after: Callable[[nn.Module], None] = lambda _: None
) -> None:
    """Call ``check`` with model and config before PEFT puts an adapter into a model, and ``after`` with the model then.

    ``check`` raises to refuse the adapter.

    PEFT has no hook for it. All its functions call this method: ``get_peft_model``, ``PeftModel.from_pretrained``
    and ``inject_adapter_in_model``.
    """

    def wrap() -> None:
        with private("peft"):
            tuner: Any = import_module(_WRAPS).BaseTuner
            inject = tuner.inject_adapter

        @wraps(inject)
        def checked(self: Any, model: nn.Module, adapter_name: str, *args: Any, **options: Any) -> None:
            config = self.peft_config[adapter_name].to_dict()
            check(model, config)
            with warnings.catch_warnings():
                # PEFT looks for the patterns among modules only, but applies them to parameters too.
                if config.get("target_parameters"):
                    warnings.filterwarnings("ignore", ".*_pattern keys did not match any targeted module")
                inject(self, model, adapter_name, *args, **options)
            after(model)

        tuner.inject_adapter = checked

    when_imported(_WRAPS, wrap)


def parameter_wrappers(model: nn.Module) -> Iterator[tuple[str, list[Any]]]:
    """Yield the wrappers of parameters of every module that has some, the outermost first, with the module's path.

    PEFT wraps a module once for each of its parameters that get a LoRA; the wrappers are nested.
    """
    with private("peft"):
        from peft.tuners.lora.layer import ParamWrapper
    inner: set[nn.Module] = set()
    for path, module in list(model.named_modules()):
        if not isinstance(module, ParamWrapper) or module in inner:
            continue
        wrappers: list[Any] = [module]
        while isinstance(wrappers[-1].base_layer, ParamWrapper):
            wrappers.append(wrappers[-1].base_layer)
        inner.update(wrappers)
        yield path, wrappers


def leave_casts_to_autocast(model: nn.Module) -> None:
    """Let LoRAs in fp32 take inputs in 16 bits as they are, for passes under autocast: it casts the LoRAs.

    PEFT casts inputs to fp32, which autocast casts back: two more copies of every input, one of them kept until the
    backward pass.
    """
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):  # as peft.helpers.disable_input_dtype_casting
            module.cast_input_dtype_enabled = False  # type: ignore[assignment]
