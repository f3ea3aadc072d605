"""Processes that train together, each with a device of its own: an error in one ends all.

In exact steps all have the same LoRA and the same rows of a step. Each takes its share of the micro-batches, for which
it reads the weights itself, and all gradients are summed; so the step equals that of one process, up to rounding.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed, nn

from emloc_core.errors import EmlocError, first_line, is_out_of_memory, typed_line


class Processes:
    """The processes of torch's default group; this one alone where there is none.

    Attributes:
        local_count: how many of them share this machine's memory.
    """

    def __init__(self) -> None:
        grouped = distributed.is_available() and distributed.is_initialized()
        self.count = distributed.get_world_size() if grouped else 1
        self.local_count = int(os.environ.get("LOCAL_WORLD_SIZE", self.count)) if grouped else 1
        self._rank = distributed.get_rank() if grouped else 0

    def takes(self, index: int) -> bool:
        """Whether the micro-batch with this index in a step is this process's."""
        return index % self.count == self._rank

    def add(self, total: torch.Tensor, parameters: Sequence[nn.Parameter] = ()) -> None:
        """Sum a tensor and gradients over all processes, in place; a gradient that none of them has stays None."""
        if self.count == 1:
            return
        have_gradient = torch.tensor([parameter.grad is not None for parameter in parameters]).int().to(total.device)
        with _connected():
            distributed.all_reduce(total)
            distributed.all_reduce(have_gradient)
            for parameter, any_has in zip(parameters, have_gradient.tolist(), strict=True):
                if any_has:
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
                    distributed.all_reduce(parameter.grad)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Do what is in the block in every process; where it fails in one, all raise that error.

        Raises:
            EmlocError: the error of the first process that failed. A process with another exception raises its own.
        """
        if self.count == 1:
            yield
            return
        failed: Exception | None = None
        try:
            yield
        except Exception as error:
            failed = error
        messages: list[dict[str, Any] | None] = [None] * self.count
        with _connected():
            distributed.all_gather_object(messages, failed and _error_arguments(failed))
        if failed is not None and not isinstance(failed, EmlocError):
            raise failed
        for first in filter(None, messages):
            raise EmlocError(**first)


@contextmanager
def _connected() -> Iterator[None]:
    """Explain an error of processes that cannot reach each other."""
    try:
        yield
    except RuntimeError as error:
        raise EmlocError(
            f"Another process of this training has ended ({first_line(error)}).",
            "Run the same command again to resume at the last checkpoint.",
            code="died",
            resumable=True,
        ) from error


def _error_arguments(error: Exception) -> dict[str, Any]:
    """Return an error as the arguments of an :class:`EmlocError`."""
    if isinstance(error, EmlocError):
        return error.to_dict()
    return {
        "message": f"Another process failed: {typed_line(error)}.",
        "fix": "Run the same command again.",
        "code": "memory" if is_out_of_memory(error) else "died",
        "resumable": True,
    }
