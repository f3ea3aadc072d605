"""Kinds of emulator: what replaces a Linear's weight, in files and in a model.

A kind decides how a Linear's stand-in is stored and read back, what transformers is told so that it loads it, and how
many bytes it takes. Everything else (streaming, resuming, training, correction, merging) is the same for all kinds.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from transformers.quantizers.quantizers_utils import should_convert_module

from emloc_core.algorithms import feedback, fourbit
from emloc_core.algorithms.factorize import Factors, output_error, wants_inputs
from emloc_core.algorithms.statistics import Gram, cheaper_side
from emloc_core.errors import EmlocError
from emloc_core.lowrank import FORMAT_VERSION, FOUR_BITS_VERSION, METHOD, replace_linears
from emloc_core.settings import CompressSettings

#: U (m, k) and V (k, n) with U V the matrix that a Linear of the emulator multiplies by.
Pair = tuple[torch.Tensor, torch.Tensor]
Factorize = Callable[[torch.Tensor, Gram, int], Factors]
#: Kinds in the order in which they are recommended: the first whose tuning fits. ``docs/evidence.md`` says why.
RECOMMENDED = ("nf4", "low-rank-nf4")
#: Settings that only kinds with ranks know.
_OF_RANKS = ("ratio", "allocator", "calibration", "factorizer")


@dataclass(frozen=True)
class Weight:
    """A stand-in made from a weight alone.

    Attributes:
        weight: (m, n), the base's.
        error: ``||W - What|| / ||W||``: the relative output error on inputs that favour no direction.
    """

    weight: torch.Tensor
    error: float

    def relative_error(self) -> float:
        """Return the error."""
        return self.error


class Kind(ABC):
    """One kind of emulator.

    Attributes:
        name: of the kind.
        taps_inputs: whether factors are fitted to the Gram of the inputs, even where that of the outputs is smaller.
        has_ranks: whether a Linear becomes factors of some rank, fitted to calibration rows. If not, its weight alone
            says what becomes of it, and the settings of ranks mean nothing.
        has_experts: whether fused experts become factors too; otherwise they stay dense.
        can_be_cut: whether emulators of any ratio can be cut from spectra.
        calibration: what factors are fitted to where the user does not say.
    """

    name: str
    taps_inputs: bool = False
    has_ranks: bool = True
    has_experts: bool = False
    can_be_cut: bool = False
    calibration: Literal["base", "propagated"] = "base"

    def check(self, settings: CompressSettings) -> None:
        """Refuse settings that mean nothing for this kind.

        Raises:
            EmlocError: names them.
        """
        if not self.has_ranks:
            defaults = CompressSettings()
            if given := [name for name in _OF_RANKS if getattr(settings, name) != getattr(defaults, name)]:
                raise EmlocError(
                    f"An emulator of the kind {self.name!r} has no ranks, and so no {', '.join(given)}.",
                    "Leave that out, or choose another --kind.",
                )

    def rounding(self, factorize: Factorize) -> Factorize:
        """Return a factorizer whose factors are as they will be when they have been stored and read."""
        return factorize

    def stand_in(self, weight: torch.Tensor) -> Weight:
        """Return what stands in for a weight, (m, n); asked of kinds without ranks alone."""
        raise NotImplementedError(self.name)

    @abstractmethod
    def keys(self, weight: str) -> list[str]:
        """Return the keys of a stand-in's tensors in the checkpoint; the first is that of the weight."""

    @abstractmethod
    def pack(self, weight: str, stand_in: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Return a stand-in's tensors by their keys.

        Args:
            weight: key of the weight in the checkpoint.
            stand_in: :class:`~emloc_core.algorithms.factorize.Factors`, or without ranks a :class:`Weight`.
            dtype: of the base.
        """

    @abstractmethod
    def unpack(self, tensors: list[torch.Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Pair:
        """Return U and V of what the checkpoint holds for a Linear.

        Args:
            tensors: in the order of :meth:`keys`.
            shape: of the weight.
            dtype: of the base.
        """

    @abstractmethod
    def config(self, ranks: dict[str, int], model: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
        """Return the emulator's ``quantization_config``.

        Args:
            ranks: by module path of the Linears that are replaced.
            model: the base; meta tensors suffice.
            dtype: of the base.
        """

    @abstractmethod
    def nbytes(self, shape: tuple[int, int], rank: int, dtype: torch.dtype) -> int:
        """Return the bytes of what stands in for a weight of this shape."""

    @abstractmethod
    def replace(self, model: nn.Module, ranks: dict[str, int]) -> None:
        """Replace Linears of a model without weights by layers that need as much memory as the emulator's."""


class LowRank(Kind):
    """Factors in the dtype of the base."""

    name = "low-rank"
    has_experts = can_be_cut = True

    def keys(self, weight: str) -> list[str]:
        """U replaces the weight, V is beside it."""
        return [weight, f"{_stem(weight)}V"]

    def pack(self, weight: str, stand_in: Factors, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Return both factors."""
        parts = (stand_in.u.to("cpu", dtype), stand_in.v.to("cpu", dtype))
        return dict(zip(self.keys(weight), parts, strict=True))

    def unpack(self, tensors: list[torch.Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Pair:  # noqa: ARG002
        """Return both factors."""
        u, v = tensors
        return u, v

    def config(self, ranks: dict[str, int], model: nn.Module, dtype: torch.dtype) -> dict[str, Any]:  # noqa: ARG002
        """Say which Linears are factors; :mod:`emloc_core.lowrank` loads them."""
        return {"quant_method": METHOD, "format_version": FORMAT_VERSION, "ranks": ranks}

    def nbytes(self, shape: tuple[int, int], rank: int, dtype: torch.dtype) -> int:
        """``k (m + n)`` numbers."""
        return rank * sum(shape) * dtype.itemsize

    def replace(self, model: nn.Module, ranks: dict[str, int]) -> None:
        """Replace by the layers that an emulator has."""
        replace_linears(model, ranks)


class FourBitLowRank(Kind):
    """Factors in four bits, each fitted to the other as rounded, and seen as rounded by what is fitted after them."""

    name = "low-rank-nf4"
    calibration = "propagated"
    taps_inputs = True

    def rounding(self, factorize: Factorize) -> Factorize:
        """Round U with feedback, fit V to that by least squares, and round it with feedback.

        The inputs of U are those of the exact V. The best V for a given U has ``U V x`` nearest to ``W x`` for every x:
        ``V = (U^T U)^-1 U^T W``.
        """

        def rounded(weight: torch.Tensor, gram: Gram, rank: int) -> Factors:
            m, n = weight.shape
            on_inputs = wants_inputs(factorize) or cheaper_side(m, n) == "input"
            exact = factorize(weight, gram if on_inputs else gram.through(weight), rank)
            inputs = gram.matrix
            u = feedback.rounded(exact.u, exact.v.to(inputs) @ inputs @ exact.v.to(inputs).T).double()
            v = feedback.rounded(torch.linalg.solve(u.T @ u, u.T @ weight.to(u)), inputs)
            return replace(exact, u=u.float(), v=v, error=output_error(weight, u.float() @ v, inputs))

        return rounded

    def keys(self, weight: str) -> list[str]:
        """U replaces the weight."""
        stem = _stem(weight)
        return [weight, f"{stem}V", f"{stem}weight_scales", f"{stem}V_scales"]

    def pack(self, weight: str, stand_in: Factors, dtype: torch.dtype) -> dict[str, torch.Tensor]:  # noqa: ARG002
        """Return both factors' codes and scales."""
        (u, u_scales), (v, v_scales) = fourbit.pack(stand_in.u), fourbit.pack(stand_in.v)
        return dict(zip(self.keys(weight), (part.cpu() for part in (u, v, u_scales, v_scales)), strict=True))

    def unpack(self, tensors: list[torch.Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Pair:
        """Return both factors, unpacked; there are so many ranks as fit the scales of both."""
        u, v, u_scales, v_scales = tensors
        m, n = shape
        rank = (u.numel() + v.numel()) * 2 // (m + n)
        return fourbit.unpack(u, u_scales, (m, rank), dtype), fourbit.unpack(v, v_scales, (rank, n), dtype)

    def config(self, ranks: dict[str, int], model: nn.Module, dtype: torch.dtype) -> dict[str, Any]:  # noqa: ARG002
        """Say which Linears are factors; :mod:`emloc_core.lowrank` loads them."""
        return {"quant_method": METHOD, "format_version": FOUR_BITS_VERSION, "ranks": ranks}

    def nbytes(self, shape: tuple[int, int], rank: int, dtype: torch.dtype) -> int:  # noqa: ARG002
        """Half a byte a number, and a scale for every 64."""
        parts = (fourbit.sizes(shape[0], rank), fourbit.sizes(rank, shape[1]))
        return sum(codes + 4 * scales for codes, scales in parts)

    def replace(self, model: nn.Module, ranks: dict[str, int]) -> None:
        """Replace by the layers that an emulator has."""
        replace_linears(model, ranks, FOUR_BITS_VERSION)


class NF4(Kind):
    """Weights in four bits as bitsandbytes has them (QLoRA): an ordinary checkpoint that plain transformers loads."""

    name = "nf4"
    has_ranks = False
    _PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4")

    def stand_in(self, weight: torch.Tensor) -> Weight:
        """Return the weight, with the error of its four bits."""
        packed = list(self.pack("weight", Weight(weight, 0.0), weight.dtype).values())
        approximation = max(self.unpack(packed, (weight.shape[0], weight.shape[1]), torch.float32), key=torch.numel)
        lost, whole = (
            float(torch.linalg.vector_norm(part, dtype=torch.float64))
            for part in (weight.cpu().float() - approximation, weight)
        )
        return Weight(weight, lost / whole if whole else 0.0)

    def keys(self, weight: str) -> list[str]:
        """The weight's codes, and the parts of bitsandbytes' ``QuantState``."""
        return [weight, *(f"{weight}.{part}" for part in self._PARTS)]

    def pack(self, weight: str, stand_in: Weight, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Return the weight in four bits, its scales in eight (double quantisation)."""
        codes, state = fourbit.kernels().functional.quantize_4bit(
            stand_in.weight.to("cpu", dtype).contiguous(), blocksize=fourbit.BLOCK, compress_statistics=True,
            quant_type="nf4",
        )  # fmt: skip
        parts = {f"{weight}.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}
        return {weight: codes, **parts}

    def unpack(self, tensors: list[torch.Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Pair:
        """Return the weight and the identity, on the side where it is the smaller one."""
        functions = fourbit.kernels().functional
        codes, *parts = tensors
        state = functions.QuantState.from_dict(dict(zip(self._PARTS, parts, strict=True)), device=codes.device)
        weight = functions.dequantize_4bit(codes, state).to(dtype)
        identity = torch.eye(min(shape), dtype=dtype, device=weight.device)
        return (weight, identity) if shape[0] >= shape[1] else (identity, weight)

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
            linear: Any = model.get_submodule(path)
            model.set_submodule(path, _FourBitLinear(linear))


class _FourBitLinear(nn.Linear):
    """As bitsandbytes' ``Linear4bit``, of which memory can be followed without contents."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._unpacked, device = linear.weight.dtype, linear.weight.device
        codes, scales = (
            torch.empty(size, dtype=torch.uint8, device=device)
            for size in fourbit.sizes(self.out_features, self.in_features)
        )
        self.weight, self.scales = (nn.Parameter(part, requires_grad=False) for part in (codes[:, None], scales))
        self.bias = linear.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        shape = (self.out_features, self.in_features)
        found = fourbit.product(input, self.weight, self.scales.float(), shape, self._unpacked)
        return found if self.bias is None else found + self.bias


def _stem(weight: str) -> str:
    return weight.removesuffix("weight")
