"""The matrices of the vocabulary in an emulator, packed row by row: the output layer, and the token embeddings.

A row is a word's. Each is packed by itself, so that words are looked up, and the logits of some thousand of them
computed, while all others stay packed. Layers that are tied share the packed matrix, as they shared the weight.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from emloc_core.algorithms import feedback
from emloc_core.algorithms.factorize import energy
from emloc_core.algorithms.statistics import Gram, blocks
from emloc_core.compat.torch import HollowTensor
from emloc_core.compat.transformers import keep_as_it_is, retie
from emloc_core.errors import EmlocError
from emloc_core.standins import costs, nf4
from emloc_core.standins.layer import Parts, StandInLinear, replace_linear
from emloc_core.standins.standin import Packed

#: Rows that are unpacked, or rounded, at a time.
ROWS = 8192
#: The names of what is kept of a matrix.
PARTS = ("codes", "scales")
#: What helps where the base's own matrices are needed.
KEEP = "Make the emulator with --keep head: it then has the base's own matrices."


class Packing(ABC):
    """How rows are packed: codes, (rows, bytes of one), and scales, (rows, scales of one), in the weight's dtype.

    So the first floating-point tensor of a model has the model's dtype, which transformers takes from it.
    """

    #: Whether rows are fitted to the Gram of their inputs, where it is known.
    fitted = False

    @abstractmethod
    def parts(self, rows: int, features: int, dtype: torch.dtype) -> Parts:
        """Return shape and dtype of codes and scales, for a weight of this dtype."""

    def nbytes(self, rows: int, features: int, dtype: torch.dtype) -> int:
        """Return the bytes of both."""
        return sum(prod(size) * part_dtype.itemsize for size, part_dtype in self.parts(rows, features, dtype).values())

    def packing_bytes(self, rows: int, features: int, dtype: torch.dtype) -> int:
        """Return the peak of packing a matrix: all of it packed, and in fp32 the rows that are packed at a time.

        With feedback, these take as much as the weights of a group, and another copy, beside the target.
        """
        at_once, square = min(rows, ROWS), 4 * features**2
        work = 4 * 7 * at_once * features
        if self.fitted:
            rounding = costs.rounding(at_once, features) + square + 4 * 2 * at_once * features
            work = max(rounding, costs.summing(features, features, features) + square)
        return self.nbytes(rows, features, dtype) + work

    @abstractmethod
    def unpack(self, codes: torch.Tensor, scales: torch.Tensor, features: int) -> torch.Tensor:
        """Return rows, (rows, features), in the dtype of the scales."""

    @abstractmethod
    def _pack(
        self, rows: torch.Tensor, gram: feedback.Damped | None, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes and scales of rows, fp32, for a weight of this dtype."""

    def pack(self, weight: torch.Tensor, gram: Gram | None = None, target: torch.Tensor | None = None) -> Packed:
        """Return a weight packed, with its relative error: of the outputs on a Gram, if there is one.

        Args:
            weight: W, (rows, features), any floating dtype.
            gram: of its inputs.
            target: T, (features, features), if ``W T`` is to be packed.
        """
        damped, inputs = (feedback.damped(gram), feedback.single(gram)) if gram else (None, None)
        (m, n), lost, total = weight.shape, 0.0, 0.0
        parts = self.parts(m, n, weight.dtype)
        packed = {name: weight.new_empty(size, dtype=dtype) for name, (size, dtype) in parts.items()}
        pieces = (part.split(ROWS) for part in (weight.detach(), *packed.values()))
        for piece, codes, scales in zip(*pieces, strict=True):
            rows = piece.float() if target is None else (piece.to(target) @ target).float()
            for part, values in zip((codes, scales), self._pack(rows, damped, weight.dtype), strict=True):
                part.copy_(values)
            residual = rows - self.unpack(codes, scales.float(), n)
            lost, total = lost + _energy(residual, inputs), total + _energy(rows, inputs)
        error = (max(lost, 0.0) / total) ** 0.5 if total else 0.0
        return Packed(packed, (m, n), error)


class EightBits(Packing):
    """Whole numbers from -127 to 127, with a scale per row."""

    def parts(self, rows: int, features: int, dtype: torch.dtype) -> Parts:
        """Return shape and dtype of codes and scales, for a weight of this dtype."""
        return {"codes": ((rows, features), torch.int8), "scales": ((rows, 1), dtype)}

    def unpack(self, codes: torch.Tensor, scales: torch.Tensor, features: int) -> torch.Tensor:
        """Return rows."""
        return codes.to(scales.dtype) * scales

    def _pack(
        self, rows: torch.Tensor, gram: feedback.Damped | None, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scales = (rows.abs().amax(1, keepdim=True) / 127).to(dtype)
        return (rows / _positive(scales)).round().clamp(-127, 127).to(torch.int8), scales


class FourBits(Packing):
    """NF4: 64 neighbours share a scale; a row is filled up with zeros to whole groups. Rounded with feedback."""

    fitted = True

    def parts(self, rows: int, features: int, dtype: torch.dtype) -> Parts:
        """Return shape and dtype of codes and scales, for a weight of this dtype."""
        groups = -(-features // nf4.BLOCK)
        return {"codes": ((rows, groups * nf4.BLOCK // 2), torch.uint8), "scales": ((rows, groups), dtype)}

    def unpack(self, codes: torch.Tensor, scales: torch.Tensor, features: int) -> torch.Tensor:
        """Return rows."""
        shape = (codes.shape[0], 2 * codes.shape[1])
        return nf4.unpack(codes.reshape(-1, 1), scales.reshape(-1), shape, scales.dtype)[:, :features]

    def _pack(
        self, rows: torch.Tensor, gram: feedback.Damped | None, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        filled = functional.pad(rows, (0, -rows.shape[1] % nf4.BLOCK))
        scales = filled.unflatten(1, (-1, nf4.BLOCK)).abs().amax(2).to(dtype)
        spread = _positive(scales).repeat_interleave(nf4.BLOCK, 1)
        if gram is not None:
            used = slice(rows.shape[1])
            filled[:, used] = nf4.to_scales(rows, gram, spread[:, used])
        return nf4.codes(filled / spread).view(len(rows), -1), scales


#: By their names in an emulator's config.
PACKINGS: Mapping[str, Packing] = {"4-bit": FourBits(), "8-bit": EightBits()}


def _energy(rows: torch.Tensor, inputs: torch.Tensor | None) -> float:
    """Return ``||R X||^2`` by the Gram of X, or ``||R||^2``."""
    return float(rows.square().sum(dtype=torch.float64)) if inputs is None else energy(rows, inputs)


def _positive(scales: torch.Tensor) -> torch.Tensor:
    """Return scales that can be divided by, fp32."""
    return scales.float().clamp(min=torch.finfo(torch.float32).tiny)


class PackedRows(HollowTensor):
    """A packed matrix, (rows, features), where code reads a layer's ``weight``: rows of it are ordinary tensors.

    Embeddings look words up in it, and TRL's loss takes some thousand rows of an output layer at a time.
    """

    layer: "PackedLayer"

    @classmethod
    def from_layer(cls, layer: "PackedLayer") -> "PackedRows":
        """Return the matrix of a layer."""
        rows = cls.hollow((len(layer.codes), layer.features), layer.scales)
        rows.layer = layer
        keep_as_it_is(rows)
        return rows

    @classmethod
    def compute(cls, operation: Any, *args: Any) -> Any:
        """Return rows by a slice or by indices, or a single one.

        Raises:
            EmlocError: anything else is asked for.
        """
        aten, (matrix, *others) = torch.ops.aten, args
        if operation is aten.detach.default:
            return cls.from_layer(matrix.layer)
        if operation is aten.slice.Tensor and others[:1] in ([], [0]):
            return matrix.layer.rows(slice(*others[1:]))
        if operation is aten.select.int and others[0] == 0:
            return matrix.layer.rows(torch.tensor([others[1]]))[0]
        if operation is aten.embedding.default:
            return matrix.layer.rows(others[0])
        raise EmlocError(
            f"This emulator has its vocabulary's matrix packed, but {operation} needs it as it is in the base.",
            KEEP,
            code="unsupported",
        )


class PackedLayer(nn.Module):
    """What both layers have in common.

    Attributes:
        features: columns of the matrix.
    """

    packing: Packing
    features: int
    codes: torch.Tensor
    scales: torch.Tensor

    @property
    def weight(self) -> Any:
        """The matrix."""
        return PackedRows.from_layer(self)

    def rows(self, index: slice | torch.Tensor) -> torch.Tensor:
        """Return rows, (..., features): those of a slice, or of indices, (...)."""
        codes, scales = self.codes[index], self.scales[index]
        rows = self.packing.unpack(codes.flatten(0, -2), scales.flatten(0, -2), self.features)
        return rows.view(*codes.shape[:-1], self.features)


class PackedHead(PackedLayer, StandInLinear):  # type: ignore[override]  # its weight cannot be set
    """An output layer whose rows are packed. Logits are computed of some thousand words at a time."""

    @classmethod
    def parts(cls, shape: tuple[int, int], rank: int | None, dtype: torch.dtype) -> Parts:
        """Return codes and scales."""
        return cls.packing.parts(*shape, dtype)

    @classmethod
    def unpack(cls, *parts: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """Return the weight."""
        codes, scales = parts
        return cls.packing.unpack(codes, scales, shape[1]).to(dtype)

    @property
    def features(self) -> int:  # type: ignore[override]
        """Columns of the matrix."""
        return self.in_features

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (..., in_features) to (..., out_features)."""
        logits: torch.Tensor = _Logits.apply(input, self.packing, self.codes, self.scales)
        return logits if self.bias is None else logits + self.bias


class _Logits(torch.autograd.Function):
    """``x W^T`` with W, packed, in pieces; W gets no gradient, and is unpacked once more for the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, packing: Packing, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.packing, ctx.features, ctx.dtype = packing, x.shape[-1], x.dtype
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else scales.dtype
        logits = x.new_empty(*x.shape[:-1], len(codes), dtype=dtype)
        for words in blocks(len(codes), ROWS):
            rows = packing.unpack(codes[words], scales[words], x.shape[-1])
            logits[..., words] = functional.linear(x.to(dtype), rows.to(dtype))
        return logits

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        codes, scales = ctx.saved_tensors  # checkpointing gives them once
        total = torch.zeros(*gradient.shape[:-1], ctx.features, device=gradient.device)
        for words in blocks(len(codes), ROWS):
            rows = ctx.packing.unpack(codes[words], scales[words], ctx.features)
            total += gradient[..., words] @ rows.to(gradient.dtype)
        return total.to(ctx.dtype), None, None, None


class PackedEmbedding(PackedLayer):
    """Token embeddings whose rows are packed; mixed into the class of the base's, which may scale or normalise them."""

    embedding_dim: int

    @property
    def features(self) -> int:  # type: ignore[override]
        """Columns of the matrix."""
        return self.embedding_dim

    def dense(self) -> nn.Module:
        """Return the embeddings of the base's class, with the unpacked weight."""
        embedding: Any = copy.deepcopy(self)
        weight = self.rows(slice(None))
        del embedding.codes, embedding.scales
        _, embedding.__class__ = type(self).__bases__
        embedding.weight = nn.Parameter(weight, requires_grad=False)
        return embedding


def _packed(kind: Any, packing: str) -> type:
    """Return a class of layers with packed rows, for an output layer or for embeddings of some class."""
    if issubclass(kind, nn.Linear):
        return type(f"PackedHead{packing}", (PackedHead,), {"packing": PACKINGS[packing]})
    return type(f"Packed{kind.__name__}", (PackedEmbedding, kind), {"packing": PACKINGS[packing]})


def vocabulary_layers(model: Any) -> dict[str, Any]:
    """Return the token embeddings and the output layer of a model by their paths, in this order, if it has any."""
    layers = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        with suppress(NotImplementedError):  # transformers does not know where they are
            layers.append(getattr(model, name, lambda: None)())
    paths = {id(module): path for path, module in model.named_modules()}
    return {paths[id(module)]: module for module in layers if id(module) in paths}


def rows_at_once(model: Any) -> int | None:
    """Return how many rows of a model's output layer are unpacked at a time; None: it is not packed."""
    return ROWS if isinstance(getattr(model, "get_output_embeddings", lambda: None)(), PackedHead) else None


def packed_layers(config: Mapping[str, Any]) -> dict[str, str]:
    """Return how the output layer and the embeddings are packed, by path; nothing for models that have them dense."""
    return (config.get("quantization_config") or {}).get("vocabulary") or {}


def replace_vocabulary(model: Any, packings: Mapping[str, str]) -> None:
    """Replace output layer and embeddings of a model by empty packed ones; those that were tied still are.

    Args:
        packings: the name of the packing, by the path of the layer.

    Raises:
        EmlocError: the model has another module at a path.
    """
    for path, packing in packings.items():
        try:
            module: Any = model.get_submodule(path)
        except AttributeError:
            module = None
        if isinstance(module, nn.Linear):
            replace_linear(model, path, _packed(nn.Linear, packing))
        elif isinstance(module, nn.Embedding):
            _pack_embedding(module, packing)
        else:
            raise EmlocError(
                f"The model has neither a Linear nor embeddings at {path}.",
                "The emulator belongs to another architecture: copy it again in full, or make it again.",
                code="mismatch",
            )
    ties = dict(getattr(model, "all_tied_weights_keys", None) or {})
    for name, source in list(ties.items()):
        path, other = name.removesuffix(".weight"), source.removesuffix(".weight")
        if path in packings and other in packings:
            for part in PARTS:
                setattr(model.get_submodule(path), part, getattr(model.get_submodule(other), part))
            del ties[name]
            ties |= {f"{path}.{part}": f"{other}.{part}" for part in PARTS}
            retie(model, ties)


def packed_embedding(module: Any, packing: str, parts: Mapping[str, torch.Tensor]) -> Any:
    """Return embeddings of a module's class, with the rows of its packed weight; the module stays as it is."""
    embedding = copy.deepcopy(module, {id(module.weight): module.weight})
    _pack_embedding(embedding, packing)
    for name, part in parts.items():
        setattr(embedding, name, nn.Parameter(part, requires_grad=False))
    return embedding


def _pack_embedding(module: Any, packing: str) -> None:
    weight = module.weight
    del module.weight
    module.__class__ = _packed(type(module), packing)
    for name, (shape, dtype) in module.packing.parts(*weight.shape, weight.dtype).items():
        part = torch.empty(shape, dtype=dtype, device=weight.device)
        module.register_parameter(name, nn.Parameter(part, requires_grad=False))
