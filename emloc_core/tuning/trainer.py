"""TRL's trainer for a LoRA: resumes to the same log, evaluates the base too, and stops at a loss that is not finite."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from transformers import (
    EarlyStoppingCallback,
    PreTrainedConfig,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_callback import TrainerState
from trl import DPOTrainer, KTOConfig, KTOTrainer, SFTTrainer

from emloc_core.adapters.moments import load_moments
from emloc_core.compat.peft import leave_casts_to_autocast
from emloc_core.compat.trl import TokenizedDataset, counted_tokens_alone, mean_log_probs, note, tiles_of
from emloc_core.errors import EmlocError
from emloc_core.files.job import Progress
from emloc_core.standins.layer import take_what_autocast_takes
from emloc_core.standins.vocabulary import rows_at_once
from emloc_core.tuning.evaluation import BASE_LOSS, MARGIN, BaseLoss
from emloc_core.tuning.preferences import odds_ratio_loss, with_mismatched

SETTINGS = "The training settings do not work"
DIVERGED = "Lower the learning rate, or train without bf16."
_FROM_THE_START = "Nothing has been tuned yet: the model may be damaged, so copy it again, or train without bf16."
_PENDING = "loss_since"  # in a checkpoint's log: the loss summed since its last entry


class LoraSteps(Trainer):
    """Makes TRL's trainers stop at a loss that is NaN or Inf, and save what a resumed log needs."""

    base_loss: BaseLoss | None = None
    #: Directory of the adapter that training starts from, if it does.
    start: Path | None = None

    def __init__(self, model: PreTrainedModel | PeftModel, *, patience: int | None = None, **options: Any) -> None:
        stopping = [_Patience(patience)] if patience and options.get("eval_dataset") is not None else []
        set_seed(options["args"].seed)  # before a LoRA is drawn: TRL does so only since 1.15
        super().__init__(model, callbacks=[_LastStep(), *stopping], **options)
        self.loss_since_log = _LossSinceLog(self.accelerator)
        self.add_callback(self.loss_since_log)
        if self.args.bf16:
            leave_casts_to_autocast(self.lora)
            take_what_autocast_takes(self.lora)
        self.add_callback(_BestAtStart())  # after the one that stops early, which would count it as a failure
        for name, parameter in self.lora.named_parameters():
            # TRL rounds the LoRA to bf16 where the model is in four bits. Embeddings and output layers that are trained
            # themselves meet activations in the model's dtype, unless autocast casts them.
            if parameter.requires_grad and (".lora_" in name or self.args.bf16):
                parameter.data = parameter.data.float()

    @property
    def lora(self) -> PeftModel:
        """The model."""
        assert isinstance(self.model, PeftModel)
        return self.model

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Create the optimiser; it begins with the moments of that adapter, if it has any."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        if self.start:
            load_moments(self.start, self.lora, optimizer)
        return optimizer

    def follow(self, progress: Progress | None, callbacks: Sequence[TrainerCallback]) -> None:
        """Report every step to ``progress``, in place of the trainer's own output, and add the caller's callbacks."""
        if progress is not None:
            self.remove_callback(PrinterCallback)  # it prints every entry of the log as a dict
            self.add_callback(_Report(progress))
        for callback in callbacks:
            self.add_callback(callback)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train. If it fails, its progress bar is ended, so that the message starts a line of its own."""
        try:
            return super().train(*args, **kwargs)
        except BaseException:
            for callback in self.callback_handler.callbacks:
                if (bar := getattr(callback, "training_bar", None)) is not None:
                    bar.close()
            raise

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute the gradients of a step, and return its loss."""
        loss = self.take_gradients(*args, **kwargs)
        if not bool(torch.isfinite(loss)):  # the trainer itself would log an average and continue
            before = self.state.global_step
            remedy = DIVERGED if before else _FROM_THE_START
            raise EmlocError(f"The loss at step {before + 1} is {loss.item()}.", remedy, code="not-finite")
        self.loss_since_log.add(loss)
        return loss

    def take_gradients(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute the gradients of a step by ordinary forward and backward passes, and return its loss."""
        with counted_tokens_alone(), tiles_of(rows_at_once(self.lora)):
            return super().training_step(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate the model, and the base with its LoRA if that was asked for."""
        with counted_tokens_alone(), tiles_of(rows_at_once(self.lora)):
            output: Any = super().evaluation_loop(*args, **kwargs)
        if self.base_loss is not None:
            output.metrics[BASE_LOSS] = self.base_loss(self.lora)
        return output

    def load_step(self, step: int) -> None:
        """Load the LoRA of the checkpoint of a step."""
        self.load(self._checkpoint(step))

    def load(self, directory: Path) -> None:
        """Load the LoRA in a directory."""
        set_peft_model_state_dict(self.lora, load_peft_weights(str(directory), device="cpu"))

    def restore(self, state: TrainerState) -> None:
        """Restore the state after the last step, for a run that ended before it had written the LoRA."""
        self.state = state
        self.load_step(state.global_step)
        optimizer = self._checkpoint(state.global_step) / "optimizer.pt"
        if optimizer.is_file():
            self.create_optimizer().load_state_dict(torch.load(optimizer, self.args.device, weights_only=True))

    def _checkpoint(self, step: int) -> Path:
        return Path(str(self.args.output_dir)) / f"checkpoint-{step}"

    def cost(self) -> dict[str, Any]:
        """Return costs of the steps besides time and memory, for ``timing.json``."""
        return {}

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log; the loss is the mean of all steps since the last entry, including those before an interruption."""
        if "loss" in logs:
            logs["loss"] = self.loss_since_log.pop(self.state.global_step)
        super().log(logs, *args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Save the LoRA of a checkpoint, and keep in the state, which is saved next, the loss since the last entry."""
        super().save_model(*args, **kwargs)
        self.loss_since_log.keep(self.state)


class LoraTrainer(LoraSteps, SFTTrainer):
    """TRL's trainer for answers, for a LoRA."""


class PreferenceTrainer(LoraSteps, TokenizedDataset, DPOTrainer):
    """TRL's trainer for preferences, for a LoRA; the reference is the model with the LoRA switched off."""


class LabelTrainer(LoraSteps, TokenizedDataset, KTOTrainer):
    """TRL's trainer for answers that are wanted or not, for a LoRA; with the same reference."""

    def prepared(self, dataset: Dataset, args: KTOConfig) -> Dataset:
        """Return the tokenized dataset, with the answers that the distance to the reference is estimated from."""
        return with_mismatched(dataset, args.per_device_train_batch_size) if self.calculate_KL else dataset


class OddsTrainer(PreferenceTrainer):
    """ORPO, on TRL's trainer for preferences, without its reference.

    TRL's own trainer for it is an experiment, which holds the logits of all tokens of both answers several times over.
    """

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> torch.Tensor:
        """Return the loss of a batch: chosen answers, then rejected ones."""
        chosen, rejected = mean_log_probs(model, inputs).chunk(2)
        note(self, **{MARGIN: self.beta * (chosen - rejected)})
        return odds_ratio_loss(chosen, rejected, self.beta)


#: By objective.
TRAINERS: dict[str, type[LoraSteps]] = {
    "sft": LoraTrainer,
    "dpo": PreferenceTrainer,
    "kto": LabelTrainer,
    "orpo": OddsTrainer,
}


class _LossSinceLog(TrainerCallback):
    """The loss summed since the log's last entry. A checkpoint keeps it; the trainer's own sum begins at 0 again."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._sum, self._since = torch.zeros((), device=accelerator.device), 0

    def add(self, loss: torch.Tensor) -> None:
        """Add the loss of a micro-batch, as its share of the step's."""
        self._sum += loss.detach()

    def pop(self, step: int) -> float:
        """Return the mean loss of the steps up to this one, over all processes, and start again from 0."""
        mean = self._over_processes() / (step - self._since)
        self._sum.zero_()
        self._since = step
        return mean

    def keep(self, state: TrainerState) -> None:
        """Put the sum into a state that is about to be saved."""
        state.log_history.append({_PENDING: self._over_processes(), "since": self._since})

    def on_save(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:  # noqa: ARG002
        state.log_history.pop()

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:  # noqa: ARG002
        if state.log_history and _PENDING in state.log_history[-1]:
            saved = state.log_history.pop()
            self._sum += saved[_PENDING]
            self._since = int(saved["since"])

    def _over_processes(self) -> float:
        return float(self._accelerator.gather(self._sum).mean())


class _BestAtStart(TrainerCallback):
    """Takes an evaluation before the first step for the best so far."""

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        if state.global_step == 0:
            state.best_metric, state.best_global_step = kwargs["metrics"][args.metric_for_best_model], 0


class _Report(TrainerCallback):
    """Reports every step, with the last loss that was logged."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Report a step."""
        if state.is_world_process_zero:
            logged = (float(entry["loss"]) for entry in reversed(state.log_history) if "loss" in entry)
            loss = next(logged, None)
            item = "first steps" if loss is None else f"loss {loss:.4f}"
            self._progress(item, state.global_step, state.max_steps, loss)


class _Patience(EarlyStoppingCallback):
    """Stops after evaluations without a better loss; the best checkpoint is kept, though not by the trainer."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Do not warn that the best one would not be loaded."""


class _LastStep(TrainerCallback):
    """Logs and evaluates the last steps too, which the trainer would leave out."""

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True
            if args.eval_strategy != "no":
                control.should_evaluate = control.should_save = True


def balance_no_experts(config: PreTrainedConfig) -> None:
    """Disable TRL's load-balancing loss for experts: their routers are frozen."""
    text_config = config.get_text_config()
    if hasattr(text_config, "router_aux_loss_coef"):
        text_config.router_aux_loss_coef = 0.0


@contextmanager
def refusing(context: str, *, resumable: bool = False) -> Iterator[None]:
    """Turn libraries' errors about settings and files into an :class:`EmlocError`."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError, ImportError, KeyError, OSError) as error:
        raise EmlocError(
            f"{context}: {error}", "Correct that, and run the same command again.", resumable=resumable
        ) from error
