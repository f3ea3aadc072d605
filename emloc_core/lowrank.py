"""The low-rank Linear, and its integration into transformers.

After ``import emloc_core.lowrank``, ``AutoModel...from_pretrained`` loads an emulator like any other checkpoint:
its config has a ``quantization_config`` of method ``emloc`` with the rank of every factorised Linear.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from emloc_core.errors import EmlocError

METHOD = "emloc"
FORMAT_VERSION = 1


class LowRankLinear(nn.Linear):
    """``y = U (V x) + b``: a Linear of out_features x in_features stored as two factors.

    It is an ``nn.Linear`` whose ``weight`` *is* U (out_features, rank), plus the parameter ``V`` (rank,
    in_features). So PEFT puts a LoRA on it as on any Linear, with the same keys as on the base, and ``all-linear``
    finds no inner Linears to target.
    """

    V: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # Not nn.Linear.__init__, which would allocate out_features x in_features.
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.weight = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.V = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return functional.linear(functional.linear(input, self.V), self.weight, self.bias)

    def extra_repr(self) -> str:
        """Describe the layer in the model's printout."""
        return f"{super().extra_repr()}, rank={self.rank}"

    def dense(self) -> nn.Linear:
        """Return an ordinary Linear with the weight ``U V``."""
        device, dtype = self.weight.device, self.weight.dtype
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device, dtype)
        with torch.no_grad():
            linear.weight.copy_(self.weight @ self.V)
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear


def replace_linears(model: nn.Module, ranks: dict[str, int]) -> None:
    """Replace Linears with empty :class:`LowRankLinear` modules of the given ranks, on the same devices.

    Raises:
        EmlocError: the model has no Linear at one of the paths.
    """
    for path, rank in ranks.items():
        try:
            linear = model.get_submodule(path)
        except AttributeError:
            linear = None
        if not isinstance(linear, nn.Linear):
            raise EmlocError(
                f"The model has no Linear at {path}.", "The emulator belongs to another architecture.", code="mismatch"
            )
        device, dtype = linear.weight.device, linear.weight.dtype
        layer = LowRankLinear(linear.in_features, linear.out_features, rank, linear.bias is not None, device, dtype)
        layer.requires_grad_(linear.weight.requires_grad).train(linear.training)
        model.set_submodule(path, layer)


class EmlocConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of an emulator.

    Args:
        ranks: rank of the factors by module path.
        format_version: version of this format.
    """

    def __init__(self, ranks: dict[str, int] | None = None, format_version: int = FORMAT_VERSION, **_: Any) -> None:
        self.quant_method: Any = METHOD
        self.ranks = dict(ranks or {})
        self.format_version = format_version
        if format_version > FORMAT_VERSION:
            raise EmlocError(
                f"The emulator has format {format_version}, newer than {FORMAT_VERSION}.",
                "Update emloc.",
                code="unsupported",
            )


class EmlocQuantizer(HfQuantizer):
    """Replaces Linears with factors before transformers loads the weights, and checks that every factor was loaded."""

    requires_calibration = True
    quantization_config: EmlocConfig

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        replace_linears(model, self.quantization_config.ranks)
        # Uninitialised memory would pass for a factor: remember the parameters, to find those that were not loaded.
        for path in self.quantization_config.ranks:
            layer = model.get_submodule(path)
            layer.emloc_unloaded = [layer.weight, layer.V]  # type: ignore[assignment]

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> None:
        for path in self.quantization_config.ranks:
            layer = model.get_submodule(path)
            unloaded: Any = layer.emloc_unloaded
            del layer.emloc_unloaded
            for name, before in zip(("weight", "V"), unloaded, strict=True):
                if getattr(layer, name) is before or not getattr(getattr(layer, name), "_is_hf_initialized", False):
                    raise EmlocError(f"The emulator lacks {path}.{name}.", "Make the emulator again.", code="damaged")

    def is_serializable(self) -> bool:
        """Allow save_pretrained: the factors are ordinary parameters."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Allow training adapters."""
        return True

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        for path in self.quantization_config.ranks:
            layer = model.get_submodule(path)
            assert isinstance(layer, LowRankLinear)
            model.set_submodule(path, layer.dense().to(dtype))
        return model


if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:  # the module may be imported again under another name
    register_quantization_config(METHOD)(EmlocConfig)
    register_quantizer(METHOD)(EmlocQuantizer)
