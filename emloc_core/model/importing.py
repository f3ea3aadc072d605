"""Converts a checkpoint with another layout to the native one, shard by shard: renames tensors and splits fused ones.

Everything is checked from the headers before writing. Renamed tensors are copied by the kernel; fused tensors are
split one at a time in memory.
"""

import hashlib
import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from emloc_core.errors import EmlocError, first_line
from emloc_core.family import Family
from emloc_core.files.checkpoint import INDEX, SINGLE, Checkpoint, open_checkpoint
from emloc_core.files.documents import write_json
from emloc_core.files.header import TensorInfo, read_header
from emloc_core.files.inputs import Inputs
from emloc_core.files.job import Job, Progress
from emloc_core.files.output import Output
from emloc_core.files.pretrained import make_config
from emloc_core.files.shards import ShardWriter
from emloc_core.layout import Split
from emloc_core.model.skeleton import build_model
from emloc_core.plugins.manager import plugin_manager
from emloc_core.requests import ImportRequest

Shape = tuple[int, ...]


@dataclass(frozen=True)
class _Destination:
    """Where a tensor of the source goes: native key -> shape of the part, and how it is split, if it is."""

    shapes: dict[str, Shape]
    split: Split | None


class Import(Job):
    """An import that has passed the cheap checks; :meth:`run` writes the native checkpoint.

    Attributes:
        config: the native ``config.json``.

    Raises:
        EmlocError: no layout reads the source; its config has a value that the native model does not allow; a tensor is
            unknown, missing, or has another shape than the config says; or the output would be inside the source.
    """

    def __init__(self, request: ImportRequest) -> None:
        self.source = source = open_checkpoint(request.source)
        self._path = output = request.output
        source.require_unquantised()
        if output.resolve().is_relative_to(source.directory.resolve()):
            raise EmlocError(f"{output} is inside the source, {source.directory}.", "Choose another directory with -o.")
        self.layout = plugin_manager().layout_for(source.config)
        self.config = self.layout.config(source.config, source.directory)
        self._files = self.layout.files(source.config, source.directory)
        self._destinations = {key: self._destination(tensor) for key, tensor in source.tensors.items()}
        self.family: Family = plugin_manager().family_for(self.config)
        self._require_model()

    @cached_property
    def output(self) -> Output:
        """The checkpoint's directory. The source's files are hashed on first access."""
        source, files = self.source, Inputs(self._path.resolve().parent)
        native = json.dumps(
            [self.config, self._files, {key: [*destination.shapes] for key, destination in self._destinations.items()}]
        )
        request = {
            "source": source.fingerprint(files),
            "files": files.hash(source.side_files()),
            "layout": self.layout.name,
            "native": hashlib.sha256(native.encode()).hexdigest(),  # a plugin may change while the source does not
        }
        inputs = {"source": source.name}
        return Output(self._path, "checkpoint", request, inputs=inputs, files=files, family=self.family)

    def describe(self) -> dict[str, Any]:
        """Return what would be written."""
        return {
            "output": str(self._path),
            "layout": self.layout.name,
            "model_type": self.config["model_type"],
            "tensors": len(self.source.tensors),
            "split": self.splits,
            "bytes": self.source.nbytes,
            "shards": len(self.source.shards),
            "finished": self.output.is_finished(),
        }

    @property
    def splits(self) -> int:
        """Number of tensors that are split."""
        return sum(destination.split is not None for destination in self._destinations.values())

    def _destination(self, tensor: TensorInfo) -> _Destination:
        destination = self.layout.native_keys(tensor.key)
        if destination is None:
            raise EmlocError(
                f"{tensor.shard} holds {tensor.key}, which the layout {self.layout.name!r} does not know.",
                "Nothing is dropped: give the checkpoint as published, without tensors added by other software.",
                code="unsupported",
            )
        targets, split = destination
        if split is None:
            return _Destination({targets[0]: tensor.shape}, None)
        try:
            parts = split.parts(torch.empty(tensor.shape, device="meta"), self.source.config)
            shapes = [tuple(part.shape) for part in parts]
        except (RuntimeError, TypeError, ValueError, IndexError, ArithmeticError):
            raise EmlocError(
                f"{tensor.key} in {tensor.shard} has shape {tensor.shape}, which cannot be split as the config says.",
                "Check that the config.json belongs to this checkpoint.",
                code="mismatch",
            ) from None
        return _Destination(dict(zip(targets, shapes, strict=True)), split)

    def _require_model(self) -> None:
        """Require exactly the native model's tensors, in their shapes."""
        remedy = "Check that the checkpoint is complete and that its config.json belongs to it."
        shapes, tied = native_tensors(self.config, self.family)
        sources: dict[str, str] = {}
        for key, destination in self._destinations.items():
            where = f"{key} in {self.source.tensors[key].shard}"
            for target, shape in destination.shapes.items():
                if target not in shapes:
                    raise EmlocError(
                        f"{where} would be {target}, which the native model does not have.", remedy, code="mismatch"
                    )
                if shape != shapes[target]:
                    raise EmlocError(
                        f"{where} would be {target} of shape {shape}; the config says {shapes[target]}.",
                        remedy,
                        code="mismatch",
                    )
                if target in sources:
                    raise EmlocError(f"{where} and {sources[target]} would both be {target}.", remedy, code="mismatch")
                sources[target] = key
        missing = [name for name in shapes if name not in sources and tied.get(name, name) not in sources]
        if missing:
            raise EmlocError(
                f"{self.source.directory} lacks the source of {len(missing)} tensors: {', '.join(missing[:3])}.",
                remedy,
                code="damaged",
            )

    def make(self, staging: Path, progress: Progress) -> None:
        """Write the native checkpoint; ``progress`` is called with a shard's name."""
        shards = self.source.shards
        for index, shard in enumerate(shards):
            if not (staging / shard.name).exists():
                self._write_shard(shard, staging / shard.name)
            progress(shard.name, index + 1, len(shards))
        self._write_index(staging)
        write_side_files(self.source, {**self._files, "config.json": self.config}, staging)
        self.output.result = {
            "layout": self.layout.name,
            "model_type": self.config["model_type"],
            "tensors": sum(len(destination.shapes) for destination in self._destinations.values()),
            "split": self.splits,
            "bytes": self.source.nbytes,
        }
        self.output.provenance = f"Rewritten from the layout `{self.layout.name}` for transformers' own classes."

    def _write_shard(self, source: Path, target: Path) -> None:
        tensors, metadata = read_header(source)
        layout = {
            key: (tensor.dtype, shape)
            for tensor in tensors.values()
            for key, shape in self._destinations[tensor.key].shapes.items()
        }
        with ShardWriter(target, layout, metadata) as writer:
            for tensor in tensors.values():
                destination = self._destinations[tensor.key]
                if destination.split is None:
                    writer.copy(next(iter(destination.shapes)), tensor)
                    continue
                with self.source.slices([tensor.key]) as slices:
                    parts = destination.split.parts(slices[tensor.key][...], self.source.config)
                    for key, part in zip(destination.shapes, parts, strict=True):
                        writer.write(key, part)

    def _write_index(self, staging: Path) -> None:
        weight_map = {
            target: self.source.tensors[key].shard.name
            for key, destination in self._destinations.items()
            for target in destination.shapes
        }
        if set(weight_map.values()) != {SINGLE}:
            write_json(staging / INDEX, {"metadata": {"total_size": self.source.nbytes}, "weight_map": weight_map})


def write_side_files(source: Checkpoint, instead: Mapping[str, dict[str, Any] | str | None], target: Path) -> None:
    """Copy the files of a source besides its weights and config into a directory.

    Args:
        instead: files to write instead of the source's; see :attr:`emloc_core.layout.Layout.files`.
    """
    source.copy_side_files(target, skip=instead)
    for name, content in instead.items():
        if isinstance(content, str):
            (target / name).write_text(content, encoding="utf-8")
        elif content is not None:
            write_json(target / name, content)


def native_tensors(config: Mapping[str, Any], family: Family) -> tuple[dict[str, Shape], dict[str, str]]:
    """Return the shapes of all tensors of a config's model by name, and which are tied to which.

    Raises:
        EmlocError: transformers rejects the config.
    """
    try:
        model = build_model(make_config(deepcopy(dict(config))), family, torch.float32)  # it edits them
    except Exception as error:  # transformers' checks of a config raise exceptions of any type
        raise EmlocError(
            f"transformers rejects the config that the checkpoint would get: {first_line(error)}",
            "Check the checkpoint's config.json.",
        ) from error
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return shapes, dict(getattr(model, "all_tied_weights_keys", {}) or {})
