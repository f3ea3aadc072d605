"""The loss of a base with a LoRA on held-out rows, streamed block by block."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from emloc_core.algorithms.lora import Lora
from emloc_core.model.loras import adding
from emloc_core.model.skeleton import Skeleton
from emloc_core.model.streaming import Stream
from emloc_core.objective import Sample


def summed_loss(skeleton: Skeleton, samples: Sequence[Sample], loras: Mapping[str, Lora]) -> torch.Tensor:
    """Return the loss of a base with a LoRA, summed, and the number of tokens, (2,), fp64, in one streamed pass."""
    stream = Stream(skeleton)

    @contextmanager
    def adapted(unit: str) -> Iterator[None]:
        paths = [path for path in loras if path == unit or path.startswith(f"{unit}.")]
        with adding(skeleton.model, {path: loras[path].to(skeleton.device) for path in paths}):
            yield

    forwards = [partial(sample.loss, skeleton.model, skeleton.device) for sample in samples]
    results = stream.run(forwards, adapted)
    return torch.stack(results).sum(0) if results else torch.zeros(2, dtype=torch.float64)
