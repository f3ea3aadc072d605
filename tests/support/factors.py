"""Helpers for testing factors: the Gram of given inputs, and the error of the outputs."""

import torch

from emloc_core.algorithms.factorize import Factors
from emloc_core.algorithms.statistics import Gram


def gram_of(weight: torch.Tensor, inputs: torch.Tensor, side: str, dtype: torch.dtype = torch.float64) -> Gram:
    m, n = weight.shape
    gram = Gram(side, m if side == "output" else n, dtype)
    gram.add(inputs.double() @ weight.T.double() if side == "output" else inputs)
    return gram


def output_error(weight: torch.Tensor, factors: Factors, inputs: torch.Tensor) -> float:
    inputs, weight = inputs.double(), weight.double()
    exact = inputs @ weight.T
    return float((exact - inputs @ factors.v.double().T @ factors.u.double().T).norm() / exact.norm())
