"""Weights in four bits, NF4 (Dettmers et al., 2023, arXiv 2305.14314), as bitsandbytes has them.

Every 64 numbers share a scale in fp32: a number takes 4.5 bits. Packing what was unpacked in fp32 gives the same bytes
again. Scales may be packed too, in eight bits ("double quantisation" there): a number then takes 4.13 bits.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from emloc_core.algorithms import feedback
from emloc_core.algorithms.factorize import output_error
from emloc_core.algorithms.grid import indices, middles
from emloc_core.algorithms.statistics import Gram
from emloc_core.compat.imports import when_imported
from emloc_core.compat.transformers import kept_in_fp32, laid_out_otherwise
from emloc_core.errors import EmlocError
from emloc_core.standins.format import Format
from emloc_core.standins.layer import PackedLinear, Parts, product
from emloc_core.standins.standin import StandIn
from emloc_core.standins.transposed import TransposedLinear

#: Numbers that share a scale, and scales that share a range.
BLOCK, SCALES = 64, 256
_TYPE = "nf4"
#: Paths in which transformers takes another part for the name of the weight.
_MISLEADING = re.compile(r"weight(\.|$)")


class FourBitLinear(PackedLinear):
    """``y = W x + b`` with W in four bits and its scales in eight, as bitsandbytes has them.

    It is what is streamed and planned; transformers loads bitsandbytes' own layer. ``weight`` is W, packed;
    ``weight_scales`` and ``weight_ranges`` are those of :func:`unpack_scales`.
    """

    weight_scales: nn.Parameter
    weight_ranges: nn.Parameter

    @classmethod
    def parts(cls, shape: tuple[int, int], rank: int | None, dtype: torch.dtype) -> Parts:
        """Return the packed weight."""
        scale_levels(torch.device("cpu"))  # there already where a pass is traced without contents
        codes, scales = sizes(*shape)
        return {
            "weight": ((codes, 1), torch.uint8),
            "weight_scales": ((scales,), torch.uint8),
            "weight_ranges": ((-(-scales // SCALES) + 1,), torch.float32),
        }

    @staticmethod
    def unpack(*parts: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """Return W."""
        codes, scales, ranges = parts
        return unpack(codes, unpack_scales(scales, ranges.float()), shape, dtype)

    @classmethod
    def unpack_stack(cls, *parts: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """Return matrices, all at once unless a scale or a range of scales belongs to two of them."""
        codes, scales, ranges = parts
        count, (m, n) = len(codes), shape
        if m * n % (BLOCK * SCALES):
            return super().unpack_stack(*parts, shape=shape, dtype=dtype)
        levels = scale_levels(codes.device)
        block_scales = torch.ops.bitsandbytes.dequantize_blockwise(
            scales.flatten(), ranges[:, :-1].float().flatten(), levels, SCALES, torch.float32
        )
        spread = block_scales.view(count, -1) + ranges[:, -1:].float()
        return unpack(codes.view(-1, 1), spread.flatten(), (count * m, n), dtype).view(count, m, n)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (..., in_features) to (..., out_features), in the input's dtype."""
        scales = unpack_scales(self.weight_scales, self.weight_ranges.float())
        output = product(input, partial(unpack, shape=self.shape, dtype=self.dtype), self.weight, scales)
        return (output if self.bias is None else output + self.bias).to(input.dtype)


@dataclass(frozen=True)
class FourBitWeight:
    """A weight in four bits.

    Attributes:
        codes: two a byte, (ceil(m n / 2), 1), uint8.
        state: bitsandbytes' ``QuantState``: the scales, in eight bits.
        error: relative, of the outputs.
    """

    codes: torch.Tensor
    state: Any
    error: float

    def relative_error(self) -> float:
        """Return the error."""
        return self.error


class PackedNF4(Format):
    """Weights in four bits, in a checkpoint of ours, in which more may be packed than the Linears of blocks.

    The scales are bitsandbytes' own. To these, weights are rounded with feedback; without calibration, each number is
    rounded on its own, as bitsandbytes does.
    """

    name = "nf4"
    layer = FourBitLinear
    calibrations = ("propagated", "base", "none")
    experts = True
    narrow = True

    def fit(self, weights: Sequence[torch.Tensor], gram: Gram, ranks: Sequence[int | None]) -> list[FourBitWeight]:
        """Round weights with feedback."""
        states = [_quantized(weight.float())[1] for weight in weights]
        matrix, fitted = feedback.single(gram), []
        for weight, packed, state in zip(weights, _rounded_to(states, weights, gram), states, strict=True):
            error = output_error(weight, _read(packed, state, torch.float32), matrix)
            fitted.append(FourBitWeight(packed, state, error))
        return fitted

    def round(self, weight: torch.Tensor) -> FourBitWeight:
        """Return the weight as bitsandbytes rounds it, with the error of the weight."""
        packed, state = _quantized(weight)
        return FourBitWeight(packed, state, _relative(weight, _read(packed, state, torch.float32)))

    def describe(self, rank: str) -> str:
        """Four bits."""
        return "four bits"

    def pack(self, fitted: FourBitWeight, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Return the weight in four bits, its scales in eight (double quantisation), and the ranges of these."""
        state = fitted.state
        ranges = torch.cat([state.state2.absmax, state.offset.reshape(1).to(state.state2.absmax)])
        return {"weight": fitted.codes.cpu(), "weight_scales": state.absmax.cpu(), "weight_ranges": ranges.cpu()}


class NF4(PackedNF4):
    """Weights in four bits as bitsandbytes has them (QLoRA): an ordinary checkpoint that plain transformers loads."""

    def own(self) -> Format:
        """Return the format in a checkpoint of ours: bitsandbytes packs Linears alone."""
        return PackedNF4()

    def holds(self, model: nn.Module) -> bool:
        """Whether transformers could read it: plain Linears, by names and in modules that stay as they are."""
        linears = [(path, type(module)) for path, module in model.named_modules() if isinstance(module, nn.Linear)]
        others: Any = getattr(model, "replaced_by_bitsandbytes", None)  # an outline knows, without transformers
        if others is None:
            others = laid_out_otherwise(model, "bitsandbytes")
        plain = (nn.Linear.__name__, TransposedLinear.__name__)  # an outline's classes have the names of the model's
        return not others and all(kind.__name__ in plain and not _MISLEADING.search(path) for path, kind in linears)

    def parts(self, shape: tuple[int, int], rank: int | None, dtype: torch.dtype) -> Parts:
        """The weight's codes, its scales, the largest of every 256 of these, and the tables of both codes."""
        codes, scales = sizes(*shape)
        return {
            "weight": ((codes, 1), torch.uint8),
            "weight.absmax": ((scales,), torch.uint8),
            "weight.quant_map": ((16,), torch.float32),
            "weight.nested_absmax": ((-(-scales // SCALES),), torch.float32),
            "weight.nested_quant_map": ((256,), torch.float32),
        }

    def names(self) -> list[str]:
        """Return the names of the parts, and of the rest of bitsandbytes' ``QuantState``, as JSON."""
        return [*super().names(), "weight.quant_state.bitsandbytes__nf4"]

    def pack(self, fitted: FourBitWeight, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Return the weight in four bits, its scales in eight (double quantisation)."""
        state = fitted.state
        state.dtype = dtype  # that bitsandbytes unpacks to
        parts = {f"weight.{part}": tensor.cpu() for part, tensor in state.as_dict(packed=True).items()}
        return {"weight": fitted.codes.cpu(), **parts}

    def read(self, tensors: Sequence[torch.Tensor], shape: tuple[int, int], dtype: torch.dtype) -> StandIn:
        """Return the weight, by bitsandbytes."""
        packed, *parts = tensors
        values = {name.removeprefix("weight."): part for name, part in zip(self.names()[1:], parts, strict=True)}
        return StandIn(_read(packed, kernels().functional.QuantState.from_dict(values, device=packed.device), dtype))

    def config(self, ranks: Mapping[str, int | None], model: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
        """Return what ``BitsAndBytesConfig`` writes, with every other Linear among those to be skipped.

        Raises:
            EmlocError: transformers would skip other Linears than these.
        """
        from transformers.quantizers.quantizers_utils import should_convert_module

        linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
        skipped = [path for path in linears if path not in ranks]
        dense = [*skipped, *kept_in_fp32(model)]
        for path in linears:
            if should_convert_module(path, dense) != (path in ranks):
                raise EmlocError(
                    "transformers cannot be told which Linears of this model are in four bits: "
                    f"{path} would {'not be' if path in ranks else 'be, too'}.",
                    "Leave out --keep head, or choose another --kind.",
                    code="unsupported",
                )
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": _TYPE,
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "bfloat16" if dtype == torch.float16 else str(dtype).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": skipped,
        }


def _quantized(weight: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Return bitsandbytes' codes and ``QuantState`` of a weight."""
    functions = kernels().functional
    return functions.quantize_4bit(weight.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type=_TYPE)


def _scales(state: Any) -> torch.Tensor:
    """Return the scale of every block, fp32, as it is read from eight bits."""
    return kernels().functional.dequantize_blockwise(state.absmax, state.state2) + state.offset


def _rounded_to(states: Sequence[Any], weights: Sequence[torch.Tensor], gram: Gram) -> list[torch.Tensor]:
    """Round weights with feedback to the scales of their states, and return their codes."""
    scales = torch.cat([spread(_scales(state), weight.shape) for state, weight in zip(states, weights, strict=True)])
    units = to_scales(feedback.stacked(weights), feedback.damped(gram), scales).div_(scales)
    return [codes(part) for part in units.split([len(weight) for weight in weights])]


def _read(codes: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
    return unpack(codes, _scales(state), state.shape, state.dtype).to(dtype)


def _relative(weight: torch.Tensor, approximation: torch.Tensor) -> float:
    """Return ``||W - What|| / ||W||``: the relative output error on inputs that favour no direction."""
    error, norm = (
        float(torch.linalg.vector_norm(part, dtype=torch.float64)) for part in (weight - approximation, weight)
    )
    return error / norm if norm else 0.0


def kernels() -> Any:
    """Return bitsandbytes, which takes a second to import."""
    import bitsandbytes

    return bitsandbytes


def sizes(m: int, n: int) -> tuple[int, int]:
    """Return the numbers of codes (bytes) and of scales of a packed matrix of this shape."""
    return -(-m * n // 2), -(-m * n // BLOCK)


def parts(name: str, shape: tuple[int, int]) -> Parts:
    """Return what a layer keeps of a matrix of this name and shape, whose scales are in fp32."""
    codes, scales = sizes(*shape)
    return {name: ((codes, 1), torch.uint8), f"{name}_scales": ((scales,), torch.float32)}


def pack(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a matrix in four bits.

    Args:
        matrix: (m, n), any floating dtype.

    Returns:
        Codes, two a byte, (ceil(m n / 2), 1), uint8; and scales, (ceil(m n / 64),), fp32.
    """
    codes, state = kernels().functional.quantize_4bit(
        matrix.float().contiguous(), blocksize=BLOCK, compress_statistics=False, quant_type=_TYPE
    )
    return codes, state.absmax


def unpack(codes: torch.Tensor, scales: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Return the matrix of this shape and dtype that :func:`pack` packed, as rounded."""
    kernels()  # defines the operation
    # As one row of even length: on a CPU, odd rows have no kernel, only code that is compiled first.
    # Kernels on a GPU read scales as fp32, whatever they are: a model may have been cast as a whole.
    row = torch.ops.bitsandbytes.dequantize_4bit(codes, scales.float(), BLOCK, _TYPE, [2 * codes.numel()], dtype)
    return row.flatten()[: shape[0] * shape[1]].view(shape)


def rounded(matrix: torch.Tensor) -> torch.Tensor:
    """Return a matrix as it is after :func:`pack` and :func:`unpack`, in fp32."""
    return unpack(*pack(matrix), (matrix.shape[0], matrix.shape[1]), torch.float32)


def unpack_scales(codes: torch.Tensor, ranges: torch.Tensor) -> torch.Tensor:
    """Return scales that bitsandbytes packed in eight bits, (s,), fp32.

    Args:
        codes: (s,), uint8.
        ranges: (ceil(s / 256) + 1,), fp32: the largest of every 256 scales less the mean of all,
            and that mean.
    """
    levels = scale_levels(codes.device)
    scales: torch.Tensor = torch.ops.bitsandbytes.dequantize_blockwise(codes, ranges[:-1], levels, SCALES, ranges.dtype)
    return scales + ranges[-1]


@cache
def scale_levels(device: torch.device) -> torch.Tensor:
    """Return the 256 numbers in [-1, 1] that the codes of scales stand for, fp32."""
    return torch.tensor(_scale_levels(), dtype=torch.float32, device=device)


def _scale_levels() -> list[float]:
    with torch.device("cpu"):  # whatever device a model is being built on
        levels: list[float] = kernels().functional.create_dynamic_map().tolist()
    return levels


# Its context manager would break a compiled graph; and to say so imports the compiler, which takes a second.
when_imported("torch._dynamo", partial(torch.compiler.assume_constant_result, _scale_levels))


@cache
def _levels(device: torch.device) -> torch.Tensor:
    """Return the 16 numbers that codes stand for, ascending, fp32."""
    return kernels().functional.get_4bit_type(_TYPE, device=device)


def codes(numbers: torch.Tensor) -> torch.Tensor:
    """Return the codes of the levels nearest to numbers in [-1, 1], two a byte, (ceil(m n / 2), 1), uint8."""
    flat = indices(numbers.flatten(), middles(_levels(numbers.device)))
    pairs = torch.nn.functional.pad(flat, (0, len(flat) % 2)).view(-1, 2)  # the first in the upper half
    return (pairs[:, :1] << 4) | pairs[:, 1:]


def spread(scales: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """Return the scale of every number, not 0, in the shape of the matrix."""
    scales = scales.where(scales != 0, torch.finfo(scales.dtype).tiny)
    return scales.repeat_interleave(BLOCK)[: size.numel()].view(size)


def to_scales(
    matrix: torch.Tensor, gram: feedback.Damped, scales: torch.Tensor, kept: torch.Tensor | None = None
) -> torch.Tensor:
    """Round a matrix to four bits times the scale of every number, (m, n); ``kept`` says which stay as they are."""
    return feedback.to_levels(matrix, gram, _levels(matrix.device), scales, kept)
