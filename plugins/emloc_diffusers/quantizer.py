"""Integrates emulators into diffusers, as :mod:`emloc_core.standins.quantizer` does into transformers.

After its import, ``from_pretrained`` of a transformer loads an emulator, which a pipeline takes like any other
(``FluxPipeline.from_pretrained(base, transformer=emulator)``).
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer

from emloc_core.errors import EmlocError
from emloc_core.standins.format import METHOD
from emloc_core.standins.layer import StandInLinear
from emloc_core.standins.quantizer import EmlocConfig


class Quantizer(DiffusersQuantizer):
    """Puts in stand-ins before diffusers loads the weights, and checks that every part of them is there."""

    requires_calibration = True
    use_keep_in_fp32_modules = True  # as of the base
    quantization_config: EmlocConfig

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        self.quantization_config.replace(model)

    def _process_model_after_weight_loading(self, _: Any, **__: Any) -> None:
        _tell_shapes()

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:  # noqa: ARG002
        """Refuse an emulator that lacks a part of a stand-in; diffusers checks other weights.

        Raises:
            EmlocError: names the part.
        """
        if lacking := [key for key in missing_keys if _is_part(model, key)]:
            raise EmlocError(f"The emulator lacks {min(lacking)}.", "Make the emulator again.", code="damaged")
        return missing_keys

    def check_if_quantized_param(self, model: Any, _: torch.Tensor, name: str, *__: Any, **___: Any) -> bool:
        """Return whether this is a part of a stand-in."""
        return _is_part(model, name)

    def create_quantized_param(
        self, model: Any, _: torch.Tensor, name: str, device: Any, state_dict: Any, *__: Any, **___: Any
    ) -> None:
        """Load a part in its stored dtype: scales would lose digits in the dtype of the model."""
        set_module_tensor_to_device(model, name, device, state_dict[name])

    def _dequantize(self, model: Any) -> Any:
        for path, layer in list(model.named_modules()):
            if isinstance(layer, StandInLinear):
                model.set_submodule(path, layer.dense())
        return model

    @property
    def is_serializable(self) -> bool:
        """Allow save_pretrained: what stand-ins keep are ordinary parameters."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Allow training adapters."""
        return True


def _is_part(model: Any, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), StandInLinear)


@cache
def _tell_shapes() -> None:
    """Tell pipelines of FLUX.1 the shapes of stand-ins.

    They would take the stored tensor for the weight, and pad it with zeros if a LoRA's shape is larger.
    """
    # Imported here: that module imports diffusers' quantizers, and with them this module.
    from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin

    usual = FluxLoraLoaderMixin._calculate_module_shape

    def shape(model: Any, base_module: Any = None, base_weight_param_name: str | None = None) -> Sequence[int]:
        path = (base_weight_param_name or "").removesuffix(".weight")
        module = base_module or model.get_submodule(path)
        stored: Sequence[int] = usual(model, module)
        return module.shape if isinstance(module, StandInLinear) else stored

    FluxLoraLoaderMixin._calculate_module_shape = staticmethod(shape)


AUTO_QUANTIZER_MAPPING[METHOD] = Quantizer
AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = EmlocConfig
