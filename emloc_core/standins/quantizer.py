"""The integration of emulators into transformers.

After ``import emloc_core.standins.quantizer``, ``AutoModel...from_pretrained`` loads an emulator like any other
checkpoint: its config has a ``quantization_config`` of method ``emloc``, with its format and what has a stand-in.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from emloc_core.compat import halves
from emloc_core.compat.transformers import keep_as_it_is, tie_as_its_class_does, was_loaded
from emloc_core.errors import EmlocError
from emloc_core.standins.experts import StandInExperts
from emloc_core.standins.format import MARK, METHOD
from emloc_core.standins.layer import StandInLinear
from emloc_core.standins.registry import format_named
from emloc_core.standins.transfer import refuse_others
from emloc_core.standins.vocabulary import PackedEmbedding, replace_vocabulary

if TYPE_CHECKING:  # transformers is still being imported where its quantizers are: see emloc_core/compat/autoload.py
    from transformers import PreTrainedModel


class EmlocConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of an emulator.

    Args:
        ranks: by path of the Linears, and stacks of experts, that have a stand-in: the rank of its factors, or None.
        vocabulary: by path of the output layer and the embeddings, where they are packed: how.

    Raises:
        EmlocError: no plugin provides the format.
    """

    def __init__(
        self, format: str, ranks: dict[str, int | None], vocabulary: dict[str, str] | None = None, **_: Any
    ) -> None:
        self.quant_method: Any = METHOD
        self.format, self.ranks, self.vocabulary = format, ranks, vocabulary or {}
        format_named(format)

    def replace(self, model: nn.Module) -> None:
        """Replace what has a stand-in by empty layers.

        Raises:
            EmlocError: the model has no such module at one of the paths.
        """
        format_named(self.format).replace(model, self.ranks)
        replace_vocabulary(model, self.vocabulary)


class EmlocQuantizer(HfQuantizer):
    """Puts in stand-ins before transformers loads the weights, and checks that every part of them was loaded."""

    requires_calibration = True
    quantization_config: EmlocConfig

    def preprocess_model(self, model: "PreTrainedModel", *args: Any, **options: Any) -> None:
        """Replace what has a stand-in by empty layers."""
        halves.serve(model.dtype)
        super().preprocess_model(model, *args, **options)
        self.quantization_config.replace(model)
        # Uninitialised memory would pass for a weight: remember the parameters, to find those that were not loaded.
        for path, layer in _stand_ins(model):
            layer.emloc_unloaded = _stored(layer)  # type: ignore[assignment]
            # Transformers would draw missing codes from a normal distribution, and fail; they are told below.
            if isinstance(layer, StandInExperts):
                for stacked in (child for child in layer.children() if isinstance(child, nn.ParameterDict)):
                    keep_as_it_is(stacked)
                keep_as_it_is(model.get_submodule(path.rpartition(".")[0]))  # some blocks draw their experts
            elif isinstance(layer, StandInLinear) and not layer.trainable:
                keep_as_it_is(layer)

    def postprocess_model(self, model: "PreTrainedModel", **options: Any) -> Any:
        """Check that all parts of the stand-ins were loaded.

        Raises:
            EmlocError: one was not.
        """
        super().postprocess_model(model, **options)
        for path, layer in _stand_ins(model):
            unloaded: Any = layer.emloc_unloaded
            del layer.emloc_unloaded
            for name, before in unloaded.items():
                now = layer.get_parameter(name)
                if now is before or not was_loaded(now):
                    raise EmlocError(f"The emulator lacks {path}.{name}.", "Make the emulator again.", code="damaged")
        return model

    def is_serializable(self) -> bool:
        """Allow save_pretrained: the factors are ordinary parameters."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Allow training adapters."""
        return True

    def dequantize(self, model: "PreTrainedModel", dtype: torch.dtype | None = None) -> "PreTrainedModel":
        """Put ordinary Linears and experts in for the stand-ins; their dtype is the model's unless one is given."""
        for path, layer in _stand_ins(model):
            model.set_submodule(path, layer.dense().to(dtype or model.config.dtype))
        tie_as_its_class_does(model)
        self.remove_quantization_config(model)
        return model


def _stand_ins(model: nn.Module) -> list[tuple[str, StandInLinear | StandInExperts | PackedEmbedding]]:
    """Return the modules of a model that are not what they are in the base, with their paths."""
    kinds = StandInLinear | StandInExperts | PackedEmbedding
    return [(path, module) for path, module in model.named_modules() if isinstance(module, kinds)]


def _stored(layer: nn.Module) -> dict[str, nn.Parameter]:
    """Return what the files of an emulator hold for a module; those of experts may hold a stack as it is, too."""
    return layer.stand_ins() if isinstance(layer, StandInExperts) else dict(layer.named_parameters())


def _is_emulator(model: nn.Module) -> bool:
    """Return whether a model is an emulator, also where its layers are bitsandbytes' own."""
    return hasattr(getattr(model, "config", None), MARK) or bool(_stand_ins(model))


if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:  # the module may be imported again under another name
    register_quantization_config(METHOD)(EmlocConfig)
    register_quantizer(METHOD)(EmlocQuantizer)
    refuse_others(_is_emulator)
