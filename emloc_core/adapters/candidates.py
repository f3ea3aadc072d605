"""The ways to carry a LoRA over to the base that ``auto`` compares, and the choice among them."""

from typing import Any, NamedTuple

import torch

from emloc_core.algorithms.correction import Clamp
from emloc_core.errors import EmlocError


class Candidate(NamedTuple):
    """One way to carry a LoRA over to the base.

    Attributes:
        clamp: the correction's clamp; 0: none.
        scale: factor of the LoRA's output.
    """

    clamp: Clamp
    scale: float = 1.0

    def describe(self) -> dict[str, Any]:
        """Return the candidate as JSON values; a correction without a clamp is called none."""
        return {"clamp": "none" if self.clamp is None else self.clamp, "scale": self.scale}


#: The candidates that ``auto`` compares; the first leaves the adapter unchanged.
CANDIDATES = (
    *(Candidate(clamp) for clamp in (0, 0.3, 1, 3)),
    *(Candidate(0, scale) for scale in (0.85, 1.15, 1.3, 1.5)),
)


def choose(losses: torch.Tensor) -> int:
    """Return the index of the candidate to keep: the one with the surest gain over the first, the uncorrected one.

    Args:
        losses: (candidates, rows, 2): summed loss and number of tokens.

    A gain counts less two standard errors, so that chance alone seldom changes the trained adapter.
    """
    mean, standard_error = gains(losses)
    return int((mean - 2 * standard_error).nan_to_num(-torch.inf).argmax())


def gains(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return by how many nats per row each candidate is better than the first, with its standard error.

    Args:
        losses: (candidates, rows, 2): summed loss and number of tokens.

    Returns:
        Mean and standard error of the paired differences, (candidates,) each. With a single row the error is
        unknown: Inf, except for the first candidate, which does not differ from itself.
    """
    gain = losses[0, :, 0] - losses[..., 0]
    rows = gain.shape[1]
    standard_error = gain.std(1) / rows**0.5 if rows > 1 else torch.full_like(gain[:, 0], torch.inf)
    standard_error[0] = 0
    return gain.mean(1), standard_error


def comparison(compared: tuple[Candidate, ...], losses: torch.Tensor | None, chosen: int) -> dict[str, Any]:
    """Return the loss per token of the chosen candidate and of all others, with their gains; nothing without losses.

    Args:
        losses: (candidates, rows, 2): summed loss and number of tokens; None if nothing was compared.
        chosen: index of the candidate that is kept.

    Raises:
        EmlocError: the loss of the first candidate, the uncorrected one, is not finite.
    """
    if losses is None:
        return {}
    sums = losses.sum(1)
    nlls = sums[:, 0] / sums[:, 1]
    if not bool(nlls[0].isfinite()):
        raise EmlocError(
            "The loss of the base with the uncorrected LoRA is not finite on the held-out rows.",
            "Tune again at a lower learning rate, or give a fixed --clamp.",
            code="not-finite",
        )
    candidates = [
        {**candidate.describe(), "nll": round(float(nll), 6), "gain": _rounded(gain), "gain_stderr": _rounded(error),
         "rows": losses.shape[1]}
        for candidate, nll, gain, error in zip(compared, nlls, *gains(losses), strict=True)
        if bool(nll.isfinite())  # a large scale may overflow
    ]  # fmt: skip
    return {"nll": round(float(nlls[chosen]), 6), "candidates": candidates}


def _rounded(value: torch.Tensor) -> float | None:
    return round(float(value), 6) if bool(value.isfinite()) else None
