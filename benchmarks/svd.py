"""Baselines from the literature: the truncated SVD of the weight itself, and of the weight with its inputs scaled.

Both keep a weight's projection on some of its left singular vectors: the truncated SVD of any matrix A is
``U_k U_k^T A``, and of ``W S`` with S diagonal, divided by S again, ``U_k (U_k^T W)``. So nothing is divided by, and
inputs that are always 0 do no harm. :mod:`emloc_core.algorithms.factorize` has the factors of the least output error.

The module is a plugin with both as formats of emulator.
"""

import torch

from emloc_core.algorithms.factorize import Factors
from emloc_core.algorithms.statistics import Gram
from emloc_core.errors import EmlocError
from emloc_core.hookspecs import hookimpl
from emloc_core.standins import LowRank

#: The power of the inputs' sizes that ASVD scales by (arXiv 2312.05821, section 3.2).
ALPHA = 0.5


def svd(weight: torch.Tensor, gram: Gram, rank: int) -> Factors:
    """Return the factors nearest to the weight itself (Eckart and Young, 1936), whatever its inputs.

    Args:
        weight: (m, n), any floating dtype.
        gram: Gram of the inputs or of the outputs, for the spectrum alone.
        rank: k, at most min(m, n).
    """
    return _projected(weight, weight, gram, rank)


def asvd(weight: torch.Tensor, inputs: Gram, rank: int) -> Factors:
    """Return the factors nearest to the weight with its inputs scaled by how large they are (ASVD, Yuan et al., 2023).

    The paper scales every input by its mean absolute value to the power alpha. A Gram has the root of the mean square
    of every input in its diagonal, which is taken instead: where inputs differ in scale alone, both are proportional.

    Args:
        weight: (m, n), any floating dtype.
        inputs: Gram of the inputs.
        rank: k, at most min(m, n).

    Raises:
        EmlocError: it is a Gram of the outputs.
    """
    if inputs.side != "input":
        raise EmlocError("ASVD needs the Gram of the inputs, and was given that of the outputs.", code="plugin")
    mean_squares = inputs.matrix.diagonal().clamp(min=0) / max(inputs.tokens, 1)
    return _projected(weight, weight.to(mean_squares) * mean_squares ** (ALPHA / 2), inputs, rank)


def _projected(weight: torch.Tensor, decomposed: torch.Tensor, gram: Gram, rank: int) -> Factors:
    """Project the weight on the left singular vectors of another matrix of its shape."""
    matrix = gram.matrix
    weight = weight.to(matrix)
    u = torch.linalg.svd(decomposed.to(matrix), full_matrices=False).U
    v = u.T @ weight
    # The energy of the outputs along every column of U: from ``rank`` on, it is what is lost.
    energies = (matrix @ u * u).sum(0) if gram.side == "output" else (v @ matrix * v).sum(1)
    return Factors(u[:, :rank].contiguous(), v[:rank].contiguous(), energies.double().clamp(min=0).cpu())


class SVD(LowRank):
    """Factors by :func:`svd`."""

    name = "svd"
    factorize = staticmethod(svd)


class ASVD(LowRank):
    """Factors by :func:`asvd`."""

    name = "asvd"
    factorize = staticmethod(asvd)


@hookimpl
def emloc_emulators() -> dict[str, type[LowRank]]:
    """Offer both."""
    return {kind.name: kind for kind in (SVD, ASVD)}
