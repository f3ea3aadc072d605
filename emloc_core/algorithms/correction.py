"""The correction of a LoRA that was trained on an emulator, as pure functions of tensors.

On the LoRA's input subspace, the emulator computes ``What q`` where the base computes ``W q``. The correction subtracts
the difference from the LoRA's output, so that there the base with the corrected LoRA behaves like the tuned emulator
(arXiv 2506.12015, section 3.3; the division by the LoRA's scale is missing in the reference code).
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch.nn.functional import pad

from emloc_core.algorithms.lora import Lora

#: Limits the correction of each direction to this many times the LoRA's own weight there. 0: not corrected;
#: None: not limited.
Clamp = float | None
_WIDENED = 4 << 20  # elements of a weight that are in fp32 at a time


class Emulated(Protocol):
    """What stands in for the weight on the emulator; see :class:`emloc_core.standins.StandIn`."""

    def times(self, columns: torch.Tensor) -> torch.Tensor:
        """Return ``What Q``, (m, r), for columns Q, (n, r), in their dtype."""


def correct_lora(weight: torch.Tensor, emulated: Emulated, lora: Lora, clamps: Sequence[Clamp]) -> list[Lora]:
    """Correct a LoRA for the misalignment ``W - What``, once per clamp.

    With ``A^T = Q D Z^T`` (thin SVD), ``B A = B0 Q^T`` for ``B0 = B Z D``. The misalignment on that subspace is
    ``E = (W - What) Q / scale``; column j of E is scaled by ``min(1, clamp * mean|B0[:, j]| / mean|E[:, j]|)``.

    Args:
        weight: the base's weight W, (m, n).
        emulated: What, the emulator's.
        lora: the LoRA trained on the emulator.
        clamps: the paper's code uses 3.

    Returns:
        One LoRA per clamp: ``A' = Q^T``, ``B' = B0 - E`` (scaled), in the dtypes of ``lora``; with zeros up to its
        rank, where that exceeds n. Clamp 0 returns ``lora`` itself.
    """
    dtype = torch.promote_types(lora.a.dtype, torch.float32)
    # In fp64: where two values of D are close, rounding mixes their directions, and the clamp is by direction.
    q, d, zh = (part.to(dtype) for part in torch.linalg.svd(lora.a.T.double(), full_matrices=False))
    b0 = (lora.b.to(dtype) @ zh.T) * d
    error = (times(weight, q) - emulated.times(q)) / lora.scale
    unused = lora.rank - q.shape[1]
    a = pad(q.T, (0, 0, 0, unused)).contiguous().to(lora.a.dtype)
    corrected = []
    for clamp in clamps:
        if clamp == 0:
            corrected.append(lora)
            continue
        b = pad(b0 - error * column_scales(b0, error, clamp), (0, unused))
        corrected.append(Lora(a, b.to(lora.b.dtype), lora.scale))
    return corrected


def times(matrix: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return the product in the columns' dtype; a half-precision matrix is widened some rows at a time."""
    rows = max(1, _WIDENED // matrix.shape[1])
    return torch.cat([part.to(columns.dtype) @ columns for part in matrix.split(rows)])


def column_scales(b0: torch.Tensor, error: torch.Tensor, clamp: Clamp) -> torch.Tensor:
    """Return the factor of every column of the correction, (r,), in [0, 1]."""
    if clamp is None:
        return torch.ones(error.shape[1], dtype=error.dtype, device=error.device)
    size = error.abs().mean(0)
    limit = clamp * b0.abs().mean(0)
    return torch.where(size > limit, limit / size.clamp(min=torch.finfo(size.dtype).tiny), 1.0)
