"""The kind whose stand-in is the weight itself in four bits (NF4)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from emloc_core.algorithms import feedback, nf4
from emloc_core.algorithms.factorize import Factors, output_error
from emloc_core.algorithms.statistics import Gram
from emloc_core.errors import EmlocError
from emloc_core.kinds.kind import Factorize, Fit, Kind, Pair, whole
from emloc_core.layers import replace_linear
from emloc_core.quantised import FourBitLinear


@dataclass(frozen=True)
class FourBitWeight(Factors):
    """A weight in four bits: as U or V, beside the identity, and packed.

    Attributes:
        codes: two a byte, (ceil(m n / 2), 1), uint8.
        state: bitsandbytes' ``QuantState``: the scales, in eight bits.
    """

    codes: torch.Tensor
    state: Any


class NF4(Kind):
    """Weights in four bits as bitsandbytes has them (QLoRA): an ordinary checkpoint that plain transformers loads.

    The scales are bitsandbytes' own. To these, weights are rounded with feedback; without calibration, each number is
    rounded on its own, as bitsandbytes does.
    """

    name = "nf4"
    has_factors = False
    calibration = "propagated"
    needs_rows = False
    taps_inputs = keeps_weight = True
    _PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4")

    def rounding(self, factorize: Factorize) -> Fit:  # noqa: ARG002
        """Return what rounds weights with feedback, whatever their rank."""

        def fit(weights: Sequence[torch.Tensor], inputs: Gram, ranks: Sequence[int]) -> list[FourBitWeight]:  # noqa: ARG001
            states = [_quantized(weight.float())[1] for weight in weights]
            codes = feedback.rounded_to_scales(weights, feedback.damped(inputs), [_scales(state) for state in states])
            matrix = feedback.single(inputs)
            return [
                _stand_in(of, state, partial(output_error, weight, gram=matrix))
                for weight, of, state in zip(weights, codes, states, strict=True)
            ]

        return fit

    def stand_in(self, weight: torch.Tensor) -> FourBitWeight:
        """Return the weight as bitsandbytes rounds it, with the error of the weight."""
        return _stand_in(*_quantized(weight), lambda found: _relative(weight, found))

    def told(self, rank: str) -> str:  # noqa: ARG002
        """Four bits, whatever the rank."""
        return "four bits"

    def keys(self, weight: str) -> list[str]:
        """The weight's codes, and the parts of bitsandbytes' ``QuantState``."""
        return [weight, *(f"{weight}.{part}" for part in self._PARTS)]

    def pack(self, weight: str, stand_in: FourBitWeight, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Return the weight in four bits, its scales in eight (double quantisation)."""
        state = stand_in.state
        state.dtype = dtype  # that bitsandbytes unpacks to
        parts = {f"{weight}.{part}": tensor.cpu() for part, tensor in state.as_dict(packed=True).items()}
        return {weight: stand_in.codes.cpu(), **parts}

    def unpack(self, tensors: list[torch.Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Pair:
        """Return the weight and the identity."""
        codes, *parts = tensors
        known = dict(zip(self._PARTS, parts, strict=True))
        state = nf4.kernels().functional.QuantState.from_dict(known, device=codes.device)
        return whole(_read(codes, state, shape, dtype))

    def config(self, ranks: dict[str, int], model: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
        """Return what ``BitsAndBytesConfig`` writes, with every other Linear among those to be skipped.

        Raises:
            EmlocError: transformers would skip other Linears than these.
        """
        from transformers.quantizers.quantizers_utils import should_convert_module

        linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
        skipped = [path for path in linears if path not in ranks]
        wrong = [path for path in linears if should_convert_module(path, skipped) != (path in ranks)]
        if wrong:
            raise EmlocError(f"transformers cannot be told which Linears of this model are in four bits ({wrong[0]}).")
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "bfloat16" if dtype == torch.float16 else str(dtype).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": skipped,
        }

    def nbytes(self, shape: tuple[int, int], rank: int, dtype: torch.dtype) -> int:  # noqa: ARG002
        """Half a byte a number, a byte for every 64, and a number for every 256 of these."""
        codes, scales = nf4.sizes(*shape)
        return codes + scales + 4 * -(-scales // 256) + 4 * (16 + 256)

    def replace(self, model: nn.Module, ranks: dict[str, int]) -> None:
        """Replace by layers of as many bytes, whose weight is unpacked in every pass."""
        for path in ranks:
            replace_linear(model, path, FourBitLinear)


def _quantized(weight: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Return bitsandbytes' codes and ``QuantState`` of a weight."""
    functions = nf4.kernels().functional
    found: tuple[torch.Tensor, Any] = functions.quantize_4bit(
        weight.contiguous(), blocksize=nf4.BLOCK, compress_statistics=True, quant_type="nf4"
    )
    return found


def _scales(state: Any) -> torch.Tensor:
    """Return the scale of every block, fp32, as it is read from eight bits."""
    found: torch.Tensor = nf4.kernels().functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    return found


def _read(codes: torch.Tensor, state: Any, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    # bitsandbytes takes a single byte of codes for a transposed matrix.
    found: torch.Tensor = nf4.kernels().functional.dequantize_4bit(codes, state).reshape(shape).to(dtype)
    return found


def _stand_in(codes: torch.Tensor, state: Any, error: Callable[[torch.Tensor], float]) -> FourBitWeight:
    """Return a packed weight; ``error`` gives that of what is read of it."""
    m, n = state.shape
    found = _read(codes, state, (m, n), torch.float32)
    nothing = torch.zeros(min(m, n), dtype=torch.float64)
    return FourBitWeight(*whole(found), nothing, codes, state, error=error(found))


def _relative(weight: torch.Tensor, found: torch.Tensor) -> float:
    """Return ``||W - What|| / ||W||``: the relative output error on inputs that favour no direction."""
    lost, kept = (float(torch.linalg.vector_norm(part, dtype=torch.float64)) for part in (weight - found, weight))
    return lost / kept if kept else 0.0
