"""Merges an adapter into its base: ``W + s B A``, shard by shard, into an ordinary checkpoint.

Every tensor keeps its key and its place in the base, and tensors without a LoRA keep their bytes.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from emloc_core.adapters.adapter import Adapter
from emloc_core.adapters.belonging import require_base, require_shapes
from emloc_core.adapters.dense import Replacement, replaced_weights
from emloc_core.algorithms.lora import Lora
from emloc_core.errors import EmlocError
from emloc_core.files.documents import write_json
from emloc_core.files.header import TensorInfo, read_header
from emloc_core.files.inputs import Inputs
from emloc_core.files.job import Job, Progress
from emloc_core.files.output import Output
from emloc_core.files.shards import DTYPES, ShardWriter, row_chunks, tensor_bytes
from emloc_core.model.opened import open_original
from emloc_core.model.skeleton import Skeleton
from emloc_core.requests import MergeRequest

#: How a weight changes: it is replaced, then a LoRA is added; each may be None.
Change = tuple[Replacement | None, Lora | None]
_AT_ONCE = 3  # shards
_ROWS_BYTES = 2 << 20  # bytes of a weight merged at a time: few enough to stay in the processor's cache


class Merge(Job):
    """A merge, after the cheap checks; :meth:`run` writes the merged checkpoint.

    Raises:
        EmlocError: the adapter does not belong to the base, or cannot be merged into it.
    """

    def __init__(self, request: MergeRequest) -> None:
        self.request, self.adapter = request, Adapter(request.adapter)
        self.model = open_original(request.base or self.adapter.base_name, option="--base")
        self.base = self.model.checkpoint
        skeleton = self.model.skeleton
        require_shapes(self.adapter, skeleton.model)
        replaced = replaced_weights(self.adapter.replaced, skeleton)
        changed = {lora.parameter(path) for path, lora in self.adapter.loras.items()}
        #: Tied output layers that change otherwise than the embeddings, and become tensors of their own.
        self.unties = {
            name
            for name, source in skeleton.tied.items()
            if name in changed or replaced.get(name) is not replaced.get(source)
        }
        #: New key -> key that it was tied to; the others are tied in the config, but stored in the file too.
        self.untied = {name: skeleton.sources(name)[0] for name in self.unties if not skeleton.stored(name)}
        loras = self._by_key(skeleton)
        new = {self._key(name, skeleton): replacement for name, replacement in replaced.items()}
        self.changes: dict[str, Change] = {key: (new.get(key), loras.get(key)) for key in loras.keys() | new.keys()}

    @cached_property
    def output(self) -> Output:
        """The checkpoint's directory. The files of adapter and base are hashed on first access.

        Raises:
            EmlocError: the adapter does not belong to the base.
        """
        files = Inputs(self.request.output.resolve().parent)
        fingerprint = require_base(self.adapter, self.base, files, allow_uncorrected=self.request.allow_uncorrected)
        request = {"adapter": self.adapter.fingerprint(files), "base": fingerprint}
        inputs = {"adapter": str(self.adapter.directory.absolute()), "base": self.base.name}
        return Output(self.request.output, "checkpoint", request, inputs=inputs, files=files, family=self.model.family)

    def describe(self) -> dict[str, Any]:
        """Return what would be written."""
        return {
            "output": str(self.request.output),
            "linears": len(self.adapter.loras),
            "bytes": self.base.nbytes,
            "shards": len(self.base.shards),
            "finished": self.output.is_finished(),
        }

    def _by_key(self, skeleton: Skeleton) -> dict[str, Lora]:
        loras: dict[str, Lora] = {}
        for path, lora in self.adapter.loras.items():
            name = lora.parameter(path)
            keys = skeleton.sources(name)
            if lora.is_stacked:
                loras |= _by_expert(lora, path, keys, skeleton)
                continue
            if len(keys) != 1 or skeleton.shape_of(keys[0]) != lora.shape:
                shapes = [skeleton.shape_of(key) for key in keys]
                raise EmlocError(
                    f"The LoRA on {path} is for a weight of shape {lora.shape}; the base has {shapes} in {keys}.",
                    "Give the base that the adapter was trained for; if this is it, save it with save_pretrained.",
                    code="mismatch",
                )
            loras[self._key(name, skeleton)] = lora.transposed() if skeleton.is_transposed(keys[0]) else lora
        return loras

    def _key(self, name: str, skeleton: Skeleton) -> str:
        """Return the key that a parameter has in the merged checkpoint."""
        if name in self.untied:
            return name
        return (skeleton.stored(name) if name in self.unties else skeleton.sources(name))[0]

    def make(self, staging: Path, progress: Progress) -> None:
        """Write the merged checkpoint; ``progress`` is called with a shard's name."""
        self._write_shards(staging, progress)
        self._write_side_files(staging)
        self.output.result = {
            "merged_linears": len(self.adapter.loras),
            "replaced": sorted(self.adapter.replaced),
            "untied": sorted(self.untied),
            "bytes": sum((staging / shard.name).stat().st_size for shard in self.base.shards),
        }
        self.output.provenance = f"Merge: the LoRA is added to {len(self.adapter.loras)} of the base's Linears."

    def _write_shards(self, staging: Path, progress: Progress) -> None:
        """Write a few shards at a time: one waits for the disk while another is computed or copied."""
        shards = self.base.shards
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            missing = [shard for shard in shards if not (staging / shard.name).exists()]
            writing = {pool.submit(self._write_shard, shard, staging / shard.name): shard for shard in missing}
            try:
                for done, future in enumerate(as_completed(writing), len(shards) - len(missing) + 1):
                    future.result()
                    progress(writing[future].name, done, len(shards))
            except BaseException:
                pool.shutdown(cancel_futures=True)  # shards that are being written are finished first
                raise

    def _write_shard(self, source: Path, target: Path) -> None:
        tensors, metadata = read_header(source)
        layout = {key: (tensor.dtype, tensor.shape) for key, tensor in tensors.items()}
        extra = self.untied if source == self.base.shards[-1] else {}
        for key, tied_to in extra.items():
            layout[key] = (self.base.tensors[tied_to].dtype, self.base.tensors[tied_to].shape)
        with ShardWriter(target, layout, metadata) as writer:
            for key, tensor in tensors.items():
                if key in self.changes:
                    writer.write(key, self._merged(tensor, *self.changes[key]))
                else:
                    writer.copy(key, tensor)
            for key, tied_to in extra.items():
                writer.write(key, self._merged(self.base.tensors[tied_to], *self.changes.get(key, (None, None))))

    def _merged(self, tensor: TensorInfo, new: Replacement | None, lora: Lora | None) -> Iterator[memoryview]:
        """Yield the bytes of the changed weight, some rows at a time: with a LoRA the fp32 sum, cast once."""
        if lora and lora.is_stacked:
            for part, expert in zip(tensor.split(), lora.experts(), strict=True):
                yield from self._merged(part, new, expert)
            return
        if lora:
            lora = Lora(lora.a.float(), lora.b.float(), lora.scale)
        start = 0
        for weight in row_chunks(tensor, _ROWS_BYTES):
            if new:  # into the chunk's own memory: a LoRA is added in place
                weight.copy_(new.applied(weight, start))
            merged = weight
            if lora:
                rows = lora.b[start : start + len(weight)]
                merged = weight.float().addmm_(rows, lora.a, alpha=lora.scale).to(DTYPES[tensor.dtype])
            # NaN and Inf survive a sum, so one pass finds them, including overflows in the cast.
            if not bool(torch.isfinite(merged.sum(dtype=torch.float32))):
                raise EmlocError(
                    f"The merged {tensor.key} holds NaN or Inf.", "Check base and adapter.", code="not-finite"
                )
            yield tensor_bytes(merged)
            start += len(weight)

    def _write_side_files(self, staging: Path) -> None:
        self.base.copy_side_files(staging)
        for file in self.base.descriptions:
            (staging / file.name).write_bytes(file.read_bytes())
        if not self.unties:
            return
        # A LoRA on a tied output projection changes only that: the merged model has two tensors instead of one.
        write_json(staging / "config.json", _untie(self.base.config))
        last = self.base.shards[-1].name
        weight_map = {key: tensor.shard.name for key, tensor in self.base.tensors.items()}
        weight_map.update(dict.fromkeys(self.untied, last))
        if last != self.base.single:
            write_json(staging / self.base.index, {"metadata": {}, "weight_map": weight_map})


def _by_expert(lora: Lora, path: str, keys: list[str], skeleton: Skeleton) -> dict[str, Lora]:
    """Return the LoRA on a stack of experts by the checkpoint's keys: of the stack, or of the parts of each matrix."""
    shapes = [skeleton.shape_of(key) for key in keys]
    if len(keys) == 1 and shapes[0] == tuple(skeleton.model.get_parameter(path).shape):
        return {keys[0]: lora if lora.shape == shapes[0] else lora.transposed()}
    experts = lora.experts()
    parts, remainder = divmod(len(keys), len(experts))  # gate and up, say: one part of all experts, then the next
    by_key: dict[str, Lora] = {}
    if not remainder and parts and not lora.b.shape[1] % parts:
        halves = [
            Lora(expert.a, expert.b.chunk(parts)[part], expert.scale) for part in range(parts) for expert in experts
        ]
        by_key = dict(zip(keys, halves, strict=True))
        if all(expert.shape == shape for expert, shape in zip(halves, shapes, strict=True)):
            return by_key
    raise EmlocError(
        f"The LoRA on {path} is for matrices of shape {lora.shape}; the base has {shapes[:3]} in {keys[:3]}.",
        "Give the base that the adapter was trained for; if this is it, save it with save_pretrained.",
        code="mismatch",
    )


def _untie(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config with tied embeddings off, also in its text part if it has one."""
    text = config.get("text_config")
    parts = {"text_config": {**text, "tie_word_embeddings": False}} if isinstance(text, dict) else {}
    return {**config, **parts, "tie_word_embeddings": False}
