"""Pictures and prompts in a plan: see :class:`emloc_core.objective.Step`."""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import nn

from emloc_core.data.row import Row
from emloc_core.files.checkpoint import Checkpoint
from emloc_core.memory.fake import fake, without_contents
from emloc_core.memory.model import MemoryModel, Need
from emloc_core.memory.planned_model import planned_model
from emloc_core.model.inside import hidden_size
from emloc_core.objective import Purpose, RowSize
from emloc_diffusers.calls import Call, call_of
from emloc_diffusers.encoding import patches
from emloc_diffusers.flow import DRAWS, forward, squared_error
from emloc_diffusers.pipeline import INDEX, Parts

#: Rows of a plan without data: personalising a model takes five to thirty pictures.
_ROWS = 32
#: Pixels of a patch's side, and tokens of a prompt, without a pipeline to ask: the same for all known ones.
PATCH, TOKENS = 16, 512
#: Parameters of the largest VAE of these pipelines, Qwen-Image's; the others have 84 million.
VAE = 127_000_000


class FlowStep:
    """A picture of some patches, and a prompt.

    Args:
        memory: the plan; the length of its workload is the patches of a picture.
    """

    logits = 0

    def __init__(self, memory: MemoryModel) -> None:
        self._memory = memory
        self._call: Call = call_of(memory.family.auto_class)
        patches = memory.workload.length
        self.inputs: Mapping[str, Any] = {"rows": memory.workload.batch_size, "patches": patches, "tokens": TOKENS}
        self.row = RowSize(patches + TOKENS, patches + TOKENS)

    def positions(self, path: str) -> int:
        """Return the number of vectors per row that a module reads: patches, tokens, both, or one for the time."""
        return self._positions.get(path, self.row.tokens)

    @cached_property
    def _positions(self) -> Mapping[str, int]:
        """The positions of every Linear."""
        work, cache = f"positions of {self.row.tokens}", planned_model(self._memory.config_file).traces
        if work not in cache.values:
            cache.add({work: self._followed()})
        return cache.values[work]

    def _followed(self) -> Mapping[str, int]:
        """Return the positions from a forward pass of one row without contents."""
        model: Any = copy.deepcopy(planned_model(self._memory.config_file).model)
        counts: dict[str, int] = {}

        def follow(path: str) -> Callable[..., None]:
            def hook(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
                counts[path] = args[0].numel() // args[0].shape[-1]

            return hook

        for path, module in model.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(follow(path))
        with fake({}), torch.no_grad():
            without_contents(model)
            self._passed(model, 1)
        return counts

    def waiting(self, purpose: Purpose, rows: int) -> int:
        """Return the bytes of the rows' draws: patches and prompts, as wide as the blocks."""
        memory = self._memory
        width = max(hidden_size(memory.model.get_submodule(path)) for path in memory.towers)
        available = memory.workload.rows or _ROWS
        return min(rows, available) * DRAWS[purpose] * self.row.tokens * width * memory.dtype.itemsize

    def before(self) -> Sequence[Need]:
        """Return the memory of encoding: all prompt encoders at once, or the VAE."""
        readers, vae = encoder_bytes(self._memory.config_file, self._call, vars(self._memory.config))
        terms = {"weights": max(readers, vae), "overhead": self._memory.overhead(tuning=False)}
        return [Need("encode the rows", terms, "text encoders, before; on the CPU if a GPU has no room")]

    def tracing(self, model: Any) -> AbstractContextManager[Any]:  # noqa: ARG002 - every model alike
        """Make tensors fake."""
        return fake({})

    def widths(self, model: Any) -> Sequence[int]:  # noqa: ARG002 - every model alike
        """Return none."""
        return ()

    def prepare(self, lora: Any, *, checkpointing: bool) -> None:
        """Recompute blocks as diffusers does."""
        if checkpointing:
            lora.get_base_model().enable_gradient_checkpointing()

    def loss(self, lora: Any) -> tuple[torch.Tensor, Any]:
        """Return the error of the velocity, and the inputs."""
        inputs = self._inputs(lora, self._memory.workload.batch_size)
        return squared_error(lora, self._call, **inputs, weight=torch.ones(len(inputs["sigma"]))).mean(), inputs

    def predict(self, model: Any, enter: Callable[[torch.Tensor, str], None]) -> None:  # noqa: ARG002 - nothing is kept
        """Take one step of a solver."""
        self._passed(model, self._memory.workload.batch_size)

    def _passed(self, model: Any, rows: int) -> Any:
        return forward(model, self._call, **self._inputs(model, rows))

    def _inputs(self, model: Any, rows: int) -> dict[str, Any]:
        patches, side = self._memory.workload.length, self._call.patch
        height = isqrt(patches)
        shape = (rows, self._call.channels(model.config), height * side, -(-patches // height) * side)
        prompt = {
            name: torch.zeros(rows, *(size if len(size) == 1 else (TOKENS, *size[1:])), dtype=torch.bfloat16)
            for name, size in self._call.made_up(model.config).items()
        }
        noise = {name: torch.zeros(shape) for name in ("latents", "noise")}
        return {**noise, "sigma": torch.zeros(rows), "prompt": prompt}


def encoder_bytes(config_file: Path, call: Call, config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the bytes of all prompt encoders, and of the VAE: of the pipeline if it is there, or as published.

    Args:
        config_file: the transformer's config.
        call: how it is called.
        config: the content of that file, with the defaults of the class.
    """
    directory = config_file.absolute().parent.parent
    if not (directory / INDEX).is_file():
        return 2 * call.readers(config), 2 * VAE
    parts = Parts(directory)
    return parts.nbytes(parts.readers), parts.nbytes(["vae"])


def most_patches(config_file: Path, call: Call, rows: Sequence[Row], most: int | None) -> int:
    """Return the patches of the largest picture, scaled down as it is for training.

    Args:
        config_file: the transformer's config, in its pipeline or alone.
        call: how it is called.
        rows: pictures.
        most: maximum patches of a picture.

    Raises:
        EmlocError: a picture cannot be read, or is smaller than a patch.
    """
    directory = config_file.absolute().parent.parent
    side = Parts(directory).factor * call.patch if (directory / INDEX).is_file() else PATCH
    return max((patches(row, side, most) for row in rows), default=0)


def dtype_beside(config_file: Path) -> str:
    """Return the dtype of the weights beside a config; without any, bfloat16, in which they are published."""
    directory = config_file.parent
    if not any(directory.glob("*.safetensors")):
        return "bfloat16"
    from emloc_core.model.skeleton import most_common_dtype

    return str(most_common_dtype(Checkpoint(directory).tensors.values())).removeprefix("torch.")
