"""The integration of an emulator's layers into transformers.

After ``import emloc_core.lowrank``, ``AutoModel...from_pretrained`` loads an emulator like any other checkpoint:
its config has a ``quantization_config`` of method ``emloc`` with the rank of everything that is factorised.
"""

from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from emloc_core.errors import EmlocError
from emloc_core.experts import LowRankExperts
from emloc_core.layers import FORMAT_VERSION, LAYERS, LEVELS_VERSION, MARK, METHOD, Layer, replace_linears
from emloc_core.quantised import PackedLinear
from emloc_core.transfer import refuse_others

#: First parts of the names of a stand-in's tensors.
_FACTORS = ("weight", "weight_scales", "U", "U_scales", "V", "V_scales", "bias")


class EmlocConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of an emulator.

    Args:
        ranks: rank of the factors by path of the Linear, or of the stack of experts.
        format_version: version of this format; see :data:`LAYERS`.
        levels: instead of ranks, number of the weight's levels by path of the Linear.
    """

    def __init__(
        self,
        ranks: dict[str, int] | None = None,
        format_version: int = FORMAT_VERSION,
        levels: dict[str, int] | None = None,
        **_: Any,
    ) -> None:
        self.quant_method: Any = METHOD
        if format_version == LEVELS_VERSION:
            self.levels = dict(levels or {})
        else:
            self.ranks = dict(ranks or {})
        self.format_version = format_version
        if format_version not in LAYERS:
            raise EmlocError(
                f"The emulator has format {format_version}, newer than {max(LAYERS)}.",
                "Update emloc.",
                code="unsupported",
            )

    @property
    def sizes(self) -> dict[str, int]:
        """Ranks, or numbers of levels, by path."""
        return self.levels if self.format_version == LEVELS_VERSION else self.ranks


class EmlocQuantizer(HfQuantizer):
    """Replaces Linears with factors before transformers loads the weights, and checks that every factor was loaded."""

    requires_calibration = True
    quantization_config: EmlocConfig

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        replace_linears(model, self.quantization_config.sizes, self.quantization_config.format_version)
        # Uninitialised memory would pass for a factor: remember the parameters, to find those that were not loaded.
        for _path, layer in _stand_ins(model):
            parts = {name: part for name, part in layer.named_parameters() if name.partition(".")[0] in _FACTORS}
            layer.emloc_unloaded = parts  # type: ignore[assignment]
            # Transformers would draw missing codes from a normal distribution, and fail; they are told below.
            layer._is_hf_initialized = isinstance(layer, PackedLinear)  # type: ignore[assignment]

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> None:
        for path, layer in _stand_ins(model):
            unloaded: Any = layer.emloc_unloaded
            del layer.emloc_unloaded
            for name, before in unloaded.items():
                now = layer.get_parameter(name)
                if now is before or not getattr(now, "_is_hf_initialized", False):
                    raise EmlocError(f"The emulator lacks {path}.{name}.", "Make the emulator again.", code="damaged")

    def is_serializable(self) -> bool:
        """Allow save_pretrained: the factors are ordinary parameters."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Allow training adapters."""
        return True

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        for path, layer in _stand_ins(model):
            model.set_submodule(path, layer.dense().to(dtype))
        return model


def _stand_ins(model: nn.Module) -> list[tuple[str, Layer | LowRankExperts]]:
    """Return the modules of a model that are not what they are in the base, with their paths."""
    return [(path, module) for path, module in model.named_modules() if isinstance(module, Layer | LowRankExperts)]


def _is_emulator(model: nn.Module) -> bool:
    """Return whether a model is an emulator, also where its layers are bitsandbytes' own."""
    return hasattr(getattr(model, "config", None), MARK) or bool(_stand_ins(model))


if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:  # the module may be imported again under another name
    register_quantization_config(METHOD)(EmlocConfig)
    register_quantizer(METHOD)(EmlocQuantizer)
    refuse_others(_is_emulator)
