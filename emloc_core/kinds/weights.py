"""The kind whose stand-in is the weight itself, in four bits."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.quantizers.quantizers_utils import should_convert_module

from emloc_core.algorithms import feedback, fourbit
from emloc_core.algorithms.factorize import Factors, output_error
from emloc_core.algorithms.statistics import Gram
from emloc_core.errors import EmlocError
from emloc_core.kinds.kind import Factorize, Kind, Pair, Weight, whole
from emloc_core.lowrank import replace_linear
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
    has_factors = has_ratio = False
    calibration = "propagated"
    needs_rows = False
    taps_inputs = keeps_weight = needs_bitsandbytes = True
    _PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4")

    def rounding(self, factorize: Factorize) -> Factorize:  # noqa: ARG002
        """Return what rounds a weight with feedback, whatever its rank."""

        def rounded(weight: torch.Tensor, gram: Gram, rank: int) -> FourBitWeight:  # noqa: ARG001
            (m, n), inputs = weight.shape, gram.matrix
            _, state = _quantized(weight.float())
            functions = fourbit.kernels().functional
            scales = functions.dequantize_blockwise(state.absmax, state.state2) + state.offset
            codes = feedback.rounded_to_scales(weight, inputs, scales)
            found = fourbit.unpack(codes, scales, (m, n), torch.float32)
            nothing = torch.zeros(min(m, n), dtype=torch.float64)
            return FourBitWeight(*whole(found), nothing, codes, state, error=output_error(weight, found, inputs))

        return rounded

    def stand_in(self, weight: torch.Tensor) -> Weight:
        """Return the weight, with the error of its four bits."""
        packed = list(self.pack("weight", Weight(weight, 0.0), weight.dtype).values())
        approximation = max(self.unpack(packed, (weight.shape[0], weight.shape[1]), torch.float32), key=torch.numel)
        lost, whole = (
            float(torch.linalg.vector_norm(part, dtype=torch.float64))
            for part in (weight.cpu().float() - approximation, weight)
        )
        return Weight(weight, lost / whole if whole else 0.0)

    def told(self, rank: str) -> str:  # noqa: ARG002
        """Four bits, whatever the rank."""
        return "four bits"

    def keys(self, weight: str) -> list[str]:
        """The weight's codes, and the parts of bitsandbytes' ``QuantState``."""
        return [weight, *(f"{weight}.{part}" for part in self._PARTS)]

    def pack(self, weight: str, stand_in: FourBitWeight | Weight, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Return the weight in four bits, its scales in eight (double quantisation)."""
        if isinstance(stand_in, Weight):
            codes, state = _quantized(stand_in.weight.to("cpu", dtype))
        else:
            codes, state = stand_in.codes, stand_in.state
        state.dtype = dtype
        parts = {weight: codes} | {f"{weight}.{part}": each for part, each in state.as_dict(packed=True).items()}
        return {key: part.cpu() for key, part in parts.items()}

    def unpack(self, tensors: list[torch.Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Pair:
        """Return the weight and the identity."""
        functions = fourbit.kernels().functional
        codes, *parts = tensors
        state = functions.QuantState.from_dict(dict(zip(self._PARTS, parts, strict=True)), device=codes.device)
        # bitsandbytes takes a single byte of codes for a transposed matrix.
        return whole(functions.dequantize_4bit(codes, state).reshape(shape).to(dtype))

    def config(self, ranks: dict[str, int], model: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
        """Return what ``BitsAndBytesConfig`` writes, with every other Linear among those to be skipped.

        Raises:
            EmlocError: transformers would skip other Linears than these.
        """
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
            "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": skipped,
        }

    def nbytes(self, shape: tuple[int, int], rank: int, dtype: torch.dtype) -> int:  # noqa: ARG002
        """Half a byte a number, a byte for every 64, and a number for every 256 of these."""
        codes, scales = fourbit.sizes(*shape)
        return codes + scales + 4 * -(-scales // 256) + 4 * (16 + 256)

    def replace(self, model: nn.Module, ranks: dict[str, int]) -> None:
        """Replace by layers of as many bytes, whose weight is unpacked in every pass."""
        for path in ranks:
            replace_linear(model, path, FourBitLinear)


def _quantized(weight: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Return bitsandbytes' codes and ``QuantState`` of a weight."""
    functions = fourbit.kernels().functional
    found: tuple[torch.Tensor, Any] = functions.quantize_4bit(
        weight.contiguous(), blocksize=fourbit.BLOCK, compress_statistics=True, quant_type="nf4"
    )
    return found
