"""The files of an emulator's directory: one shard of factors per block, and all other files copied from the base.

A block's shard appears when it is complete, and its hash reveals later damage, so resuming needs no bookkeeping beyond
the shards. The last shard holds all tensors of the base that are not factorised, byte for byte.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from emloc_core.emulator.experts import Stacked
from emloc_core.emulator.ranks import UNREACHED, RankPlan
from emloc_core.emulator.vocabulary import packings
from emloc_core.errors import EmlocError
from emloc_core.files.checkpoint import Checkpoint
from emloc_core.files.documents import write_json
from emloc_core.files.header import read_header
from emloc_core.files.inputs import Inputs
from emloc_core.files.manifest import CONTENT
from emloc_core.files.shards import ShardWriter, remove_damaged, write_shard
from emloc_core.model.skeleton import Skeleton
from emloc_core.standins import Format, StandIn
from emloc_core.standins.experts import part_name
from emloc_core.standins.format import MARK, METHOD
from emloc_core.standins.standin import Fitted
from emloc_core.standins.vocabulary import PARTS

_ERRORS = "emloc.relative_errors"  # in the metadata of a block's shard


class EmulatorFiles:
    """An emulator in its staging directory, written block by block and then finished."""

    def __init__(self, skeleton: Skeleton, plan: RankPlan, staging: Path, format: Format) -> None:
        self.format = format
        self.skeleton, self.base, self.plan = skeleton, skeleton.checkpoint, plan
        self._vocabulary = {matrix.path: matrix for matrix in plan.vocabulary}
        self.blocks, self.staging = skeleton.blocks, staging
        self.units = [*self.blocks, *self._vocabulary]  # a shard for each
        self.keys = weight_keys(skeleton, plan)
        self._planned = {linear.path: linear for linear in plan.planned}
        remove_damaged(map(self._shard, self.units))  # of an interrupted run

    def is_written(self, block: str) -> bool:
        """Return whether a block's shard exists."""
        return self._shard(block).exists()

    def write(self, block: str, fitted: Mapping[str, Any]) -> None:
        """Write what stands in for the weights of a block's Linears and experts, by path, and the error of each."""
        tensors: dict[str, torch.Tensor] = {}
        for path, stand_in in fitted.items():
            if isinstance(stand_in, Stacked):
                parts = self._checked(path, stand_in.parts, self._planned[path].matrices)
                tensors.update((part_name(path, name), part) for name, part in parts.items())
            elif path in self._vocabulary:
                tensors.update(
                    zip(self._matrix_keys(path), (stand_in.parts[name].cpu() for name in PARTS), strict=True)
                )
            else:
                prefix = self.keys[path].removesuffix("weight")
                tensors.update((f"{prefix}{name}", part) for name, part in self._packed(path, stand_in).items())
        errors = {path: stand_in.relative_error() for path, stand_in in fitted.items()}
        for path, error in errors.items():
            if not math.isfinite(error):
                raise self._refused(path, f"an error of {error}: numbers there are too large")
        write_shard(self._shard(block), dict(sorted(tensors.items())), {_ERRORS: json.dumps(errors)})

    def read(self, block: str) -> dict[str, StandIn]:
        """Return what stands in for the weights of a block's Linears, by module path, as written."""
        keys = {linear.path: self.format.keys(self.keys[linear.path]) for linear in self.plan.in_block(block)}
        tensors = self._copies(block, chain.from_iterable(keys.values()))
        return {path: self._stand_in(path, [tensors[key] for key in part_keys]) for path, part_keys in keys.items()}

    def read_stacks(self, block: str) -> dict[str, dict[str, torch.Tensor]]:
        """Return the parts of what stands in for a block's stacks of experts, by path and by name, as written."""
        names = self.format.names()
        paths = [stack.path for stacks in self.plan.experts_in_block(block).values() for stack in stacks]
        tensors = self._copies(block, (part_name(path, name) for path in paths for name in names))
        return {path: {name: tensors[part_name(path, name)] for name in names} for path in paths}

    def _copies(self, block: str, keys: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return tensors of a block's shard, by their keys, in memory of their own on the CPU.

        In the file they may begin at any byte, and then products on the CPU differ in the last bit from those of the
        run that fitted them.
        """
        tensors = load_file(self._shard(block))
        return {key: tensors[key].clone() for key in keys}

    def matrix(self, path: str) -> dict[str, torch.Tensor]:
        """Return a packed matrix of the vocabulary, as written: its parts by their names."""
        tensors, device = load_file(self._shard(path)), self.skeleton.device  # safetensors does not know every one
        return {name: tensors[key].to(device) for name, key in zip(PARTS, self._matrix_keys(path), strict=True)}

    def _matrix_keys(self, path: str) -> list[str]:
        return [f"{self.keys[path].removesuffix('weight')}{name}" for name in PARTS]

    def as_read(self, path: str, fitted: Fitted) -> StandIn:
        """Return what was fitted for a Linear as :meth:`read` will once it is written."""
        parts = self._packed(path, fitted)
        return self._stand_in(path, [parts[name] for name in self.format.names()])

    def _packed(self, path: str, fitted: Fitted) -> dict[str, torch.Tensor]:
        """Return the tensors of a stand-in by their names."""
        return self._checked(path, self.format.pack(fitted, self._dtype(path)))

    def _checked(self, path: str, packed: dict[str, torch.Tensor], *experts: int) -> dict[str, torch.Tensor]:
        """Return packed tensors, checked: the format may be a plugin's. Those of a stack have a leading E."""
        parts = self.format.parts(self._planned[path].shape, self._planned[path].rank, self._dtype(path))
        expected = {name: (*experts, *size) for name, (size, _) in parts.items()}
        actual = {name: tuple(part.shape) for name, part in packed.items()}
        if packed.keys() != set(self.format.names()) or not expected.items() <= actual.items():
            raise self._refused(path, f"{actual} instead of {expected}")
        if not all(bool(part.isfinite().all()) for part in packed.values() if part.is_floating_point()):
            raise self._refused(path, "NaN or Inf")
        return packed

    def _refused(self, path: str, result: str) -> EmlocError:
        return EmlocError(
            f"The kind {self.format.name!r} gave {path} {result}.",
            "Choose another --kind, or update the plugin.",
            code="plugin",
        )

    def _stand_in(self, path: str, tensors: Sequence[torch.Tensor]) -> StandIn:
        parts = [tensor.to(self.skeleton.device) for tensor in tensors]
        return self.format.read(parts, self._planned[path].shape, self._dtype(path))

    def _dtype(self, path: str) -> torch.dtype:
        name = path if path not in self.keys else f"{path}.weight"
        return self.skeleton.model.get_parameter(name).dtype

    def finish(self, tokens: int) -> dict[str, Any]:
        """Write everything but the factors, once all blocks and the rows are written; return the manifest's result.

        Raises:
            EmlocError: no Linear has factors.
        """
        errors: dict[str, float] = {}
        for unit in self.units:
            errors.update(json.loads(read_header(self._shard(unit))[1][_ERRORS]))
        plan = self.plan.dense(self.plan.ranks.keys() - errors.keys(), UNREACHED)
        if not plan.ranks:
            raise EmlocError(
                "No calibration row passes through any Linear that would be compressed.",
                "Give rows of the kind that the model is for.",
            )
        self._write_rest(plan)
        self._write_index()
        settings = self.format.config(plan.ranks, self.skeleton.model, self.skeleton.dtype)
        # Without a dtype, transformers would take the first tensor's, perhaps a scale's.
        if plan.vocabulary:
            settings["vocabulary"] = packings(plan.vocabulary)
        config, key = {**self.base.config}, self.base.objective.dtype_key  # as it was when the job began
        if self.base.objective.type_key != "model_type":  # as the checkpoint adds it
            del config["model_type"]
        config[key] = config.get(key) or str(self.skeleton.dtype).removeprefix("torch.")
        config["quantization_config"] = settings
        if settings["quant_method"] != METHOD:
            config[MARK] = self.format.name
        write_json(self.staging / "config.json", config)
        self.base.copy_side_files(self.staging)
        before, after = plan.parameters(self.format)
        emulator = Checkpoint(self.staging)
        return {
            "base": self.base.name,
            "parameters": {"compressed_linears_before": before, "compressed_linears_after": after},
            "bytes": {"base": self.base.nbytes, "emulator": emulator.nbytes},
            "tokens": tokens,
            CONTENT: emulator.content_hash(Inputs()),
            "linears": [{**linear.describe(), "relative_error": errors.get(linear.path)} for linear in plan.planned],
            "vocabulary": [{**matrix.describe(), "relative_error": errors[matrix.path]} for matrix in plan.vocabulary],
        }

    def _name(self, index: int) -> str:
        """Return the name of shard ``index``, counted from 0: one per unit, and one for the rest."""
        return f"{self.base.objective.weights}-{index + 1:05d}-of-{len(self.units) + 1:05d}.safetensors"

    def _shard(self, unit: str) -> Path:
        return self.staging / self._name(self.units.index(unit))

    def _write_rest(self, plan: RankPlan) -> None:
        weight_keys(self.skeleton, plan)  # experts that no row reaches stay as they are
        replaced = replaced_keys(self.skeleton, plan)
        kept = {key: tensor for key, tensor in self.base.tensors.items() if key not in replaced}
        layout = {key: (tensor.dtype, tensor.shape) for key, tensor in kept.items()}
        with ShardWriter(self.staging / self._name(len(self.units)), layout) as writer:
            for key, tensor in kept.items():
                writer.copy(key, tensor)

    def _write_index(self) -> None:
        weight_map, total = {}, 0
        for index in range(len(self.units) + 1):
            for key, tensor in read_header(self.staging / self._name(index))[0].items():
                weight_map[key] = self._name(index)
                total += tensor.nbytes
        write_json(self.staging / self.base.index, {"metadata": {"total_size": total}, "weight_map": weight_map})


def replaced_keys(skeleton: Skeleton, plan: RankPlan) -> set[str]:
    """Return the keys of the base's tensors that an emulator has something else for."""
    stacks = {stack.path for stack in plan.experts}
    names = [path if path in stacks else f"{path}.weight" for path in (*plan.ranks, *packings(plan.vocabulary))]
    return {key for name in names for key in (*skeleton.sources(name), *skeleton.stored(name))}


def weight_keys(skeleton: Skeleton, plan: RankPlan) -> dict[str, str]:
    """Return the key of the weight of every planned Linear, and of the vocabulary's layers, by module path.

    Raises:
        EmlocError: the checkpoint stores one fused with other weights.
    """
    for stack in plan.experts:
        if not stack.is_replaced and skeleton.unpacks(skeleton.sources(stack.path)):
            raise EmlocError(
                f"{stack.path} is in MXFP4, and would stay so in the emulator ({stack.reason}).",
                "Choose a kind that packs experts, or save the model in bfloat16 first, with transformers.",
                code="unsupported",
            )
    by_path = {}
    linears = plan.ranks.keys() - {stack.path for stack in plan.experts}
    for path in (*linears, *(matrix.path for matrix in plan.vocabulary)):
        keys = skeleton.sources(f"{path}.weight")
        shape = tuple(skeleton.model.get_parameter(f"{path}.weight").shape)
        if len(keys) != 1 or skeleton.shape_of(keys[0]) != shape:
            raise EmlocError(
                f"The checkpoint stores {path} together with other weights ({', '.join(keys)}).",
                "Save the model with transformers' save_pretrained first.",
                code="unsupported",
            )
        by_path[path] = keys[0]
    return by_path
