"""Exact LoRA steps on the base itself, streamed: from an adapter (``polish``), or a new LoRA (``train --exact``).

The trainer is TRL's: optimiser, schedule, order of rows, logging, checkpoints. It gets the whole batch of a step at
once, and the engine (:mod:`emloc_core.exact.steps`) takes its gradients in micro-batches of ``batch_size`` rows.
Several processes get the same batch, and divide its micro-batches.
"""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from accelerate import PartialState
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import DataLoader
from transformers import TrainingArguments, set_seed
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTConfig

from emloc_core import devices
from emloc_core.compat.halves import scratch
from emloc_core.compat.transformers import recomputing_field
from emloc_core.errors import EmlocError
from emloc_core.exact.boundaries import Boundaries
from emloc_core.exact.lora import lora_on
from emloc_core.exact.memory import lora_need, step_need
from emloc_core.exact.steps import ExactSteps
from emloc_core.files.inputs import Inputs
from emloc_core.files.output import Output
from emloc_core.model.cap import cap_gpus
from emloc_core.model.device import free_memory, free_of
from emloc_core.model.inside import Positions
from emloc_core.model.overhead import overhead
from emloc_core.processes.parallel import Processes
from emloc_core.requests import PolishRequest, TrainRequest
from emloc_core.tuning.evaluation import MODEL_LOSS, BaseLoss
from emloc_core.tuning.start import GivenLora, NewLora, loras_alone, start_of
from emloc_core.tuning.train import Train
from emloc_core.tuning.trainer import SETTINGS, LoraSteps, LoraTrainer, balance_no_experts, refusing
from emloc_core.units import counted, human_bytes, parse_bytes

#: Share of a GPU's free memory that activations at boundaries may fill before they are moved to the CPU's.
_SHARE = 0.25
#: How many times their bytes they may take in the CPU's memory: torch pins powers of two.
_PINNED = 2
#: Fields of SFTConfig that ask for another way to take gradients, or for another loss.
_ORDINARY = (
    "activation_offloading", "bf16_full_eval", "deepspeed", "fp16", "fp16_full_eval", "fsdp", "fsdp_config",
    "gradient_checkpointing_kwargs", "label_smoothing_factor", "liger_kernel_config", "loss_type",
    "neftune_noise_alpha", "parallelism_config", "router_aux_loss_coef", "torch_compile", "use_liger_kernel",
)  # fmt: skip


class ExactTrain(Train):
    """Trains a LoRA on a model that need not fit in memory, to the same result as :class:`Train`.

    Args:
        request, start: see :class:`Train`. An optimiser step takes ``batch_size x accumulation`` rows, and reads every
            block twice.

    Raises:
        EmlocError: as :class:`Train`; or the model is quantised in another way than emulators are, or a setting asks
            for ordinary steps.
    """

    smaller = "a smaller batch and more accumulation, or a maximum length"

    def __init__(self, request: TrainRequest | PolishRequest, start: NewLora | GivenLora) -> None:
        if request.evaluation.on_base:
            raise EmlocError("Exact steps train on the base, whose loss is evaluated anyway.", "Leave out --eval-base.")
        super().__init__(request, start)
        if self.settings.learns_preferences:
            raise EmlocError(
                "Exact steps support only the likelihood of answers, not preferences.",
                "Train by DPO on an emulator or an ordinary model.",
                code="unsupported",
            )
        if self.settings.trains_modules:
            raise loras_alone("modules")
        if unsupported := [name for name in _ORDINARY if name in self.settings.extra]:
            raise EmlocError(f"Exact steps do not support {', '.join(unsupported)}.", "Leave it out.")
        self.skeleton, self.limits = self.model.skeleton, request.limits
        self.memory = parse_bytes(self.limits.memory) if self.limits.memory else None

    def _config(self, **fixed: Any) -> TrainingArguments:
        return super()._config(
            exact=True,
            per_device_train_batch_size=self._rows,
            gradient_accumulation_steps=1,
            **{recomputing_field(): False, **fixed},  # recomputed by the engine, with weights that it reads
        )

    @property
    def _rows(self) -> int:
        """The rows of a step, for each process."""
        return self.settings.batch_size * self.settings.accumulation

    def _request(self, files: Inputs, processes: int) -> dict[str, Any]:
        return {**super()._request(files, processes), "exact": True}

    def _trainer(self, config: TrainingArguments, **options: Any) -> LoraSteps:
        set_seed(config.seed)  # as TRL does before it makes a LoRA
        with refusing(SETTINGS):
            lora = lora_on(self.skeleton, self.start.lora(self.targets, self.skeleton.model), config.device)
        trained = sum(parameter.numel() for parameter in lora.parameters() if parameter.requires_grad)
        need = {**self._need(), "lora": lora_need(trained)}
        boundaries = self._boundaries(config, need)  # which may be refused, before the trainer makes a directory
        device = config.device.type
        besides = overhead(device, tuning=True) + scratch(device, {self.skeleton.dtype, torch.bfloat16})
        reserved = {**need, "boundaries": min(need["boundaries"], boundaries.room)}
        room = 0 if self.memory is None else self.memory - sum(reserved.values()) - besides
        config.per_device_train_batch_size *= config.world_size  # each gets all, and takes its share
        with refusing(SETTINGS):
            trainer: Any = self.model.objective.exact_trainer()(lora, args=config, **options)
        base: Any = lora.get_base_model()
        steps = trainer.engine(base, self.skeleton, config.device, room, boundaries)
        trainer.attach(steps, self.settings.batch_size)
        self._closing.callback(steps.close)
        return trainer

    def _train(self, config: TrainingArguments, output: Output, state: PartialState) -> dict[str, Any]:
        """Train as usual, in the memory that was given, and let go of the base's weights."""
        if self.memory is not None:
            cap_gpus(self.memory)
        with ExitStack() as self._closing:
            return super()._train(config, output, state)

    def _held_out(self, config: TrainingArguments) -> BaseLoss:
        return BaseLoss(replace(self.model, device=config.device), self.eval_rows, self.settings.max_length)

    def _need(self) -> dict[str, int]:
        """Return what the longest step needs; see :func:`step_need`."""

        def most(sizes: Sequence[int]) -> Positions:
            largest = sorted(sizes, reverse=True)[: self._rows]
            return Positions(sum(largest), largest[0] * self.settings.batch_size)

        tokens, patches = most([row.tokens for row in self.sizes]), most([row.patches for row in self.sizes])
        return step_need(self.skeleton.model, self.model.family, tokens, patches, self.skeleton.dtype)

    def _boundaries(self, config: TrainingArguments, need: Mapping[str, int]) -> Boundaries:
        """Return the storage of activations at block boundaries.

        Raises:
            EmlocError: there is no room for them.
        """
        staging, on_disk = Path(str(config.output_dir)).parent, self.limits.park == "disk"
        free = shutil.disk_usage(staging).free if on_disk else free_memory("cpu")
        free //= Processes().local_count
        if devices.is_accelerator(config.device):
            on_gpu = free_of(config.device)
            room = max(0, min(_SHARE * on_gpu, on_gpu - sum(need.values()) + need["boundaries"]))
            away = max(0, need["boundaries"] - room) * (1 if on_disk else _PINNED)
        else:
            room, away = 0 if on_disk else float("inf"), need["boundaries"]
        if away > free:
            other = "or a maximum length" if on_disk else "or a maximum length, or keep them on a disk (--park disk)"
            raise EmlocError(
                f"A step of {counted(self._rows, 'row')} keeps {human_bytes(away)} at block boundaries, but only "
                f"{human_bytes(free)} of {'the disk' if on_disk else 'memory'} is free.",
                f"Lower the batch size, the accumulation {other}.",
                resumable=True,
            )
        return Boundaries(room, staging) if on_disk else Boundaries(room, reserved=away)

    def describe(self) -> dict[str, Any]:
        """Return what :meth:`Train.describe` does, and ``step_read_bytes``: every block twice, the rest once."""
        keys = {
            key
            for block in self.skeleton.blocks
            for name in self.skeleton.names(block)
            for key in self.skeleton.sources(name)
        }
        twice = sum(self.model.checkpoint.tensors[key].nbytes for key in keys)
        return {**super().describe(), "step_read_bytes": self.model.checkpoint.nbytes + twice}


class StreamedConfig(SFTConfig):
    """TRL's config, for a model that stays where it is: its weights are read when they are needed."""

    place_model_on_device = False


class Streamed(LoraSteps):
    """A trainer that gets all rows of a step at once, and takes their gradients by exact steps.

    Attributes:
        engine: the class that computes the gradients.
    """

    engine: ClassVar[type[ExactSteps]] = ExactSteps

    def attach(self, steps: ExactSteps, micro_batch: int) -> None:
        """Take gradients by these steps, ``micro_batch`` rows at a time."""
        self._steps, self._micro_batch = steps, micro_batch
        self._collate: Any = self.data_collator
        self.data_collator = cast("Any", list)  # a batch is its rows
        self.accelerator.device_placement = False  # of the model, and of whole batches
        self.accelerator.dataloader_config.dispatch_batches = False  # every process reads all rows itself
        # The steps themselves divide the batch and sum the gradients, so that the model is not wrapped for it.
        self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)

    def get_train_dataloader(self) -> DataLoader:
        """Return all rows of every step, in every process."""
        loader = super().get_train_dataloader()
        if isinstance(shard := loader.batch_sampler, BatchSamplerShard):
            shard.num_processes, shard.process_index, shard.even_batches = 1, 0, False
        return loader

    def take_gradients(self, model: Any, inputs: list[Any], num_items_in_batch: Any = None) -> torch.Tensor:  # noqa: ARG002
        """Take the gradients of a step whose rows are ``inputs``, and return its loss."""
        model.train()
        size = self._micro_batch
        batches = (self._collate(inputs[start : start + size]) for start in range(0, len(inputs), size))
        return self._steps.loss(batches, autocast=self.args.bf16)

    def evaluation_loop(self, *_args: Any, **_kwargs: Any) -> EvalLoopOutput:
        """Evaluate the model, streamed."""
        assert self.base_loss is not None
        self.lora.eval()  # TRL logs by it
        count = len(self.base_loss.samples)
        return EvalLoopOutput(None, None, {MODEL_LOSS: self.base_loss(self.lora)}, count)  # type: ignore[arg-type]

    def cost(self) -> dict[str, Any]:
        """Return how much was read, and how long the steps waited for it."""
        weights = self._steps.weights
        return {"read_bytes": weights.bytes_read, "waited_seconds": round(weights.waited, 3)}


class StreamedTrainer(Streamed, LoraTrainer):
    """TRL's trainer for answers."""

    def __init__(self, model: Any, **options: Any) -> None:
        balance_no_experts(model.config)
        super().__init__(model, **options)


def prepare(request: TrainRequest | PolishRequest) -> Train:
    """Return the job of a request to train, ordinarily or by exact steps, or to polish.

    Raises:
        EmlocError: from the model, the adapter, the rows or the settings.
    """
    if isinstance(request, PolishRequest):
        return ExactTrain(request, GivenLora(request))
    start = start_of(request)
    return ExactTrain(request, start) if request.exact else Train(request, start)
