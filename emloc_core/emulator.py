"""Stage 1: the emulator, made from the base block by block and written as an ordinary checkpoint.

The finished directory holds the factors (a shard a block, so that a finished block is on disk whole), every other
tensor of the base as it was, the tokenizer, the rows that may not be tuned on, and ``emloc.json`` with the relative
output error of every Linear.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from emloc_core.calibration import Sample, encode, model_limit
from emloc_core.checkpoint import INDEX, Checkpoint
from emloc_core.data import CALIBRATION, SELECTION, Row, draw, write_rows
from emloc_core.errors import EmlocError
from emloc_core.factorize import Factors
from emloc_core.family import Family
from emloc_core.lowrank import FORMAT_VERSION, METHOD
from emloc_core.output import Output, read_json, write_json
from emloc_core.plan import LinearPlan, Plan, block_paths, make_plan
from emloc_core.plugins import plugin_manager
from emloc_core.propagation import Pairs, emulating, fit_block
from emloc_core.settings import CompressSettings
from emloc_core.shards import ShardWriter, raw_chunks, read_header, write_shard
from emloc_core.skeleton import Skeleton
from emloc_core.statistics import Gram, tapped
from emloc_core.streaming import Stream


class Compression:
    """Everything that is settled before weights are read; :meth:`run` makes the emulator.

    Raises:
        EmlocError: from the checkpoint, the family, the data or the settings, before anything is written.
    """

    def __init__(
        self,
        base: Checkpoint,
        rows: Sequence[Row],
        output: Path,
        settings: CompressSettings,
    ) -> None:
        self.base, self.settings = base, settings
        self.family: Family = plugin_manager().family_for(base.model_type)
        base.require_unquantised()
        self.skeleton = Skeleton(base, self.family)
        allocate = plugin_manager().algorithm("rank_allocators", settings.allocator)
        self.plan: Plan = make_plan(self.skeleton.model, self.family, settings.ratio, allocate)
        self.rows = draw(rows, settings.seed, settings.samples, settings.selection)
        self.samples = self._encode(self.rows.calibration)
        self._encode(self.rows.selection)
        request = {
            "base": base.fingerprint(output.resolve().parent),
            "settings": settings.model_dump(),
            "calibration": [row.key for row in self.rows.calibration],
            "selection": [row.key for row in self.rows.selection],
        }
        self.output = Output(output, "emulator", request)

    def _encode(self, rows: list[Row]) -> list[Sample]:
        tokenizer = AutoTokenizer.from_pretrained(self.base.directory)
        limit = model_limit(self.skeleton.model.config)
        return encode(rows, tokenizer, self.settings.max_length, limit)

    def run(self, progress: Callable[[str, int, int], None] = lambda *_: None) -> Path:
        """Make the emulator, or go on with what an interrupted run left.

        Args:
            progress: called with a block's path, how many blocks are done, and how many there are.
        """
        if self.output.is_finished():
            return self.output.path
        with self.output.build() as staging:
            _Writer(self, staging, progress).write()
        return self.output.path


class _Writer:
    """Writes one emulator into its staging directory."""

    def __init__(self, job: Compression, staging: Path, progress: Callable[[str, int, int], None]) -> None:
        self.job, self.staging, self.progress = job, staging, progress
        self.skeleton, self.plan = job.skeleton, job.plan
        self.factorize = plugin_manager().algorithm("factorizers", job.settings.factorizer)
        self.blocks = block_paths(self.skeleton.model, job.family)
        # Only the factors' keys differ from the base's; every other tensor keeps the key that it has there.
        self.replaced = {self._base_key(path): path for path in self.plan.ranks}
        self.errors: dict[str, float] = {}

    def _base_key(self, path: str) -> str:
        keys = self.skeleton.sources(f"{path}.weight")
        if len(keys) != 1 or self.job.base.tensors[keys[0]].shape != tuple(
            self.skeleton.model.get_parameter(f"{path}.weight").shape
        ):
            raise EmlocError(
                f"The checkpoint stores {path} together with other weights ({', '.join(keys)}).",
                "Save the model with transformers' save_pretrained first.",
            )
        return keys[0]

    def shard_name(self, index: int) -> str:
        """Return the name of shard ``index``, counted from 0: one a block, and one for the rest."""
        return f"model-{index + 1:05d}-of-{len(self.blocks) + 1:05d}.safetensors"

    def write(self) -> None:
        stream = Stream(self.skeleton, [tower.blocks for tower in self.job.family.towers])
        streams = 2 if self.job.settings.calibration == "propagated" else 1  # through the base, and the emulator
        forwards = [self._forward(sample) for sample in self.job.samples] * streams
        stream.run(forwards, self._visit(stream), self.blocks[-1])
        self._write_rest()
        self._write_index()
        self._write_config()
        write_rows(self.staging / CALIBRATION, self.job.rows.calibration)
        write_rows(self.staging / SELECTION, self.job.rows.selection)
        for path in self.job.base.side_files():
            (self.staging / path.name).write_bytes(path.read_bytes())
        self.job.output.result = self._result()

    def _forward(self, sample: Sample) -> Callable[[], None]:
        def forward() -> None:
            self.skeleton.model(**sample.inputs(self.skeleton.device), use_cache=False)

        return forward

    def _visit(self, stream: Stream) -> Callable[[str], Any]:
        def visit(unit: str) -> Any:
            self._require_finite(unit)
            if unit not in self.blocks:
                return None
            if self.job.settings.calibration == "propagated":
                return self._propagate(stream, unit)
            return self._replay(unit) if self._is_written(unit) else self._gather(stream, unit)

        return visit

    @contextmanager
    def _gather(self, stream: Stream, block: str) -> Iterator[None]:
        """Factorise a block on the base's own activations, while the samples pass through it."""
        planned = self.plan.in_block(block)
        grams = _grams(planned, self.skeleton.device)
        tapping = {linear.path: linear.tap for linear in planned if _receives(linear, planned)}

        def sink(path: str, activations: torch.Tensor) -> None:
            try:
                grams[path].add(activations)
            except EmlocError as error:
                raise self._blame(error, path, stream.sample) from None

        with tapped({path: self.skeleton.model.get_submodule(path) for path in tapping}, tapping, sink):
            yield
        weights = {linear.path: self.skeleton.model.get_parameter(f"{linear.path}.weight") for linear in planned}
        self._write_block(
            block,
            {linear.path: self.factorize(weights[linear.path], grams[linear.path], linear.rank) for linear in planned},
        )
        self._done(block)

    @contextmanager
    def _propagate(self, stream: Stream, block: str) -> Iterator[None]:
        """Fit a block on what the emulator so far gives it, then let half of the samples pass through its factors."""
        rows = len(self.job.samples)
        modules = {linear.path: self.skeleton.model.get_submodule(linear.path) for linear in self.plan.in_block(block)}
        if not self._is_written(block):
            unit = self.skeleton.model.get_submodule(block)
            planned = self.plan.in_block(block)
            self._write_block(block, fit_block(stream, unit, planned, rows, self.factorize, self._blame))
        with emulating(stream, modules, self._read_block(block), rows):
            yield
        self._done(block)

    @contextmanager
    def _replay(self, block: str) -> Iterator[None]:
        """Let the samples pass for the sake of the blocks behind; this one is written and not factorised again."""
        yield
        self._done(block)

    def _blame(self, error: EmlocError, path: str, sample: int) -> EmlocError:
        row = self.job.samples[sample].row
        return EmlocError(
            f"{error} of {path}, in row {row} of the data.",
            "Check the weights up to this layer; a half-precision model may overflow on this row.",
        )

    def _require_finite(self, unit: str) -> None:
        for name, parameter in self.skeleton.model.get_submodule(unit).named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise EmlocError(
                    f"{unit}.{name} in {self.job.base.directory} holds NaN or Inf.",
                    "Download or copy the model again.",
                )

    def _done(self, block: str) -> None:
        index = self.blocks.index(block)
        self.progress(block, index + 1, len(self.blocks))
        plugin_manager().notify("emloc_block_done", stage="compress", path=block, index=index, total=len(self.blocks))

    def _is_written(self, block: str) -> bool:
        return (self.staging / self.shard_name(self.blocks.index(block))).exists()

    def _write_block(self, block: str, factors: Mapping[str, Factors]) -> None:
        tensors: dict[str, torch.Tensor] = {}
        for path, found in factors.items():
            dtype = self.skeleton.model.get_parameter(f"{path}.weight").dtype
            u, v = self._keys(path)
            tensors[u], tensors[v] = found.u.to("cpu", dtype), found.v.to("cpu", dtype)
        name = self.shard_name(self.blocks.index(block))
        # The errors first: the shard's presence says that the block is finished.
        errors = {path: found.relative_error() for path, found in factors.items()}
        write_json(self.staging / f"{name}.errors.json", errors)
        write_shard(self.staging / name, dict(sorted(tensors.items())))

    def _read_block(self, block: str) -> Pairs:
        tensors = load_file(self.staging / self.shard_name(self.blocks.index(block)), str(self.skeleton.device))
        u_and_v = {linear.path: self._keys(linear.path) for linear in self.plan.in_block(block)}
        return {path: (tensors[u], tensors[v]) for path, (u, v) in u_and_v.items()}

    def _keys(self, path: str) -> tuple[str, str]:
        """Return the keys of U and V: U stands in the place of the weight."""
        key = self._base_key(path)
        return key, f"{key.removesuffix('weight')}V"

    def _write_rest(self) -> None:
        """Write every tensor of the base that is no factor, byte for byte, as the last shard."""
        kept = {key: tensor for key, tensor in self.job.base.tensors.items() if key not in self.replaced}
        layout = {key: (tensor.dtype, tensor.shape) for key, tensor in kept.items()}
        with ShardWriter(self.staging / self.shard_name(len(self.blocks)), layout) as writer:
            for key, tensor in kept.items():
                writer.write(key, raw_chunks(tensor))

    def _write_index(self) -> None:
        weight_map, total = {}, 0
        for index in range(len(self.blocks) + 1):
            for key, tensor in read_header(self.staging / self.shard_name(index))[0].items():
                weight_map[key] = self.shard_name(index)
                total += tensor.nbytes
        write_json(self.staging / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})

    def _write_config(self) -> None:
        ranks = {"quant_method": METHOD, "format_version": FORMAT_VERSION, "ranks": self.plan.ranks}
        write_json(self.staging / "config.json", {**self.job.base.config, "quantization_config": ranks})

    def _result(self) -> dict[str, Any]:
        for index in range(len(self.blocks)):
            path = self.staging / f"{self.shard_name(index)}.errors.json"
            self.errors.update(read_json(path))
            path.unlink()
        before, after = self.plan.parameters()
        return {
            "family": self.job.family.name,
            "base": self.job.base.name,
            "parameters": {"compressed_linears_before": before, "compressed_linears_after": after},
            "bytes": {"base": self.job.base.nbytes, "emulator": Checkpoint(self.staging).nbytes},
            "tokens": sum(len(sample.input_ids) for sample in self.job.samples),
            "linears": [
                {**linear.describe(), "relative_error": self.errors.get(linear.path)} for linear in self.plan.linears
            ],
        }


def _receives(linear: LinearPlan, planned: list[LinearPlan]) -> bool:
    """Say whether a Linear's own tap is gathered: outputs always, a shared input once a group."""
    peers = [other.path for other in planned if other.group == linear.group and other.tap != "output"]
    return linear.tap == "output" or linear.path == peers[0]


def _grams(planned: list[LinearPlan], device: torch.device) -> dict[str, Gram]:
    """Return a Gram a Linear; Linears of an input group that tap their input share one."""
    grams: dict[str, Gram] = {}
    shared: dict[tuple[str, ...], Gram] = {}
    for linear in planned:
        if linear.tap == "output":
            grams[linear.path] = Gram("output", linear.out_features, device=device)
        else:
            gram = shared.setdefault(linear.group, Gram("input", linear.in_features, device=device))
            grams[linear.path] = gram
    return grams
