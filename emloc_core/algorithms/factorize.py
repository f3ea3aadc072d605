"""Optimal low-rank factors of a Linear on given activations, as pure functions of tensors.

For W (m x n) and inputs X, the rank-k matrix that minimises the output error is ``U_k U_k^T W``, where U_k holds the
top eigenvectors of the outputs' Gram ``W G W^T`` (m x m), ``G = sum x x^T`` (n x n). It is the paper's whitened SVD
(arXiv 2506.12015, section 3.1) without the whitening: no inverse of G, no damping, and right when there are fewer
tokens than features. Where m > n the same eigenvectors come from the n x n side, by ``W = Q R``: ``W G W^T`` is
``Q (R G R^T) Q^T``.

Computed in fp32 after splitting off the few dominant eigenvalues, since rounding errors are proportional to the largest
eigenvalue; in fp64 where the truncated energy is still below that rounding.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from emloc_core.algorithms.statistics import Gram, blocks, in_pieces, product, symmetric_product

#: fp32 suffices while the truncated energy is above this many times ``sqrt(size) * eps * largest eigenvalue``.
#: With 270 the error was 1.0003 to 1.0006 times the optimum at sizes 576, 1152 and 2048 with one dominant direction.
RESOLUTION = 400

#: The Krylov space that is searched for dominant eigenvectors: columns of a block, and products with the matrix.
_BLOCK, _DEPTH = 16, 6
#: All of its columns.
KRYLOV = _BLOCK * _DEPTH

#: An eigenvector has converged if ``||M q - e q||`` is below this many times e.
_CONVERGED = 1e-6

#: Matrices with a mean diagonal outside this range are decomposed in fp64.
_RANGE = 1e-18, 1e30

#: Limit on the deviation from orthonormal columns. The loss is of second order in it.
_ORTHONORMAL = 1e-3


@dataclass(frozen=True)
class Factors:
    """Low-rank factors of a Linear.

    Attributes:
        u: (m, k), orthonormal columns.
        v: (k, n), so that ``u @ v`` approximates the weight.
        spectrum: energy of the outputs along every direction, fp64 on the CPU. Its length is min(m, n). The first k
            belong to the columns of u, so the truncated energy is known at every rank. Descending if the factors are
            optimal.
        error: relative output error of these factors, where rounding makes it larger than the truncation error;
            otherwise None.
    """

    u: torch.Tensor
    v: torch.Tensor
    spectrum: torch.Tensor
    error: float | None = field(default=None, kw_only=True)

    def relative_error(self, rank: int | None = None) -> float:
        """Return ``||(W - What) X|| / ||W X||`` on the calibration inputs at any rank, from the spectrum alone.

        Without a rank, the error of the factors as they are.
        """
        if rank is None and self.error is not None:
            return self.error
        rank = self.u.shape[1] if rank is None else rank
        total = self.spectrum.sum()
        return float((self.spectrum[rank:].sum() / total).sqrt()) if total > 0 else 0.0


def wants_inputs(factorize: Callable[..., Any]) -> bool:
    """Return whether a factorizer has a parameter ``inputs``: it is then always given the Gram of the inputs."""
    return "inputs" in inspect.signature(factorize).parameters


def output_error(weight: torch.Tensor, approximation: torch.Tensor, gram: torch.Tensor) -> float:
    """Return ``||(W - What) X|| / ||W X||`` from the Gram of the inputs.

    Args:
        weight: W, (m, n).
        approximation: What, (m, n).
        gram: ``sum x x^T``, (n, n).
    """
    cut = total = 0.0
    for rows in blocks(len(weight)):
        exact = weight[rows].to(gram)
        cut += energy(exact - approximation[rows].to(gram), gram)
        total += energy(exact, gram)
    cut, total = max(cut, 0.0), max(total, 0.0)
    return (cut / total) ** 0.5 if total else 0.0


def energy(rows: torch.Tensor, gram: torch.Tensor) -> float:
    """Return ``||R X||^2 = tr(R G R^T)`` for R, (m, n), and the Gram of X, (n, n): by little more than half of it."""
    total = 0.0
    for block in blocks(len(gram)):
        own, later = rows[:, block] @ gram[block, block], slice(block.stop, None)
        own.addmm_(rows[:, later], gram[later, block], alpha=2)
        total += float((own * rows[:, block]).sum(dtype=torch.float64))
    return total


def factorize(weight: torch.Tensor, gram: Gram, rank: int) -> Factors:
    """Return the rank-``rank`` factors that are optimal for the activations behind ``gram``.

    Args:
        weight: (m, n), any floating dtype.
        gram: Gram of the inputs, or of the outputs without the bias. Computed in its dtype, and again in fp64 if fp32
            cannot resolve the truncated energy.
        rank: k, at most min(m, n).

    Returns:
        Factors in the dtype of the computation, on the Gram's device.
    """
    solve = _on_outputs if gram.side == "output" else _on_inputs
    rest, heavy = gram.parts()
    factors = solve(weight, rest, heavy, rank)
    if factors is None:
        factors = solve(weight, gram.matrix.double(), heavy[:0], rank)
    assert factors is not None
    return factors


def _on_outputs(weight: torch.Tensor, rest: torch.Tensor, heavy: torch.Tensor, rank: int) -> Factors | None:
    """Decompose the m x m side; None if fp32 cannot resolve the truncated energy."""
    top = _top(rest, heavy, rank)
    return top and Factors(top[1], _projected(weight, top[1]), top[0])


def _projected(weight: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Return ``U^T W``."""
    projected = u.new_zeros(u.shape[1], weight.shape[1])
    for rows, piece in in_pieces(weight, u):
        projected.addmm_(u[rows].T, piece)
    return projected


def _on_inputs(weight: torch.Tensor, rest: torch.Tensor, heavy: torch.Tensor, rank: int) -> Factors | None:
    """Work on the n x n side; None where fp32 cannot tell the weight's columns apart, or resolve what is cut off.

    None also if there are heavy rows: ``W R^-1`` in fp32 would rotate their directions too far. Inputs are usually
    normalised, so that there are none.
    """
    if len(heavy):
        return None
    # Q by Cholesky: a third of the time of Householder's QR, which remains for weights that need it.
    triangle, failed = torch.linalg.cholesky_ex(symmetric_product(weight, rest.dtype), upper=True)
    if not failed:
        top = _top(triangle @ rest @ triangle.T, heavy, rank)
        if top is None:
            return None
        u = product(weight, torch.linalg.solve_triangular(triangle, top[1], upper=True))
        overlaps = symmetric_product(u)
        deviation = (overlaps - torch.eye(rank).to(overlaps)).norm() / rank**0.5
        if deviation < _ORTHONORMAL:
            again = torch.linalg.cholesky(overlaps, upper=True)
            torch.linalg.solve_triangular(again, u, upper=True, left=False, out=u)
            return Factors(u, _projected(weight, u), top[0])
    if rest.dtype != torch.float64:
        return None
    q, r = torch.linalg.qr(weight.to(rest))
    top = _top(r @ rest @ r.T, heavy, rank)
    return top and Factors(q @ top[1], top[1].T @ r, top[0])


def _top(rest: torch.Tensor, heavy: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Decompose ``rest + heavy^T heavy``; heavy, (p, size), is in fp64, and empty where rest is.

    Returns:
        All eigenvalues (fp64 on the CPU, none below 0) and the top eigenvectors (size, rank), descending. None where
        fp32 cannot hold the matrix, or resolve what is cut off.

    The full decomposition by divide and conquer takes no longer than LAPACK's routine for some of the eigenvectors.
    """
    if rest.dtype == torch.float64:
        energies, vectors = torch.linalg.eigh(rest)
        return energies.flip(0).clamp(min=0).cpu(), vectors[:, -rank:].flip(1).contiguous()
    if not _RANGE[0] < float(rest.diagonal().mean()) < _RANGE[1]:
        return None
    dominant, split, rest = _split(rest, heavy)
    energies, vectors = torch.linalg.eigh(rest)
    largest = float(energies[-1])
    # What was split off is at the lower end, unless rounding errors have as much energy as all that remains.
    energies = torch.cat([dominant, energies[len(dominant) :].flip(0).clamp(min=0).double()])
    others = vectors[:, len(dominant) :].flip(1)[:, :rank]
    if (split.T @ others).norm() > _ORTHONORMAL:
        return None
    vectors = torch.cat([split, others], dim=1)
    energies, order = energies.sort(descending=True, stable=True)
    if energies[rank:].sum() <= RESOLUTION * len(rest) ** 0.5 * torch.finfo(rest.dtype).eps * largest:
        return None
    return energies.cpu(), vectors.index_select(1, order[:rank])


def _split(rest: torch.Tensor, heavy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split the dominant eigenvalues off ``rest + heavy^T heavy``: those whose eigenvectors converge at once.

    They are searched for in a block Krylov space, in fp64 (Musco and Musco, 2015, arXiv 1504.05477), which begins with
    the heavy rows: thin products, which take no time beside the decomposition of what remains.

    Returns:
        Eigenvalues in fp64, descending, p of them (none, where none dominates); their eigenvectors, (size, p), in fp32;
        and the matrix without them, in fp32, in which their eigenvalues are below 0 and below all others.
    """
    work = rest.double()
    work.addmm_(heavy.T, heavy)
    block = torch.randn(len(rest), _BLOCK, generator=torch.Generator().manual_seed(0), dtype=work.dtype).to(work)
    block = torch.cat([(heavy / heavy.norm(dim=1, keepdim=True)).T, block], dim=1)
    blocks = []
    for _ in range(_DEPTH):
        block = torch.linalg.qr(work @ block).Q
        blocks.append(block)
    basis = torch.linalg.qr(torch.cat(blocks, dim=1)).Q
    image = work @ basis
    energies, rotation = torch.linalg.eigh(basis.T @ image)
    energies, rotation = energies.flip(0), rotation.flip(1)
    basis, image = basis @ rotation, image @ rotation
    converged = (image - basis * energies).norm(dim=0) < _CONVERGED * energies
    energies, basis, image = energies[converged], basis[:, converged], image[:, converged]
    # (1 - Q Q^T) M (1 - Q Q^T) - c Q Q^T, with a c that costs the others no digits.
    crossed = image - basis * (energies / 2)
    work.addmm_(torch.cat([basis, crossed], dim=1), torch.cat([crossed, basis], dim=1).T, alpha=-1)
    if len(energies):
        rounding = float(energies[0]) * torch.finfo(rest.dtype).eps
        work.addmm_(basis, basis.T, alpha=-max(float(work.diagonal().max()), rounding))
    return energies, basis.to(rest), work.to(rest)
