"""Optimal low-rank factors of a Linear on given activations. Pure functions of tensors; knows no files.

For W (m x n) and inputs X, the rank-k matrix that minimises the output error is ``U_k U_k^T W``, where U_k holds the
top eigenvectors of the outputs' Gram ``W G W^T`` (m x m), ``G = sum x x^T`` (n x n). It is the paper's whitened SVD
(arXiv 2506.12015, section 3.1) without the whitening: no inverse, no damping, and right when there are fewer tokens
than features. Where m > n the same eigenvectors come from the n x n side.
"""

from dataclasses import dataclass

import torch

from emloc_core.statistics import Gram


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
        weight: (m, n), any floating dtype. The work is done in the Gram's dtype.
        gram: of the inputs (without the bias's part) or of the outputs.
        rank: k, at most min(m, n).
    """
    weight = weight.to(gram.matrix.dtype)
    if gram.side == "output":
        energies, vectors = torch.linalg.eigh(gram.matrix)
        u = vectors[:, -rank:].flip(1)
    else:
        image = weight @ gram.root  # (m, n): its left singular vectors are the outputs' directions
        energies, vectors = torch.linalg.eigh(image.T @ image)
        # QR, not division by the singular values: those are noise where the rank exceeds the number of tokens.
        u = torch.linalg.qr(image @ vectors[:, -rank:].flip(1)).Q
    return Factors(u.contiguous(), u.T @ weight, energies.flip(0).clamp(min=0).double().cpu())
