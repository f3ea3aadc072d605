"""Optimal low-rank factors of a Linear on given activations. Pure functions of tensors; knows no files.

For W (m x n) and inputs X, the rank-k matrix that minimises the output error is ``U_k U_k^T W``, where U_k holds the
top eigenvectors of the outputs' Gram ``W G W^T`` (m x m), ``G = sum x x^T`` (n x n). It is the paper's whitened SVD
(arXiv 2506.12015, section 3.1) without the whitening: no inverse of G, no damping, and right when there are fewer
tokens than features. Where m > n the same eigenvectors come from the n x n side, by ``W = Q R``: ``W G W^T`` is
``Q (R G R^T) Q^T``.

In fp32 first; where the eigenvalues that are cut off are no more than the rounding of the largest one, in fp64.
"""

from dataclasses import dataclass

import torch

from emloc_core.statistics import Gram, symmetric_product

#: fp32 is enough while the energy that is cut off is above this many times ``sqrt(size) * eps * largest eigenvalue``.
#: With 270 the error was 1.0003 to 1.0006 times the optimum at sizes 576, 1152 and 2048 with one dominant direction.
RESOLUTION = 400

#: How far from orthonormal the columns of ``W R^-1`` may be. The loss is of second order in it.
_ORTHONORMAL = 1e-3


@dataclass(frozen=True)
class Factors:
    """Low-rank factors of a Linear.

    Attributes:
        u: (m, k), orthonormal columns.
        v: (k, n), so that ``u @ v`` approximates the weight.
        spectrum: energy of the outputs along every direction, descending, fp64 on the CPU. Its length is min(m, n).
    """

    u: torch.Tensor
    v: torch.Tensor
    spectrum: torch.Tensor

    def relative_error(self, rank: int | None = None) -> float:
        """Return ``||(W - What) X|| / ||W X||`` on the calibration inputs at any rank, from the spectrum alone."""
        kept = self.u.shape[1] if rank is None else rank
        total = self.spectrum.sum()
        return float((self.spectrum[kept:].sum() / total).sqrt()) if total > 0 else 0.0


def factorize(weight: torch.Tensor, gram: Gram, rank: int) -> Factors:
    """Return the rank-``rank`` factors that are optimal for the activations behind ``gram``.

    Args:
        weight: (m, n), any floating dtype.
        gram: of the inputs (without the bias's part) or of the outputs. The work is done in its dtype, and once more
            in fp64 where fp32 cannot resolve what is cut off.
        rank: k, at most min(m, n).

    Returns:
        Factors in the dtype that was needed, on the Gram's device.
    """
    solve = _on_outputs if gram.side == "output" else _on_inputs
    matrix = gram.matrix
    found = solve(weight.to(matrix), matrix, rank)
    if found is None or not _is_resolved(found, matrix.dtype):
        found = solve(weight.to(matrix.device, torch.float64), matrix.double(), rank)
    assert found is not None
    return found


def _is_resolved(found: Factors, dtype: torch.dtype) -> bool:
    if dtype == torch.float64:
        return True
    noise = RESOLUTION * len(found.spectrum) ** 0.5 * torch.finfo(dtype).eps * found.spectrum[0]
    return bool(found.spectrum[found.u.shape[1] :].sum() > noise)


def _on_outputs(weight: torch.Tensor, gram: torch.Tensor, rank: int) -> Factors:
    energies, vectors = _top(gram, rank)
    return Factors(vectors.contiguous(), vectors.T @ weight, energies)


def _on_inputs(weight: torch.Tensor, gram: torch.Tensor, rank: int) -> Factors | None:
    """Work on the n x n side; None where fp32 cannot tell the weight's columns apart."""
    # Q by Cholesky: a third of the time of Householder's QR, which remains for weights that need it.
    triangle, failed = torch.linalg.cholesky_ex(symmetric_product(weight), upper=True)
    if not failed:
        energies, vectors = _top(triangle @ gram @ triangle.T, rank)
        u = weight @ torch.linalg.solve_triangular(triangle, vectors, upper=True)
        overlaps = symmetric_product(u)
        deviation = (overlaps - torch.eye(rank).to(overlaps)).norm() / rank**0.5
        if deviation < _ORTHONORMAL:
            again = torch.linalg.cholesky(overlaps, upper=True)
            u = torch.linalg.solve_triangular(again, u, upper=True, left=False)
            return Factors(u, u.T @ weight, energies)
    if weight.dtype != torch.float64:
        return None
    q, r = torch.linalg.qr(weight)
    energies, vectors = _top(r @ gram @ r.T, rank)
    return Factors(q @ vectors, vectors.T @ r, energies)


def _top(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all eigenvalues (fp64 on the CPU, none below 0) and the top eigenvectors (size, rank), descending.

    The whole decomposition by divide and conquer takes no longer than LAPACK's routine for some of the eigenvectors.
    """
    energies, vectors = torch.linalg.eigh(matrix)
    return energies.flip(0).clamp(min=0).double().cpu(), vectors[:, -rank:].flip(1)
