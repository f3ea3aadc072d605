"""Stage 2: an ordinary LoRA, trained with TRL on an emulator (or on an ordinary model, as the upper bound).

The adapter directory is built in staging, where the trainer also keeps its own checkpoints, so that the same command
resumes at the last complete one. With several processes (``accelerate launch``), only the main one creates and
publishes the directory; the others write their part of the checkpoints into it.
"""

import atexit
import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments
from transformers.trainer_callback import TrainerCallback, TrainerState

from emloc_core.adapters.adapter import content_hash
from emloc_core.adapters.moments import copy_moments, write_moments
from emloc_core.data.rows import SKIPPED, digest, skipped_warnings, write_skipped
from emloc_core.emulator.declared import find_linears
from emloc_core.errors import EmlocError, first_line, is_out_of_memory
from emloc_core.files.card import data_name
from emloc_core.files.documents import read_json, write_json
from emloc_core.files.inputs import Inputs
from emloc_core.files.job import Job, Progress
from emloc_core.files.manifest import CONTENT, MANIFEST, input_name, manifest_value, read_manifest
from emloc_core.files.output import Output
from emloc_core.model.cap import cap_sentence
from emloc_core.model.opened import OpenModel, open_model
from emloc_core.processes.parallel import Processes
from emloc_core.requests import PolishRequest, TrainRequest
from emloc_core.settings import DEFAULT_EPOCHS, StepSettings, TrainSettings
from emloc_core.tuning.checkpoints import STATE, newest_checkpoint, remove_incomplete
from emloc_core.tuning.evaluation import BaseLoss, is_over, logged, losses_at, trainer_settings
from emloc_core.tuning.launcher import require_room, require_whole_weights
from emloc_core.tuning.rows import tuning_rows
from emloc_core.tuning.start import GivenLora, NewLora
from emloc_core.tuning.trainer import DIVERGED, SETTINGS, LoraSteps, refusing
from emloc_core.tuning.trl import require_tracker
from emloc_core.units import counted

LOG = "log.json"
CHECKPOINTS = "checkpoints"  # the trainer's, while it runs
#: Settings that do not affect the result: ever, and without rows to evaluate.
_WITHOUT_EFFECT, _OF_EVALUATION = {"report_to", "save_steps"}, {"eval_steps", "patience"}


class Train(Job):
    """Stage 2. The constructor makes cheap checks; :meth:`run` trains.

    Args:
        request: what is trained, on which rows, and how. The rows that an emulator keeps are always left out.
        start: what the steps begin from: a new LoRA, or an adapter.

    Raises:
        EmlocError: the model, its family, the data or the settings are wrong.
    """

    #: The caller's callbacks, which the trainer calls too; they are no part of the request.
    callbacks: Sequence[TrainerCallback] = ()
    #: Advice that takes less memory.
    smaller = "a smaller batch and more accumulation, a maximum length, or gradient checkpointing"

    def __init__(self, request: TrainRequest | PolishRequest, start: NewLora | GivenLora) -> None:
        self.request, self.path, self.start = request, request.output, start
        self.model = start.model
        _ = self.model.checkpoint.tensors  # finds truncated shards before training
        quantised = self.model.checkpoint.config.get("quantization_config")
        # A skeleton refuses weights that are missing, or hold no floats.
        without_weights = self.model.build() if quantised else self.model.skeleton.model
        linears = find_linears(without_weights, self.model.family)  # refuses a declaration that does not fit this model
        self.settings = start.settings.with_rate(linears.width)
        self.model.objective.check(self.settings)
        if not (self.path / MANIFEST).is_file():  # a finished adapter needs none
            require_tracker(self.settings)
        self.targets = start.targets(without_weights)
        self.rows, self.eval_rows, self.excluded, self.skipped = tuning_rows(request, self.model, self.settings)
        self.base = self._base()

    def _base(self) -> OpenModel | None:
        """Return the base that is evaluated with the LoRA, if there is one."""
        if not self.request.evaluation.on_base:
            return None
        if self.settings.trains_modules:
            raise EmlocError(
                "The base can be evaluated only with LoRAs, but embeddings or the output layer are trained too.",
                "Leave out --eval-base.",
                code="unsupported",
            )
        if not self.eval_rows:
            raise EmlocError(
                "There are no rows to evaluate the base on.", "Give them with --eval-data or --eval-split."
            )
        return open_model(self.request.evaluation.base or input_name(self.model.checkpoint.directory, "base"), "cpu")

    @property
    def warnings(self) -> list[str]:
        """What the user has to know before training: which rows are left out, and what is forgotten."""
        return [*skipped_warnings(self.skipped), *self.start.warnings]

    def describe(self) -> dict[str, Any]:
        """Return what would be trained in one process: rows and their lengths, steps, target modules.

        Raises:
            EmlocError: the settings conflict with each other or with the machine, or something else is at the output.
        """
        settings, config, files = self.settings, self._config(), Inputs(self.path.resolve().parent)
        measured = self.model.objective.measure(self.model, self.rows, self.eval_rows, settings)
        batches = math.ceil(measured["examples"] / settings.batch_size)
        epochs = getattr(settings, "epochs", None) or DEFAULT_EPOCHS
        steps = math.ceil(epochs * math.ceil(batches / settings.accumulation))
        return {
            "output": str(self.path),
            "model": str(self.model.checkpoint.directory),
            "family": self.model.family.name,
            "rows": len(self.rows),
            "excluded_rows": self.excluded,
            "eval_rows": len(self.eval_rows),
            **measured,
            "steps": settings.steps or steps,
            "learning_rate": settings.learning_rate,
            "target_modules": self.targets,
            "model_bytes": self.model.checkpoint.nbytes,
            **self.start.describe(files),
            "finished": self.path.exists() and self._output(config, files, PartialState().num_processes).is_finished(),
        }

    def _config(self, *, exact: bool = False, **fixed: Any) -> TrainingArguments:
        checkpoints = Output(self.path, "adapter", {}).staging / CHECKPOINTS
        if self.eval_rows:
            fixed = {**trainer_settings(self.settings, on_base=self.base is not None), **fixed}
        with refusing(SETTINGS):
            return self.model.objective.arguments(self.settings, checkpoints, self.rows, exact=exact, **fixed)

    def run(self, progress: Progress | None = None) -> Path:
        """Train, or resume an interrupted run.

        Args:
            progress: called with the loss as text, the number of steps done, the total, and the loss; None: the
                trainer shows its bar.

        Raises:
            EmlocError: the settings conflict, the loss is NaN or Inf, or memory runs out.
        """
        config = self._config(disable_tqdm=progress is not None)
        self._progress = progress
        state = PartialState()
        require_whole_weights()
        if state.num_processes > 1:  # threads of the group that outlive the interpreter may abort it
            atexit.register(state.destroy_process_group)
        self.is_main_process = state.is_main_process
        files = Inputs(self.path.resolve().parent)
        with ExitStack() as building:
            with Processes().together():
                output = self._output(config, files, state.num_processes if state.is_main_process else None)
                finished = state.is_main_process and output.is_finished()
                if state.is_main_process and not finished:
                    building.enter_context(output.build())
            (finished,) = broadcast_object_list([finished])
            if finished:
                return self.path
            output.result = self._train(config, output, state)
            if state.is_main_process:
                output.result[CONTENT] = content_hash(output.staging)
                steps = steps_text(self.settings, output.request, output.result)
                output.provenance = self.start.card_text(self.targets, steps)
            with Processes().together():
                building.close()  # every process finds it published
        return self.path

    def _output(self, config: TrainingArguments, files: Inputs, processes: int | None) -> Output:
        """Return the adapter's directory.

        Args:
            processes: that train; None in one that does not write the directory, where the model is not hashed.
        """
        request = {} if processes is None else self._request(files, processes)
        return Output(self.path, "adapter", request, config.device.type, self._inputs(), files, self.model.family)

    def _name(self) -> str:
        """Return what the adapter calls its model: a hub id, or the path of an emulator, which `correct` reads."""
        is_emulator = self.model.checkpoint.config.get("quantization_config") is not None
        return str(self.model.checkpoint.directory.absolute()) if is_emulator else self.model.checkpoint.name

    def _inputs(self) -> dict[str, str]:
        """Return the paths of the inputs, for the manifest."""
        return {"model": self._name(), "data": data_name(self.request.data), **self.start.inputs}

    def _request(self, files: Inputs, processes: int) -> dict[str, Any]:
        return {
            "model": self.model.checkpoint.fingerprint(files),
            "rows": digest(self.rows),
            "settings": self.settings.model_dump(
                exclude=_WITHOUT_EFFECT | (set() if self.eval_rows else _OF_EVALUATION)
            ),
            "processes": processes,  # they multiply the batch
            **self._evaluated(files),
            **self.start.fingerprints(files),
        }

    def _evaluated(self, files: Inputs) -> dict[str, Any]:
        """Return the request's entries for the evaluation: it decides which checkpoint is kept."""
        if self.base is None:
            return {"eval": digest(self.eval_rows)} if self.eval_rows else {}
        base, emulator = self.base.checkpoint.fingerprint(files), self.model.checkpoint.directory
        if manifest_value(read_manifest(emulator) or {}, emulator, "request.base", str) != base:
            raise EmlocError(
                f"The emulator {emulator} was made from a base other than {self.base.checkpoint.directory}.",
                "Give the base that it was made from with --base.",
                code="mismatch",
            )
        return {"eval": digest(self.eval_rows), "eval_base": base}

    def _train(self, config: TrainingArguments, output: Output, state: PartialState) -> dict[str, Any]:
        """Train and write the adapter; return the manifest's result."""
        checkpoints = output.staging / CHECKPOINTS
        if state.is_main_process:
            remove_incomplete(checkpoints, state.num_processes)
        state.wait_for_everyone()
        resume = newest_checkpoint(checkpoints)
        if self.eval_rows and self.start.adapter:
            config.eval_on_start = resume is None
        data = self.model.objective.datasets(self.model, self.rows, self.eval_rows, self.settings, config)
        self.sizes, dropped = data.sizes, len(self.rows) - len(data.sizes)
        options = {"patience": self.settings.patience, "processing_class": data.processing}
        trainer = self._trainer(config, train_dataset=data.train, eval_dataset=data.evaluated, **options)
        trainer.start = self.start.adapter
        trainer.follow(self._progress, self.callbacks)
        if self.eval_rows and (held_out := self._held_out(config)):
            trainer.base_loss = held_out
        trainer.lora.peft_config["default"].base_model_name_or_path = str(self.model.checkpoint.directory.absolute())
        saved = TrainerState.load_from_json(str(resume / STATE)) if resume else None
        if saved and is_over(saved):  # interrupted after the last step: train() might add one
            trainer.restore(saved)
        else:
            try:
                trainer.train(resume_from_checkpoint=str(resume) if resume else None)
            except ImportError as error:  # an optimiser's package
                raise EmlocError(
                    f"{SETTINGS}: {first_line(error)}", "Install it, or choose another.", code="unavailable"
                ) from error
            except Exception as error:
                of_extra = self.settings.extra and isinstance(error, TypeError | ValueError)
                if of_extra and not trainer.state.global_step:  # TRL checks neither their types nor their ranges
                    raise EmlocError(f"{SETTINGS} ({first_line(error)}).", "Correct the extra fields.") from error
                if isinstance(error, EmlocError) or not is_out_of_memory(error):
                    raise
                raise EmlocError(
                    f"The device ran out of memory at step {trainer.state.global_step + 1}.{cap_sentence()}",
                    "Free some and run the same command again to resume at the last checkpoint, or train with "
                    f"{self.smaller}.",
                    code="memory",
                    resumable=True,
                ) from error
        state.wait_for_everyone()
        log = logged(trainer.state.log_history)
        best = trainer.state.best_global_step
        kept = self.start.adapter if best == 0 else None  # no step made it better
        if kept:
            trainer.load(kept)
        elif best is not None:
            trainer.load_step(best)
        output.timing.update(trainer.cost())
        if state.is_main_process:
            self._write(trainer, output.staging, log, kept)
        evaluated = {"eval_rows": len(self.eval_rows), "best_step": best}
        return {
            "steps": trainer.state.global_step,
            "train_loss": _mean_loss(log),
            "rows": len(self.rows) - dropped,
            "dropped_rows": dropped,
            "longest_tokens": max(size.tokens for size in self.sizes),
            "excluded_rows": self.excluded,
            **({"skipped_rows": len(self.skipped)} if self.skipped else {}),
            "trainable_parameters": trainer.lora.get_nb_trainable_parameters()[0],
            "target_modules": self.targets,
            **({} if best is None else {**evaluated, **losses_at(best, log)}),
        }

    def _held_out(self, config: TrainingArguments) -> BaseLoss | None:
        """Return the streamed evaluation of a base; None if only the model itself is evaluated."""
        if self.base is None:
            return None
        return BaseLoss(replace(self.base, device=config.device), self.eval_rows, self.settings.max_length)

    def _trainer(self, config: TrainingArguments, **options: Any) -> LoraSteps:
        require_room(self.model.checkpoint.nbytes, config.device)
        options["adapter"] = self.start.adapter
        trainer: Any = self.model.objective.trainer(self.model, self.settings, self.targets, config, **options)
        return trainer

    def _write(self, trainer: LoraSteps, staging: Path, log: list[dict[str, float]], kept: Path | None) -> None:
        if not trainer.state.global_step:
            raise EmlocError("No step was taken: the rows make no full batch.", "Lower batch_size.")
        for name, parameter in trainer.lora.named_parameters():
            if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
                raise EmlocError(f"After the last step {name} is not finite.", DIVERGED, code="not-finite")
        (staging / "README.md").unlink(missing_ok=True)  # PEFT would read the card that a killed run began
        trainer.lora.save_pretrained(str(staging), save_embedding_layers=False)
        if kept:  # with its own moments, not those of steps that made it worse
            copy_moments(kept, staging)
        else:
            rate = self.start.tuned_at or self.settings.learning_rate
            assert rate is not None
            write_moments(staging, trainer.lora, trainer.optimizer, rate)
        config = read_json(staging / "adapter_config.json")
        if isinstance(config["target_modules"], list):  # of a set, in random order; otherwise it is a pattern
            config["target_modules"] = self.targets
        config["target_parameters"] = sorted(config.get("target_parameters") or []) or None  # likewise
        config["base_model_name_or_path"] = self._name()  # only now: PEFT would fetch from the hub what it names
        write_json(staging / "adapter_config.json", config)
        self.model.objective.accompany(self.model.checkpoint, staging)
        write_json(staging / LOG, log)
        if self.skipped:
            write_skipped(staging / SKIPPED, self.skipped)
        checkpoints = staging / CHECKPOINTS
        if (checkpoints / "runs").is_dir():  # TensorBoard
            shutil.copytree(checkpoints / "runs", staging / "runs", dirs_exist_ok=True)
        shutil.rmtree(checkpoints)


def _mean_loss(log: list[dict[str, float]]) -> float | None:
    """Return the mean loss of all steps; the trainer's own figure leaves out those before a resume."""
    trained = [entry for entry in log if "loss" in entry]
    ends = [0, *(entry["step"] for entry in trained)]
    total = sum(entry["loss"] * (end - start) for entry, start, end in zip(trained, ends, ends[1:], strict=False))
    return total / ends[-1] if trained else None


def steps_text(settings: StepSettings, request: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """Return a card's text on the steps.

    Args:
        request, result: as in the manifest.
    """
    steps = counted(result["steps"], "exact step" if request.get("exact") else "step")
    place = " on the base" if request.get("exact") else ""
    rows = settings.batch_size * settings.accumulation * request["processes"]
    text = f"{steps}{place} of {counted(rows, 'row')} at a learning rate of {settings.learning_rate}"
    if settings.learns_preferences and isinstance(settings, TrainSettings):
        text += f", by {settings.objective.upper()} with beta {settings.beta}"
    loss = result["train_loss"]
    kept = ", which did not improve it: it was kept as it was" if result.get("best_step") == 0 else ""
    return f"{text}, on {counted(result['rows'], 'row')}" + ("" if loss is None else f", mean loss {loss:.4f}") + kept
